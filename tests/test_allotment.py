"""Bits by layer: the choice against all others, what it is made by, and a run for that which is interrupted."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import TINY, load
from openvino import opset15 as op

from ovtq.cli.convert import main
from ovtq.codec import STEPS, AdaptiveUniform, distortion, moments
from ovtq.codec.allotment import allot, named, told
from ovtq.codec.basis import HeadBasis
from ovtq.codec.moments import PROBED, Calibration
from ovtq.codec.rotation import orthogonal
from ovtq.errors import InputError
from ovtq.evidence import probe as probing
from ovtq.evidence import unfinished
from ovtq.evidence.calibration import CALL, calibrate
from ovtq.evidence.probe import NEW, PAST, Probed, probe
from ovtq.evidence.unfinished import Unfinished
from ovtq.forms.bases import Choice
from ovtq.runtime.runner import EXACT_PROPERTIES
from ovtq.verification.recheck import recheck

IDS = np.random.RandomState(0).randint(0, 256, 2 * (PAST + NEW))
MODEL = TINY["5.5"]  # full layers 1 and 3


# ------------------------------------------------------------------------------------------ the choice


def test_distortion_is_that_of_the_codes() -> None:
    """As the docstring of AdaptiveUniform has it, and a quarter with each bit, or less where bits are few."""
    for bits, expected in ((4, 0.0092), (3, 0.0348), (2, 0.118), (5, 0.0023), (6, 0.00057), (8, 0.000035)):
        assert distortion(bits, 64) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_bits_are_fewer(seed: int) -> None:
    """Of all bits of four tensors whose prediction is within the budget none are fewer by more than the last step."""
    random = np.random.RandomState(seed)
    costs = np.exp(3 * random.standard_normal((2, 2)))
    of_bits = {bits: distortion(bits, 64) for bits in STEPS}
    totals = {
        four: sum(cost * of_bits[bits] for cost, bits in zip(costs.ravel(), four, strict=True))
        for four in itertools.product(STEPS, repeat=4)
    }
    for budget in (2e-4, 1e-2, 0.3):
        budget *= costs.sum()
        found = allot({1: tuple(costs[0]), 3: tuple(costs[1])}, 64, budget)
        four = (*found.bits[1], *found.bits[3])
        assert found.predicted <= budget
        assert found.predicted == pytest.approx(totals[four])
        least = min(sum(some) for some, total in totals.items() if total <= budget)
        assert least <= sum(four) <= least + 1, (four, budget)


def test_a_budget_that_no_bits_meet_is_refused_with_the_least() -> None:
    least = 10 * distortion(8, 64)
    assert allot({0: (4.0, 6.0)}, 64, least).bits == {0: (8, 8)}
    assert allot({0: (4.0, 6.0)}, 64, 1e9).bits == {0: (2, 2)}
    with pytest.raises(ValueError, match=f"with 8 bits everywhere a mean KLD of {least:.2g} is predicted"):
        allot({0: (4.0, 6.0)}, 64, 0.99 * least)


def test_bits_are_named_as_they_are_told() -> None:
    bits = {0: (6, 4), 12: (4, 3)}
    assert named(told(bits)) == bits
    assert named("auto") == named("") == {}


# ------------------------------------------------------------------------------------------ what it is made by


@functools.cache
def found() -> Calibration:
    return probe(MODEL, moments_of(), IDS)


@functools.cache
def moments_of() -> Calibration:
    return calibrate(MODEL, IDS[: CALL + 40], IDS[CALL + 40 : CALL + 120])


@pytest.mark.parametrize("bits", STEPS)
def test_what_is_probed_is_what_the_codec_makes(bits: int) -> None:
    random = np.random.RandomState(1)
    layer = load(MODEL)[1].full[0]
    x = random.standard_normal((1, layer.kv_heads, 40, 64)).astype(np.float32)
    matrix = random.standard_normal((layer.kv_heads, 64, 64)) / 8 + np.eye(64)
    centre = random.standard_normal((layer.kv_heads, 64)).astype(np.float32)
    basis = HeadBasis(matrix.astype(np.float32), np.linalg.inv(matrix).astype(np.float32), centre)
    some, row = op.parameter(x.shape, np.float32), op.parameter([4], np.float32)
    graph = ov.Model([probing._rounded(some.output(0), basis, layer, row)], [some, row], "probe")
    run = ov.Core().compile_model(graph, "CPU", EXACT_PROPERTIES)
    codec = AdaptiveUniform(bits, 64)
    got = run([x, np.array([1, codec.mid, *STEPS[bits]], np.float32)])[0]
    y = basis.into(x - centre[:, None])
    expected = basis.back(codec.decode(*codec.encode(y))) + centre[:, None]
    clear = ~codec.near_tie(y, 1e-5).any(-1)
    assert clear.mean() > 0.8
    np.testing.assert_allclose(got[clear], expected[clear], atol=1e-4)
    np.testing.assert_array_equal(run([x, np.array(probing.NOTHING, np.float32)])[0], x)


def test_losses_are_those_of_one_tensor_each_and_add_up() -> None:
    """Logits are those of states that numpy has rounded; with none rounded nothing is lost, with finer codes less."""
    graph, (model, description) = Probed(MODEL, found()), load(MODEL)
    graph.read(IDS[: PAST + NEW])
    assert not graph.lost({}).any()
    bases = Choice("calibrated").of(model, description.full, 2 * (orthogonal(64, 0),), known=found())
    codec, states = AdaptiveUniform(PROBED[0], 64), dict(graph.states)
    for row in range(4):
        layer, which = description.full[row // 2], row % 2
        basis, name = bases[layer.index][which], layer.paths[which].variable_id
        y = basis.into(states[name] - basis.centre[:, None])
        rounded = basis.back(codec.decode(*codec.encode(y))) + basis.centre[:, None]
        got = graph._logits({row: PROBED[0]})
        graph.states = {**states, name: rounded.astype(np.float32)}
        expected = graph._logits({})
        graph.states = states
        moved = np.abs(expected - graph.plain).max()
        assert np.median(np.abs(got - expected).max(-1)) < 1e-3 * moved  # but for ties, which move some positions
    each = {row: graph.lost({row: 4}).mean() for row in range(4)}
    assert sum(graph.lost({row: 6}).mean() for row in each) < 0.5 * sum(each.values())
    together = graph.lost(dict.fromkeys(each, 4)).mean()
    assert together == pytest.approx(sum(each.values()), rel=0.5)
    measured = np.zeros(2)
    for text in IDS.reshape(2, PAST + NEW):
        graph.read(text)
        measured += [graph.lost({1: bits}).mean() / 2 for bits in PROBED]
    np.testing.assert_allclose(found().layers[1].value_kld, measured, rtol=1e-6)
    assert not any(found().layers[index].key_kld.size for index in (0, 2))  # sliding


def test_statistics_with_and_without_losses_are_read(tmp_path: Path) -> None:
    path = tmp_path / moments.NAME
    found().save(path)
    some = moments.load(path).layers[3]
    np.testing.assert_allclose(some.value_kld, found().layers[3].value_kld, rtol=1e-6)
    expected = np.mean([kld / distortion(bits, 64) for bits, kld in zip(PROBED, some.key_kld, strict=True)])
    assert some.sensitivity("key") == pytest.approx(expected)
    moments_of().save(path)
    assert moments.load(path).layers[3].sensitivity("key") is None
    bad = {1: dataclasses.replace(found().layers[1], key_kld=np.array([-1.0, 1.0]))}
    dataclasses.replace(found(), layers=bad).save(path)
    with pytest.raises(InputError, match="damaged statistics"):
        moments.load(path)


def test_a_model_converted_by_its_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recorded, with states to match; without losses, or beside what goes not with it, one line says what to do."""
    model, out = Path(shutil.copytree(MODEL, tmp_path / "model")), tmp_path / "out"

    def convert(*options: str) -> tuple[int, str]:
        code = main([str(model), str(out), "--preset", "k4v4", "--target", "cpu", "--no-verify", *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    auto = ("--bits", "auto", "--budget-kld")
    moments_of().save(model / moments.NAME)
    code, said = convert(*auto, "1e-3")
    assert code == 2
    assert "does not say what layer 1 loses; run ovtq-calibrate --sensitivity MODEL_DIR" in said
    found().save(model / moments.NAME)
    (model / (moments.NAME + moments.PART)).write_bytes(b"of a run that was ended")
    for options, message in (
        ((*auto, "1e-12"), "with 8 bits everywhere a mean KLD of"),
        (("--bits", "auto"), "bits auto and budget-kld, a number of nats above 0, go together"),
        ((*auto, "1e-3", "--basis", "rotation"), "needs the basis calibrated"),
        ((*auto, "1e-3", "--budget", "512"), "--budget and --bits don't go together"),
    ):
        code, said = convert(*options)
        assert code == 2
        assert message in said, said
    least = allot({at: sensitivities(at) for at in (1, 3)}, 64, 1.0)  # what two bits lose
    budget = least.predicted / 6
    code, said = convert(*auto, f"{budget:.6g}")
    assert code == 0, said
    record = json.loads((out / "ovtq.json").read_text(encoding="utf-8"))
    facts = next(step["facts"] for step in record["passes"] if step["name"] == "quantize-kv")
    expected = allot({at: sensitivities(at) for at in (1, 3)}, 64, float(f"{budget:.6g}"))
    assert facts["bits"] == {str(at): list(pair) for at, pair in expected.bits.items()}
    assert facts["predicted_kld"] == pytest.approx(expected.predicted)
    assert f"predicted mean KLD {expected.predicted:.2g}" in said
    assert len({tuple(pair) for pair in expected.bits.values()}) > 1
    shapes = {state["name"]: state["shape"][-1] for state in record["states"]}
    for at, (key, value) in expected.bits.items():
        assert (shapes[f"ovtq.{at}.key"], shapes[f"ovtq.{at}.value"]) == (8 * key, 8 * value)
    assert not (out / (moments.NAME + moments.PART)).exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_it_verifies_and_can_be_verified_again(target: str, tmp_path: Path) -> None:
    model, out = Path(shutil.copytree(MODEL, tmp_path / "model")), tmp_path / "out"
    found().save(model / moments.NAME)
    budget = f"{allot({at: sensitivities(at) for at in (1, 3)}, 64, 1.0).predicted / 6:.6g}"
    assert (
        main([str(model), str(out), "--preset", "k4v4", "--target", target, "--bits", "auto", "--budget-kld", budget])
        == 0
    )
    assert recheck(model, out, "CPU").packed


def sensitivities(layer: int) -> tuple[float, float]:
    some = found().layers[layer]
    some = dataclasses.replace(
        some, **{f"{what}_kld": np.float32(getattr(some, f"{what}_kld")) for what in ("key", "value")}
    )
    key, value = (some.sensitivity(which) for which in ("key", "value"))
    assert key is not None
    assert value is not None
    return key, value


# ------------------------------------------------------------------------------------------ interrupted


def ended(after: int) -> Callable[[], None]:
    count = itertools.count(1)

    def tick() -> None:
        if next(count) == after:
            raise KeyboardInterrupt

    return tick


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended in two stages; what it then has read is not read again, and the file is the same, byte for byte."""
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    result, read, whole = tmp_path / "some.npz", [], tmp_path / "whole.npz"
    step = probing.Runner.step
    monkeypatch.setattr(probing.Runner, "step", lambda self, ids: read.append(ids.shape[1]) or step(self, ids))
    ids, held, text = IDS[: CALL + 40], IDS[CALL + 40 : CALL + 120], IDS[: PAST + NEW]

    def run(tick: Callable[[], None], kept: Unfinished) -> Calibration:
        read.clear()
        return probe(MODEL, calibrate(MODEL, ids, held, tick=tick, unfinished=kept), text, tick=tick, unfinished=kept)

    for after in (1, 7):  # of two texts, one that is compared, and of one without codes and eight with
        with pytest.raises(KeyboardInterrupt):
            run(ended(after), Unfinished(result, "a key"))
        assert not result.exists()
    run(lambda: None, kept := Unfinished(result, "a key")).save(result)
    assert len(read) == 2 + 8 - 3  # its text, and once without codes; three of the probes were there, and all moments
    kept.forget()
    assert not (tmp_path / "some.npz.part").exists()
    run(lambda: None, Unfinished()).save(whole)
    assert len(read) == 2 + 1 + 2 + 8
    assert result.read_bytes() == whole.read_bytes()


def test_what_another_run_left_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "some.npz"
    kept = Unfinished(result, "one")
    kept.keep("sums", {"done": 3}, now=True)
    assert Unfinished(result, "one").taken("sums") == {"done": 3}
    assert Unfinished(result, "another").taken("sums") is None
    assert Unfinished().taken("sums") is None
    with pytest.raises(InputError, match="no statistics of ovtq-calibrate"):
        moments.load(kept.path)  # a part is never taken for a whole
    kept.forget()
    moments_of().save(kept.path)
    with pytest.raises(InputError, match=r"some.npz.part: no unfinished statistics of ovtq-calibrate"):
        Unfinished(result, "one")
