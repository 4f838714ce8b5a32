"""The score triattention: the paper's formula by hand, the statistics against the queries themselves, the command."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import queries
from conftest import MINI, ROOT, TINY, load
from test_passes import Tapped, applied
from test_prune_commands import FLAGS
from test_prune_kv import EXACT, SMALL

from ovtq.cli.convert import main
from ovtq.codec import moments
from ovtq.errors import InputError, PreconditionFailed, UnsupportedModel, VerificationFailed
from ovtq.files import sha256
from ovtq.forms.pruning import VISIBLE_ABOVE
from ovtq.forms.triattention import NAME, Statistics
from ovtq.forms.triattention import load as load_statistics
from ovtq.ir import io
from ovtq.models.rope import frequencies
from ovtq.passes import PruneKv, RotateHeads
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.states import SCORE
from ovtq.verification.recheck import passes_of, recheck

sys.path.insert(0, str(ROOT / "tools"))
import calibrate_triattention as tool


def turned(x: np.ndarray, position: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """RoPE of x (…, d) at positions (…), as Llama and GPT-OSS write it."""
    cos, sin = (f(np.asarray(position)[..., None] * omega) for f in (np.cos, np.sin))
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def yarn(d: int = 64) -> tuple[np.ndarray, float]:
    """GPT-OSS's frequencies, and what it multiplies cos and sin with: YaRN ×32 over 4,096, arXiv 2309.00071."""
    theta, factor, length, fast, slow = 150000.0, 32.0, 4096, 32.0, 1.0
    plain = theta ** -(np.arange(0, d, 2) / d)
    low, high = (d * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta)) for turns in (fast, slow))
    ramp = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), 0.1 * np.log(factor) + 1


def test_frequencies_are_yarns(tiny: Path) -> None:
    model, description = load(tiny)
    layer = description.full[0]
    assert np.allclose(frequencies(model, layer.key.source, layer.kv_heads, layer.head_dim), yarn()[0], rtol=1e-6)
    assert np.array_equal(
        frequencies(model, layer.key.source, layer.kv_heads, layer.head_dim),
        frequencies(model, description.full[1].key.source, layer.kv_heads, layer.head_dim),
    )


def test_other_pairs_are_refused() -> None:
    rotated = applied(TINY["5.5"], *EXACT[:2], RotateHeads(tensors="qk"))
    layer = rotated.description.full[0]
    with pytest.raises(UnsupportedModel, match="does not turn coordinates f and f"):
        frequencies(rotated.model, layer.key.source, layer.kv_heads, layer.head_dim)


@pytest.fixture(scope="module")
def taken() -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Queries and keys before RoPE of each full layer of the tiny model over the same text, (windows, heads, n, d).

    Taken where they enter the attention, and turned back by what YaRN says.
    """
    found: tuple[dict, dict] = ({}, {})
    plain, (omega, factor) = Tapped(TINY["5.5"], ()), yarn()
    for window in queries.ids():
        plain.request.reset_state()
        _, inner, _ = plain.step(window[None], np.ones((1, len(window)), np.int64), np.zeros(1, np.int32))
        for side, where in zip((0, 1), found, strict=True):
            for layer in (1, 3):
                straight = turned(inner[layer][side].astype(np.float64), -np.arange(len(window)), omega) / factor
                where.setdefault(layer, []).append(straight[0])
    return tuple({layer: np.stack(some) for layer, some in side.items()} for side in found)


def test_statistics_are_those_of_the_queries(taken: tuple[dict[int, np.ndarray], dict[int, np.ndarray]]) -> None:
    found = queries.of()
    assert found.layers.tolist() == [1, 3]
    assert int(found.tokens) == queries.ids().size
    for at, layer in enumerate((1, 3)):
        pairs = taken[0][layer][..., :32] + 1j * taken[0][layer][..., 32:]
        largest = np.abs(pairs).max()
        assert np.abs(found.mean_query[at] - pairs.mean((0, 2))).max() < 1e-4 * largest
        assert np.abs(found.mean_length[at] - np.abs(pairs).mean((0, 2))).max() < 1e-4 * largest


def by_hand(found: Statistics, layer: int, keys: np.ndarray) -> np.ndarray:
    """S of one key (d,) by the paper's sum, with vectors that are turned: (query_heads of its KV head,)."""
    at, position = found.layers.tolist().index(layer), 1000
    group, scores = range(2), []
    for head in group:
        mean = np.concatenate([found.mean_query[at, head].real, found.mean_query[at, head].imag])
        rest = (found.mean_length[at, head] - np.abs(found.mean_query[at, head])) @ np.hypot(keys[:32], keys[32:])
        key = turned(keys, position, found.frequencies)
        dots = [turned(mean, position + delta, found.frequencies) @ key for delta in 2 ** np.arange(17)]
        scores.append(np.mean(dots) + rest)
    return np.array(scores)


