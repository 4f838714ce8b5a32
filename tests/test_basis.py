"""Balanced heads: the algebra against brute force, moments against numpy, and every pass in a balanced basis."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, TINY, load
from test_passes import SCHEDULES, Tapped, applied
from test_quantize_kv import SCHEDULES as CHUNKS

from ovtq.cli import calibrate as command
from ovtq.cli.convert import main
from ovtq.codec import AdaptiveUniform, moments
from ovtq.codec.basis import gain
from ovtq.codec.moments import Calibration
from ovtq.codec.packed_attention import PackedAttention
from ovtq.codec.rotation import orthogonal
from ovtq.errors import InputError, PreconditionFailed
from ovtq.evidence.calibration import CALL, attended, calibrate
from ovtq.files import sha256
from ovtq.forms import bases as bases_of
from ovtq.forms.bases import Choice
from ovtq.forms.cpu.full import FLUSH
from ovtq.models import AttentionLayer, projections
from ovtq.models.attention import projected
from ovtq.models.rope import key_centre
from ovtq.models.rope import rotated as turned
from ovtq.passes import (
    CentreKeys,
    DecoupleLength,
    Pass,
    PruneKv,
    QuantizeKv,
    RotateHeads,
    SimplifyMask,
    SinkRow,
    TruncateWindow,
)
from ovtq.pipeline import PRESETS, with_basis
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.verify import TOLERANCE, compare, play

D = 64


# ------------------------------------------------------------------------------------------ statistics


@functools.cache
def calibration() -> Calibration:
    random = np.random.RandomState(0)
    return calibrate(TINY["5.5"], random.randint(0, 256, 2 * CALL + 40), random.randint(0, 256, 90))


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("stats") / moments.NAME
    calibration().save(path)
    return str(path)


def test_moments_are_those_of_the_tensors() -> None:
    """Gathered text by text, against numpy over all at once; tokens weigh what the attention's own results say."""
    ids = np.random.RandomState(0).randint(0, 256, 2 * CALL + 40)
    pieces = []
    for start in range(0, len(ids), CALL):
        model, piece = Tapped(TINY["5.5"], ()), ids[None, start : start + CALL]
        pieces.append(model.step(piece, np.ones(piece.shape, np.int64), np.zeros(1, np.int32))[1])
    for at, layer in enumerate(model.layers):
        some, inner = calibration().layers[layer.index], [piece[at] for piece in pieces]
        plain = dataclasses.replace(layer, sinks=None)  # with sinks all tokens weigh the same
        q, k = (x[0, :, :40].astype(np.float64) for x in inner[0][:2])
        np.testing.assert_allclose(attended(plain, q, k), _squared(plain, q, k), rtol=1e-6)
        weight = np.ones((layer.kv_heads, len(ids)))
        query, key, value = (np.concatenate([x[which][0] for x in inner], 1) for which in range(3))
        for which, x in (("key", key), ("value", value)):
            x = x.astype(np.float64)
            mean = np.stack([np.average(head, 0, w) for head, w in zip(x, weight, strict=True)])
            np.testing.assert_allclose(getattr(some, f"{which}_mean"), mean, atol=1e-5)
            expected = np.stack([np.cov(h.T, bias=True, aweights=w) for h, w in zip(x, weight, strict=True)])
            assert np.abs(getattr(some, f"{which}_covariance") - expected).max() < 1e-4 * np.abs(expected).max()
            about = np.einsum("htd,hte,ht->hde", x - 1, x - 1, weight) / weight.sum(1)[:, None, None]
            assert np.abs(some.about(which, np.ones_like(x[:, 0])) - about).max() < 1e-4 * np.abs(about).max()
        rows = query.reshape(layer.kv_heads, -1, layer.head_dim).astype(np.float64)
        expected = rows.swapaxes(1, 2) @ rows / rows.shape[1]
        assert np.abs(some.query - expected).max() < 1e-4 * np.abs(expected).max()


