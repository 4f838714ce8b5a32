"""Recent tokens as they are beside the plugin's compressed cache: the derivation in numpy, and what states hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import TINY, load

import ovtq
from ovtq.cli.convert import main
from ovtq.codec.rotation import randomized_frame, spread_width
from ovtq.errors import PreconditionFailed
from ovtq.forms.gpu.recent import ANCHOR, MARK, PADDING, SINK, RecentRows
from ovtq.forms.window_state import MOST, PARTS, UNITS
from ovtq.ir.graph import f32
from ovtq.passes import DecoupleLength, Rewrite, SimplifyMask, SinkRow, TruncateWindow
from ovtq.runtime.gpu_cache import restored
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.states import RECENT

WINDOW, WIDTH = 16, 64 + PADDING


def in_two_parts(near: np.ndarray, far: np.ndarray, values: np.ndarray, kind: type = np.float64) -> np.ndarray:
    """What the graph computes of scores (near,), (far,) and values (near + far, d), each result rounded to `kind`."""
    top = near.max()
    weights = np.exp(near - top).astype(kind)
    weights = (weights / weights.sum(dtype=np.float32)).astype(kind)
    context = (weights.astype(np.float32) @ values[: len(near)].astype(np.float32)).astype(kind)
    logit = kind(kind(top) - kind(np.log(weights.max())))
    scores = np.append(kind(logit * kind(1 / MARK)) * np.float64(MARK), far)  # the product that the anchor's key meets
    rest = np.zeros((1 + len(far), values.shape[1] + 1))
    rest[0, -1], rest[1:, :-1] = MARK, values[len(near) :]
    shares = np.exp(scores - scores.max())
    both = (shares / shares.sum() @ rest).astype(kind)
    return both[:-1] + kind(both[-1] * kind(1 / MARK)) * context


def at_once(near: np.ndarray, far: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One softmax over all."""
    scores = np.append(near, far)
    shares = np.exp(scores - scores.max())
    return shares / shares.sum() @ values


@pytest.mark.parametrize("apart", [-20, -8, 0, 8, 20])
@pytest.mark.parametrize("far", [0, 1, 300])
def test_one_softmax_in_two_parts(apart: int, far: int) -> None:
    """The near part e^apart times as heavy as the far one, or as many times lighter; no far part at all."""
    random = np.random.RandomState(apart + 100)
    for _ in range(20):
        near, rest = random.normal(size=WINDOW) * 2, random.normal(size=far) * 2
        if far:
            heavy = [np.log(np.exp(some).sum()) for some in (near, rest)]
            near += apart - (heavy[0] - heavy[1])
        values = random.normal(size=(WINDOW + far, 8))
        expected, largest = at_once(near, rest, values), np.abs(values).max()
        if near.max() < 60:  # in f64 the definition holds to its rounding, in f16 to that of a score of this size
            np.testing.assert_allclose(in_two_parts(near, rest, values), expected, atol=2e-6 * largest)
        near, rest, values = (x.astype(np.float16).astype(np.float64) for x in (near, rest, values))
        expected = at_once(near, rest, values)
        size = max(8.0, np.abs(near).max())
        error = np.abs(in_two_parts(near, rest, values, np.float16) - expected).max()
        assert error <= 2**-11 * (2 + size) * largest