def test_scores_are_the_papers_sum() -> None:
    """A query as usual, turned to 1, 2, 4, … 65,536 tokens behind the turned key; then z-scores, then the highest."""
    found, keys = queries.of(), np.random.RandomState(0).standard_normal((1, 2, 20, 64))
    for layer in (1, 3):
        at = found.layers.tolist().index(layer)
        got = found.scores(layer, keys)[0, 0]
        raw = np.stack([by_hand(found, layer, key) for key in keys[0, 0]])
        expected = ((raw - found.score_mean[at, :2]) / found.score_deviation[at, :2]).max(1)
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_scores_are_standardised(taken: tuple[dict[int, np.ndarray], dict[int, np.ndarray]]) -> None:
    """Over the text that they come from each query head's scores have mean 0 and deviation 1."""
    found = queries.of()
    for at, layer in enumerate((1, 3)):
        for head in range(2):
            alone = replace(
                found,
                mean_query=np.repeat(found.mean_query[:, [head, head + 2]], 2, 1),
                mean_length=np.repeat(found.mean_length[:, [head, head + 2]], 2, 1),
                score_mean=np.repeat(found.score_mean[:, [head, head + 2]], 2, 1),
                score_deviation=np.repeat(found.score_deviation[:, [head, head + 2]], 2, 1),
            )
            z = alone.scores(layer, taken[1][layer])
            assert np.abs(z.mean((0, 2))).max() < 1e-3, at
            assert np.abs(z.std((0, 2)) - 1).max() < 1e-3


def test_the_product_is_the_same() -> None:
    found, keys = queries.of(), np.random.RandomState(0).standard_normal((2, 2, 9, 64))
    factors, offsets = found.product(3, 2)
    parts = np.concatenate([keys, np.hypot(keys[..., :32], keys[..., 32:])], -1)
    z = np.einsum("bhti,hig->bhtg", parts, factors) + offsets[:, None]
    assert np.allclose(z.max(-1), found.scores(3, keys), rtol=1e-12)


def test_the_graph_keeps_what_scores_most(taken: tuple[dict[int, np.ndarray], dict[int, np.ndarray]]) -> None:
    """By the keys that enter the exported model's attention, turned back."""
    ids = queries.ids()[:1, :200]
    item = PruneKv(**SMALL, score="triattention", prefix=0, mode="mask").at(queries.folder())
    runner = Runner(applied(TINY["5.5"], *EXACT, item).model, "CPU", EXACT_PROPERTIES)
    runner.step(ids)
    states = {state.name: np.array(state.state.data) for state in runner.request.query_state()}
    expected = item.pruning.statistics.scores(1, taken[1][1][:1, :, :200])
    older = item.pruning.older(200)
    expected = expected[0, :, :older]
    kept = states[SCORE][0, :2, :, 0] > VISIBLE_ABOVE  # layer 1 has the first two heads
    assert kept.sum(1).tolist() == [32, 32]
    for head in range(2):
        edge = np.sort(expected[head])[-32]
        assert (expected[head][kept[head]] > edge - 1e-3).all()
        assert (expected[head][~kept[head]] < edge + 1e-3).all()


# ------------------------------------------------------------------------------------------ the command