def _squared(layer: AttentionLayer, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Σ p² over the queries of each key, (kv_heads, tokens), one query after the other."""
    found = np.zeros(key.shape[:2])
    for head in range(layer.query_heads):
        kv_head = head // layer.group
        for at, q in enumerate(query[head].astype(np.float64)):
            first = 0 if layer.window is None else max(at + 1 - layer.window, 0)
            terms = np.exp(layer.scale * key[kv_head, first : at + 1] @ q)
            found[kv_head, first : at + 1] += (terms / terms.sum()) ** 2
    return found


def test_what_loses_more_than_the_plain_rotation_is_left(stats: str, tmp_path: Path) -> None:
    """By the held-out text: the balanced basis, the rotation about the mean, or the plain rotation about zero."""
    found, graph = moments.load(Path(stats)), load(TINY["5.5"])
    layer, spread, path = graph[1].full[0], orthogonal(D, 0), tmp_path / "other.npz"
    for errors, centred, balanced_ in (([3, 2, 1], True, True), ([3, 1, 2], True, False), ([1, 2, 3], False, False)):
        told = {f"{which}_errors": np.array(errors, np.float32) for which in ("key", "value")}
        layers = {at: dataclasses.replace(some, **told) for at, some in found.layers.items()}
        dataclasses.replace(found, layers=layers).save(path)
        pair = Choice("calibrated", "auto", str(path)).of(graph[0], [layer], (spread, spread))[layer.index]
        assert [basis.shared for basis in pair] == [not balanced_] * 2
        assert pair.value.centre.any() == centred
        bias = key_centre(graph[0], layer, "bias")
        np.testing.assert_array_equal(pair.key.centre, found.layers[layer.index].key_mean if centred else bias)


@pytest.mark.parametrize(("promised", "halves"), [(1.2, 0), (1.3, 0.5), (7.9, 0.5), (8.1, 1)])
def test_weights_are_followed_as_far_as_they_promise(promised: float, halves: float) -> None:
    assert bases_of.share(promised) == halves


def test_weights_that_promise_little_leave_the_rotation() -> None:
    """As of this model's keys, of whose random weights nothing is to be known."""
    graph, description = load(TINY["5.5"])
    layer, spread = description.full[0], orthogonal(D, 0)
    some = projections.moments(graph, layer)
    promised = [gain(some.about(which, 0), some.weight(which)) for which in ("key", "value")]
    assert promised[0] < bases_of.HALFWAY < promised[1] < bases_of.WHOLE
    pair = Choice("weights").of(graph, [layer], (spread, spread))[layer.index]
    assert [basis.shared for basis in pair] == [True, False]


def test_a_file_of_statistics_is_read_as_it_was_written(stats: str, tmp_path: Path) -> None:
    read = moments.load(Path(stats))
    assert (read.tokens, read.held) == (2 * CALL + 40, 90)
    assert [*read.layers] == [0, 1, 2, 3]
    assert all(x.key_errors.shape == x.value_errors.shape == (3,) for x in read.layers.values())
    bad = tmp_path / "bad.npz"
    bad.write_bytes(Path(stats).read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"bad.npz: no statistics of ovtq-calibrate"):
        moments.load(bad)
    with pytest.raises(InputError, match="no such file; ovtq-calibrate makes it"):
        moments.load(tmp_path / "none.npz")


def test_a_layer_that_loses_keeps_the_rotation() -> None:
    import dataclasses

    some = calibration().layers[1]
    for errors, pays in (([3, 2, 1], True), ([1, 2, 3], False), ([], True)):
        assert dataclasses.replace(some, key_errors=np.array(errors)).pays("key") == pays


def test_weights_tell_the_moments_of_white_input() -> None:
    """W·diag(γ²)·Wᵀ turned by RoPE over 4,096 positions, against running RoPE on its columns; and W itself."""
    model, description = load(TINY["5.5"])
    layer = description.full[0]
    H, d = layer.kv_heads, layer.head_dim
    node = projected(layer.key.source, H, d).get_node()
    bias, covariance = projections._projection(node, H, d)
    np.testing.assert_allclose(bias, layer.key_bias, rtol=1e-6)
    source = next(v.get_node() for v in node.input_values() if v.get_node().get_type_name() == "MatMul").input_value(0)
    taps = [ov.opset15.result(x) for x in (source, node.output(0))]
    runner = Runner(ov.Model(taps, model.get_sinks(), model.get_parameters()), "CPU", EXACT_PROPERTIES)
    x = runner.step(np.arange(200)[None])[0].astype(np.float64)
    keys = np.array(runner.request.get_output_tensor(1).data[0], np.float64)
    gamma = projections._norm_weight(source)
    matmul = next(v.get_node() for v in node.input_values() if v.get_node().get_type_name() == "MatMul")
    weights = projections._weights(matmul)
    assert np.abs(x @ weights.T + bias.ravel() - keys).max() < 1e-4 * np.abs(keys).max()
    expected = (weights * gamma**2 @ weights.T).reshape(H, d, H, d)[range(H), :, range(H)]
    assert np.abs(covariance - expected).max() < 1e-6 * np.abs(expected).max()

    columns = np.random.RandomState(0).standard_normal((3, H, d)).astype(np.float32)
    mean, second = columns[0], np.einsum("jhd,jhe->hde", columns[1:], columns[1:])
    got_mean, got = projections._turned(
        mean.astype(np.float64), second.astype(np.float64), projections._turn(model, layer)
    )
    moved = [turned(model, layer.key.source, node, column).astype(np.float64) for column in columns]
    assert np.abs(got_mean - moved[0].mean(1)).max() < 1e-4
    every = sum(x.swapaxes(1, 2) @ x / x.shape[1] for x in moved)
    expected = every - moved[0].mean(1)[:, :, None] * moved[0].mean(1)[:, None, :]
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------ passes

EXACT: dict[str, Callable[[str], tuple[Pass, ...]]] = {
    "rotate, calibrated": lambda stats: (RotateHeads(basis="calibrated", calibration=stats),),
    "rotate, weights": lambda stats: (RotateHeads(basis="weights", layers="full"),),
    "centre by the mean, rotate": lambda stats: (
        CentreKeys(centre="mean", sinks="move", calibration=stats),
        RotateHeads(basis="calibrated", calibration=stats),
    ),
    "sink row, calibrated": lambda stats: (
        DecoupleLength(), TruncateWindow(), SimplifyMask(), SinkRow(basis="calibrated", calibration=stats),
    ),
    "sink row, mean alone": lambda stats: (
        DecoupleLength(), TruncateWindow(), SinkRow(centre="mean", calibration=stats),
    ),
}  # fmt: skip


@pytest.mark.parametrize("passes", EXACT)
def test_logits_equal_the_original(passes: str, stats: str, tmp_path: Path) -> None:
    xml = tmp_path / "openvino_model.xml"
    rewrite = applied(TINY["5.5"], *EXACT[passes](stats))
    ov.save_model(rewrite.model, xml, compress_to_fp16=False)
    original, converted = (Runner(path, "CPU", EXACT_PROPERTIES) for path in (TINY["5.5"] / xml.name, xml))
    for seed, name in enumerate(("grow", "padded blocks", "beams")):
        for runner in (original, converted):
            runner.reset()
        expected, got = (play(runner, SCHEDULES[name], 256, seed) for runner in (original, converted))
        assert compare(expected, got, 4).relative <= TOLERANCE, name


def packed(target: str, kind: str, stats: str) -> QuantizeKv:
    return QuantizeKv(k_bits="4", v_bits="4", residual_window=16, target=target, basis=kind, calibration=stats)


@pytest.mark.parametrize(("target", "kind"), [("cpu", "calibrated"), ("gpu", "weights"), ("gpu", "calibrated")])
def test_packed_attention_equals_numpy(target: str, kind: str, stats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes but for ties, and the context, of a basis of its own for each KV head, values centred."""
    monkeypatch.setattr(bases_of, "HALFWAY", 1.0)  # random weights promise little
    item = packed(target, kind, stats if kind == "calibrated" else "")
    model = Tapped(TINY["5.5"], (DecoupleLength(), TruncateWindow(), SimplifyMask(), item))
    graph, description = load(TINY["5.5"])
    spread = orthogonal(D, 0)
    bases = Choice(kind, "auto", item.calibration).of(graph, description.full, (spread, spread))
    codecs, references = (AdaptiveUniform(4, D), AdaptiveUniform(4, D)), {}
    for layer in description.full:
        pair = bases[layer.index].key.scaled(layer.scale), bases[layer.index].value
        assert all(not basis.shared for basis in pair) or kind == "calibrated"
        assert pair[1].centre.any() == (kind == "calibrated")
        flush = FLUSH if target == "cpu" else 1
        references[layer.index] = PackedAttention(codecs, pair, layer.sinks, layer.scale, 16, flush)
    random, mask = np.random.RandomState(3), None
    for call in CHUNKS["chunks"][:-3]:
        ids = random.randint(0, 256, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        mask = shown if mask is None else np.concatenate([mask, shown], axis=1)
        _, inner, outer = model.step(ids, mask, np.arange(call.batch, dtype=np.int32))
        for layer, (q, k, v), got in zip(model.layers, inner, outer, strict=True):
            if layer.index in references:
                expected = references[layer.index].step(q, k, v, mask, np.arange(call.batch))
                # a code that rounding decides is a step away
                assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max(), (layer.index, call)
                assert np.abs(got - expected).mean() <= 1e-4 * np.abs(expected).max(), (layer.index, call)


def test_the_graph_has_the_same_nodes_in_any_basis(stats: str) -> None:
    """Balanced, but not centred by a mean, a decode step costs what it costs rotated: no node more."""

    def kinds(item: Pass) -> list[str]:
        before = (DecoupleLength(),) if isinstance(item, QuantizeKv) else ()
        return sorted(node.get_type_name() for node in applied(TINY["5.5"], *before, item).model.get_ordered_ops())

    for target in ("cpu", "gpu"):
        plain = QuantizeKv(target=target)
        other = QuantizeKv(target=target, basis="calibrated", centre="bias", calibration=stats)
        assert kinds(plain).count("MatMul") == kinds(other).count("MatMul")
        assert [x for x in kinds(plain) if x != "Constant"] == [x for x in kinds(other) if x != "Constant"]
    plain, other = RotateHeads(), RotateHeads(basis="calibrated", calibration=stats)
    assert [x for x in kinds(plain) if x != "Constant"] == [x for x in kinds(other) if x != "Constant"]


def test_centre_keys_without_sinks_is_exact() -> None:
    """A model without sinks, made of the tiny one: the exported form stays, and so do the logits."""
    runners = []
    for passes in ((), (CentreKeys(),), (CentreKeys(), RotateHeads(basis="weights"))):
        model, description = load(TINY["5.5"])
        model, description = without_sinks(model, description)
        for item in passes:
            rewrite = item.apply(model, description)
            model, description = rewrite.model, rewrite.description
            assert all(norm > 0 for some in rewrite.facts.get("centre_norms", {}).values() for norm in some)
        runners.append(Runner(model, "CPU", EXACT_PROPERTIES))
    for calls in (SCHEDULES["padding"], SCHEDULES["beams"]):
        for runner in runners:
            runner.reset()
        expected, *others = (play(runner, calls, 256, 1) for runner in runners)
        assert all(compare(expected, got, 4).relative <= TOLERANCE for got in others)


def without_sinks(model: ov.Model, description: object) -> tuple[ov.Model, object]:
    from ovtq.ir.graph import Port, redirect

    layers = {}
    for layer in description.layers:
        old = layer.context.get_node()
        new = ov.opset15.scaled_dot_product_attention(*(old.input_value(k) for k in range(5)), False)
        redirect(layer.context, new)
        cache = dataclasses.replace(layer.cache, mask=Port(new, 3))
        layers[layer.index] = dataclasses.replace(
            layer, sinks=None, query=Port(new, 0), context=new.output(0), cache=cache
        )
    model.validate_nodes_and_infer_types()
    return model, description.with_layers(layers)


def test_statistics_of_another_model_of_the_same_shape_are_refused(stats: str, tmp_path: Path) -> None:
    """By the weights: those of the model in another file, or rounded to 4 bits, are its own."""
    found, draw = moments.load(Path(stats)), np.random.RandomState(0)

    def with_outputs(change: Callable[[int, np.ndarray], np.ndarray]) -> str:
        layers = {at: dataclasses.replace(x, output=change(at, x.output)) for at, x in found.layers.items()}
        path = tmp_path / moments.NAME
        dataclasses.replace(found, layers=layers, model_sha256="0" * 64).save(path)
        return str(path)

    rounded = with_outputs(lambda at, x: x * (1 + 0.05 * draw.standard_normal(x.shape)).astype(np.float32))
    applied(TINY["5.5"], RotateHeads(basis="calibrated", calibration=rounded))
    other = with_outputs(lambda at, x: x if at < len(found.layers) - 1 else found.layers[0].output)
    for item in (RotateHeads(basis="calibrated", calibration=other), packed("cpu", "calibrated", other)):
        with pytest.raises(PreconditionFailed, match=r"is of another model, whose layer 3 projects otherwise"):
            applied(TINY["5.5"], DecoupleLength(), item)


def test_keys_are_centred_by_the_text_where_heads_are_calibrated() -> None:
    items = with_basis(PRESETS["u8"].plain["cpu"], {"basis": "calibrated", "calibration": "some.npz"})
    assert [item.choice.centred_by for item in items if isinstance(item, CentreKeys)] == ["mean"]
    assert [CentreKeys(basis=kind).choice.centred_by for kind in ("rotation", "weights")] == ["bias", "bias"]
    assert CentreKeys(basis="calibrated", centre="bias").choice.centred_by == "bias"


def test_refusals(stats: str) -> None:
    with pytest.raises(PreconditionFailed, match=r"centre-keys: layer 0 has sinks, .*sinks=move"):
        applied(TINY["5.5"], CentreKeys())
    with pytest.raises(PreconditionFailed, match=r"basis calibrated needs calibration.npz, which ovtq-calibrate makes"):
        applied(TINY["5.5"], RotateHeads(basis="calibrated"))
    with pytest.raises(PreconditionFailed, match=r"calibration.npz has nothing on layer 4, but on 0, 1, 2, 3"):
        applied(MINI, RotateHeads(basis="calibrated", calibration=stats))
    with pytest.raises(InputError, match="centre and basis are options of packed caches"):
        PruneKv.parse({"basis": "weights"})


# ------------------------------------------------------------------------------------------ commands


def test_convert_finds_the_statistics_verifies_and_records(stats: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(TINY["5.5"], tmp_path / "model"))
    options = ["--preset", "k4v4", "--target", "cpu", "--basis", "calibrated"]
    assert main([str(model), str(tmp_path / "out"), *options, "--dry-run"]) == 2  # there are none yet
    shutil.copyfile(stats, model / moments.NAME)
    assert main([str(model), str(tmp_path / "out"), *options]) == 0
    record = json.loads((tmp_path / "out" / "ovtq.json").read_text(encoding="utf-8"))
    assert record["verified"]["packed"]["relative"] <= TOLERANCE
    step = next(step for step in record["passes"] if step["name"] == "quantize-kv")
    assert step["options"]["basis"] == "calibrated"
    assert step["options"]["calibration"] == ""
    assert step["facts"]["calibration"]["sha256"] == sha256(Path(stats))
    assert sha256(tmp_path / "out" / moments.NAME) == sha256(Path(stats))


def test_calibrate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.npz"
    assert command.main([str(MINI), "--tokens", "256", "--output", str(out)]) == 0
    assert "256 tokens, 64 more to compare" in capsys.readouterr().out
    found = moments.load(out)
    assert [*found.layers] == [0, 1, 2, 3, 4, 5]
    assert all(np.isfinite(some.key_errors).all() and (some.key_errors > 0).all() for some in found.layers.values())
    assert command.main([str(MINI), "--tokens", "900k", "--output", str(out)]) == 2
    assert "tokens, " in capsys.readouterr().err