@pytest.mark.parametrize("precision", ["u8", "u4"])
def test_the_anchor_is_stored_exactly(precision: str) -> None:
    """And a zero of another row is off by no more than half a step of it, which moves a weight by that over MARK."""
    random = np.random.RandomState(0)
    rows = np.zeros((64, WIDTH), np.float32)
    rows[0, ANCHOR] = MARK
    rows[1:, : SINK - 2] = random.normal(size=(63, WIDTH + SINK - 2)) * np.logspace(-2, 2, 63)[:, None]
    rows = rows.astype(np.float16).astype(np.float32)
    result = ov.opset15.result(restored(f32(rows), precision))
    stored = ov.Core().compile_model(ov.Model([result], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
    np.testing.assert_array_equal(stored[0], rows[0])
    steps = np.ptp(rows[1:], axis=1) / (255 if precision == "u8" else 15)
    assert (np.abs(stored[1:, ANCHOR]) <= 0.51 * steps).all()


def test_what_is_kept_of_a_number() -> None:
    """Every f16 from 2⁻⁸ up as it is; at f32 to 2⁻²⁰. By the arithmetic of the graph, with each result rounded."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every) & (np.abs(every) <= MOST)]
    units = every * np.float16(UNITS)
    whole = np.round(units)
    parts = np.round((units - whole) * np.float16(PARTS))
    assert units.dtype == parts.dtype == np.float16
    assert np.abs(whole).max() < 2**15
    back = (whole + parts * np.float16(1 / PARTS)) * np.float16(1 / UNITS)
    assert (back == every)[np.abs(every) >= 2**-8].all()
    assert np.abs(back.astype(np.float64) - every.astype(np.float64)).max() <= 2**-20
    assert 1 / PARTS >= 2**-14  # no subnormal f16
    assert MARK <= MOST


def recent(seed: int = 3) -> tuple[Rewrite, list[ov.Output]]:
    """The tiny model with a window, and keys and values as they enter layer 1's attention."""
    model, description = load(TINY["5.5"])
    taps = [port.source for port in (description.layers[1].key, description.layers[1].value)]
    rewrite = Rewrite(model, description, 0)
    for item in (DecoupleLength(), TruncateWindow(), SimplifyMask(), SinkRow(seed=seed, window=WINDOW, centre="none")):
        rewrite = item.apply(rewrite.model, rewrite.description)
    return rewrite, taps


def test_where_tokens_are() -> None:
    """The last ones in the window, behind the sink's row; all but the last in the cache, behind the anchor's."""
    rewrite, taps = recent()
    results = [*rewrite.model.get_results(), *map(ov.opset15.result, taps)]
    runner = Runner(
        ov.Model(results, rewrite.model.get_sinks(), rewrite.model.get_parameters()), "CPU", EXACT_PROPERTIES
    )
    inner = spread_width(64, WIDTH + SINK)
    assert inner == 76
    frame = randomized_frame(64, inner, 3)[0]
    for batch, calls in ((1, (1, 5, 40, 1)), (2, (33, 1, 7))):
        runner.reset()
        rows = np.zeros((2, batch, 2, 0, WIDTH), np.float32)
        for tokens in calls:
            runner.step(np.random.RandomState(tokens).randint(0, 256, (batch, tokens)).astype(np.int64))
            new = [runner.request.get_output_tensor(index).data @ frame for index in (1, 2)]
            rows = np.concatenate([rows, np.pad(np.stack(new), ((0, 0),) * 4 + ((0, WIDTH - inner),))], 3)
            states = {state.name: np.array(state.state.data) for state in runner.request.query_state()}
            whole, parts = np.split(states["ovtq.recent"][:, :4], 2, axis=3)  # of layer 1: keys, values of two heads
            window = ((whole + parts / PARTS) / UNITS).reshape(batch, 2, 2, 1 + WINDOW, WIDTH).swapaxes(0, 1)
            seen = min(WINDOW, rows.shape[3])
            np.testing.assert_allclose(window[:, :, :, 1 + WINDOW - seen :], rows[:, :, :, -seen:], atol=2e-6)
            assert (window[0, :, :, 0, SINK] == MARK).all()
            assert (np.delete(window[:, :, :, 0], SINK % WIDTH, axis=3) == 0).all()
            for kind, name in enumerate(("ovtq.1.key", "ovtq.1.value")):
                cache = states[name]
                assert cache.shape[2] == rows.shape[3]
                assert (cache[:, :, 0, ANCHOR] == MARK).all()
                assert (cache[:, :, 0, :ANCHOR] == 0).all()
                np.testing.assert_allclose(cache[:, :, 1:], rows[kind][:, :, :-1], atol=2e-6)


def test_no_product_of_rank_five_is_added_to_as_it_comes(convert: Callable[..., Path]) -> None:
    """P34: the GPU plugin makes one kernel of both, which adds the wrong blocks' rows. Seen with this form's mask."""
    packed = ov.Core().read_model(convert(TINY["5.5"], "--preset", "k6v4", "--no-verify") / "openvino_model.xml")
    for model in (recent()[0].model, packed):
        products = [node for node in nodes_of(model) if node.get_type_name() == "MatMul"]
        ranks = [node.get_output_partial_shape(0).rank.get_length() for node in products]
        large = [node for node, rank in zip(products, ranks, strict=True) if rank > 4]
        assert large  # those of sliding layers
        readers = {reader.get_node().get_type_name() for node in large for reader in node.output(0).get_target_inputs()}
        assert readers == {"Reshape"}


def nodes_of(model: ov.Model) -> Iterator[ov.Node]:
    """All nodes, those of branches too."""
    for node in model.get_ops():
        yield node
        if node.get_type_name() == "If":
            for branch in (0, 1):
                yield from nodes_of(node.get_function(branch))


def _one_more_in_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = RecentRows._history_mask

    def wider(self: RecentRows, description: object) -> ov.Node:
        self.window -= 1
        found = mask(self, description)
        self.window += 1
        return found

    monkeypatch.setattr(RecentRows, "_history_mask", wider)


def _no_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    start = RecentRows._start

    def without(self: RecentRows, heads: int) -> np.ndarray:
        rows = start(self, heads)
        rows[:, -1] = 0
        return rows

    monkeypatch.setattr(RecentRows, "_start", without)


@pytest.mark.parametrize("fault", [_one_more_in_the_history, pytest.param(_no_anchor, marks=pytest.mark.slow)])
def test_a_fault_is_refused(
    fault: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fault(monkeypatch)
    passes = "decouple-length,truncate-window,simplify-mask,sink-row:window=16,check-call"
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--passes", passes]) == 2
    assert re.search("its results differ by", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def _a_sink_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = RecentRows._blocks

    def seen(self: RecentRows, *known: object) -> None:
        self.sinks = True
        blocks(self, *known)
        self.sinks = False

    monkeypatch.setattr(RecentRows, "_blocks", seen)


@pytest.mark.parametrize(
    "name", ["llama3", *(pytest.param(other, marks=pytest.mark.slow) for other in ("gemma3", "qwen2", "phi", "falcon"))]
)
def test_attention_without_sinks(
    name: str,
    family: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Verified as any other, whose sink's row no query sees; a form in which they do is refused."""
    passes = f"decouple-length{',truncate-window' * (name == 'gemma3')},simplify-mask,sink-row:window=16,check-call"
    options = [str(family(name)), str(tmp_path / "out"), "--passes", passes, "--force"]
    assert main(options) == 0
    _a_sink_where_there_is_none(monkeypatch)
    assert main(options) == 2
    assert re.search("its results differ by", capsys.readouterr().err)


def test_a_residual_window_beside_the_plugins_cache(
    family: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A GPU's u8 and u4 take it, with sinks or without; its tokens are in a state; a CPU's have no place for it."""
    for number, folder in enumerate((TINY["5.5"], family("qwen2"))):
        out = tmp_path / str(number)
        made = ovtq.convert(folder, out, preset="u4", residual_window=16, verify=False)
        names = [step.name for step in made.passes if not step.skipped]
        assert names[-3:] == ["sink-row", "cache-precision", "check-call"]
        assert "rotate-heads" not in names
        assert next(step.options["window"] for step in made.passes if step.name == "sink-row") == 16
        written = ov.Core().read_model(out / "openvino_model.xml")
        assert RECENT in {variable.get_info().variable_id for variable in written.get_variables()}
    options = ["--preset", "u4", "--residual-window", "16", "--target", "cpu"]
    assert main([str(family("qwen2")), str(tmp_path / "no"), *options]) == 2
    assert "residual-window" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["with sinks", "without"])
def test_no_residual_window_leaves_what_there_is(
    folder: str, family: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Heads stay rotated; a window out of range is refused in a line."""
    model = TINY["5.5"] if folder == "with sinks" else family("qwen2")
    plain, none = (
        ovtq.convert(model, tmp_path / str(window), preset="u8", residual_window=window, verify=False).passes
        for window in (None, 0)
    )
    assert [(x.name, x.options, x.skipped) for x in plain] == [(x.name, x.options, x.skipped) for x in none]
    assert any(x.name in ("rotate-heads", "sink-row") and not x.skipped for x in none)
    assert main([str(model), str(tmp_path / "no"), "--preset", "u8", "--residual-window", "-1"]) == 2
    assert "window must be from 0 to 4096, got -1" in capsys.readouterr().err


def test_it_refuses_what_it_cannot_keep() -> None:
    rewrite, _ = recent()
    with pytest.raises(PreconditionFailed, match="sink-row"):
        SinkRow(window=WINDOW).apply(rewrite.model, rewrite.description)
    with pytest.raises(ValueError, match="window must be from 0 to 4096, got -1"):
        SinkRow(window=-1)


@pytest.mark.parametrize(("head_dim", "width"), [(64, 76), (128, 140), (32, 44), (16, 28), (256, 264)])
def test_a_frame_leaves_room_for_the_two_rows(head_dim: int, width: int) -> None:
    assert spread_width(head_dim, head_dim + PADDING - 2) == width