TRI = [*FLAGS, "--score", "triattention"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triattention") / "out"
    assert main([str(TINY["5.5"]), str(out), *TRI, "--stats", str(queries.folder() / NAME)]) == 0
    return out


def test_converting_takes_the_statistics_along(converted: Path) -> None:
    record = json.loads((converted / io.RECORD).read_text())
    step = next(step for step in record["passes"] if step["name"] == "prune-kv")
    assert step["options"]["stats"] == ""
    assert step["facts"]["statistics"]["sha256"] == sha256(converted / NAME) == sha256(queries.folder() / NAME)
    assert step["facts"]["statistics"]["tokens"] == 1200
    assert record["verified"]["packed"]["pruned"] > 48


def test_statistics_of_another_kind_beside_it_are_not_taken_for_its_own(converted: Path, tmp_path: Path) -> None:
    """Those of ovtq-calibrate, in the model's folder or in its own."""
    model, copy = (Path(shutil.copytree(some, tmp_path / some.name)) for some in (TINY["5.5"], converted))
    (model / moments.NAME).write_bytes(b"of a text")
    (copy / moments.NAME).write_bytes(b"of another")
    for folder, others in ((converted, (model,)), (copy, ())):
        assert [item.score for item in passes_of(folder, *others) if isinstance(item, PruneKv)] == ["triattention"]


@pytest.mark.slow
def test_other_statistics_beside_it_are_found_out(converted: Path, tmp_path: Path) -> None:
    assert recheck(TINY["5.5"], converted, "CPU").packed.pruned > 48
    shutil.copytree(converted, tmp_path / "model")
    found = queries.of()
    replace(found, mean_query=found.mean_query[:, ::-1]).save(tmp_path / "model" / NAME)
    with pytest.raises(VerificationFailed, match="away from what numpy computes"):
        recheck(TINY["5.5"], tmp_path / "model", "CPU")


def test_the_models_own_statistics_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "k6v4", "--target", "cpu", "--budget", "256", "--score", "triattention"]
    assert main([str(MINI), "--dry-run", *flags]) == 0
    found = load_statistics(MINI / NAME)
    assert str(found.model_sha256) == sha256(MINI / "openvino_model.xml")
    assert found.layers.tolist() == [1, 3, 5]
    assert np.array_equal(found.distances, 2 ** np.arange(17))
    # queries are concentrated, which is what the score lives by
    assert np.abs(found.mean_query).sum() > 0.7 * found.mean_length.sum()


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = queries.of()
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "later.npz", form=9)
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    found.save(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    replace(found, layers=np.array([1, 5])).save(tmp_path / "layers.npz")
    replace(found, mean_length=found.mean_length[:, :3]).save(tmp_path / "damaged.npz")
    replace(found, score_deviation=0 * found.score_deviation).save(tmp_path / "flat.npz")
    for name, message in {
        "": f"{TINY['5.5'] / NAME}: no such file; the score triattention needs it, or another with --stats FILE",
        "none.npz": "none.npz: no such file; tools/calibrate_triattention.py makes it",
        "text.npz": "text.npz: no statistics of tools/calibrate_triattention.py",
        "other.npz": "other.npz: no statistics of tools/calibrate_triattention.py",
        "array.npz.npy": "array.npz.npy: no statistics of tools/calibrate_triattention.py",
        "cut.npz": "cut.npz: no statistics of tools/calibrate_triattention.py",
        "later.npz": "later.npz: statistics in form 9, this ovtq reads 1; make them anew",
        "layers.npz": "layers.npz has nothing on layer 3, but on 1, 5; make one of this model",
        "damaged.npz": "damaged.npz: damaged statistics; make them anew",
        "flat.npz": "flat.npz: damaged statistics; make them anew",
        str(MINI / NAME): "triattention.npz is of 16 query heads of 64, layer 1 has 4 of 64; make one of this model",
    }.items():
        flags = ["--stats", str(tmp_path / name)] if name else []
        assert main([str(TINY["5.5"]), "--dry-run", *TRI, *flags]) == 2, name
        error = capsys.readouterr().err
        assert message in " ".join(error.split())
        assert error.count("\n") == 1
    assert main([str(TINY["5.5"]), "--dry-run", *FLAGS, "--stats", str(MINI / NAME)]) == 2
    assert "stats belong to the score triattention, not to keydiff" in capsys.readouterr().err
    with pytest.raises(PreconditionFailed, match="needs stats, a file of"):
        applied(TINY["5.5"], *EXACT, PruneKv(**SMALL, score="triattention"))


def test_calibrating_from_a_text(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino_genai", reason="needs the extra [eval]")
    text = ROOT / "tests" / "data" / "heldout.txt"

    def calibrated(*options: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["calibrate_triattention", *map(str, options)])
        return tool.main()

    short = ["--windows", "2", "--window", "64"]
    for name in ("a.npz", "b.npz"):
        assert calibrated(MINI, text, tmp_path / name, *short) == 0
    assert "128 tokens, layers 1, 3, 5" in capsys.readouterr().out
    assert sha256(tmp_path / "a.npz") == sha256(tmp_path / "b.npz")
    assert calibrated(MINI, text, tmp_path / "c.npz", *short, "--seed", "1") == 0
    assert sha256(tmp_path / "a.npz") != sha256(tmp_path / "c.npz")
    for options, message in (
        ([MINI, text, tmp_path / "a.txt"], "name it ….npz"),
        ([MINI, text, tmp_path / "a.npz", "--windows", "99"], "are needed; give a longer text or fewer --windows"),
        ([MINI, tmp_path / "none", tmp_path / "a.npz"], "No such file"),
    ):
        assert calibrated(*options) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split())
        assert error.count("\n") == 1
    with pytest.raises(InputError, match="already converted; calibrate with the original"):
        tool.calibrate(converted, queries.ids())
