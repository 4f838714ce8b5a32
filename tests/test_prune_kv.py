"""prune-kv: which tokens stay, against numpy; the attention to them, step by step; bounded states; what it refuses."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import queries
from conftest import TINY
from test_passes import Tapped, applied

from ovtq.errors import PreconditionFailed
from ovtq.forms.pruning import FIRST, VISIBLE_ABOVE, Pruning, best, counted, kept, pruned, told
from ovtq.passes import DecoupleLength, PruneKv, QuantizeKv, SimplifyMask, TruncateWindow
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.states import POSITION, PRUNED, SCORE
from ovtq.verification.packed_check import PackedCheck
from ovtq.verification.schedule import Call, overflow
from ovtq.verification.verify import TOLERANCE

EPS = float(np.finfo(np.float32).eps)
EXACT = (DecoupleLength(), TruncateWindow(), SimplifyMask())
SMALL = {"budget": 48, "recent_window": 16, "slack": 7, "target": "cpu"}

SCHEDULES = {
    "one by one": [Call(40), *[Call(1)] * 40],
    "chunks": [Call(30), Call(31), Call(1), Call(64), Call(129), Call(1), Call(1)],
    "after a reset": [Call(70), Call(1), Call(102, reset=True), Call(1), Call(53, reset=True), Call(1)],
    "padding": [Call(44, 3, pad=11), *[Call(1, 3)] * 12, Call(39, 3), Call(1, 3)],
    "beams": [Call(60), Call(1, 4, beams=(0, 0, 0, 0)), *[Call(1, 4, beams=(1, 1, 3, 0))] * 9, Call(9, 4)],
}
FORMS = {
    "evict": PruneKv(**SMALL),
    "evict, no slack": PruneKv(**SMALL | {"slack": 0}, score="keydiff"),
    "evict, nothing recent": PruneKv(**SMALL | {"recent_window": 0}, score="random"),
    "evict, shared": PruneKv(**SMALL, heads="shared", score="norm-high"),
    "evict, K6V4": PruneKv(**SMALL, k_bits="6", v_bits="4", centre="bias", score="value-norm"),
    "mask": PruneKv(**SMALL, mode="mask", score="random"),
    "mask, K6V4": PruneKv(**SMALL, mode="mask", k_bits="6", v_bits="4", centre="bias"),
    "zero": PruneKv(**SMALL, mode="zero", prefix=0),
    "evict, triattention": PruneKv(**SMALL, score="triattention"),
    "evict, shared, triattention": PruneKv(**SMALL, heads="shared", score="triattention"),
    "evict, K6V4, triattention": PruneKv(**SMALL, k_bits="6", v_bits="4", centre="bias", score="triattention"),
    "mask, triattention": PruneKv(**SMALL, mode="mask", score="triattention"),
    "zero, triattention": PruneKv(**SMALL, mode="zero", score="triattention"),
}


ONE_BY_ONE = {"budget": 48, "recent_window": 16, "target": "gpu"}
FORMS |= {
    "gpu, evict": PruneKv(**ONE_BY_ONE),
    "gpu, evict, nothing recent": PruneKv(**ONE_BY_ONE | {"recent_window": 0}, score="value-norm"),
    "gpu, evict, shared": PruneKv(**ONE_BY_ONE, heads="shared", score="norm-high"),
    "gpu, evict, K6V4": PruneKv(**ONE_BY_ONE, k_bits="6", v_bits="4", centre="bias"),
    "gpu, evict, K6V4, balanced": PruneKv(**ONE_BY_ONE, k_bits="6", v_bits="4", centre="bias", basis="weights"),
    "gpu, evict, K8": PruneKv(**ONE_BY_ONE, k_bits="8", score="norm-low"),
    "gpu, mask": PruneKv(**ONE_BY_ONE, mode="mask", score="random"),
    "gpu, mask, K6V4": PruneKv(**ONE_BY_ONE, mode="mask", k_bits="6", v_bits="4", centre="bias"),
    "gpu, zero": PruneKv(**ONE_BY_ONE, mode="zero", prefix=0),
}
WHOLE = ("evict", "gpu, evict")  # in every schedule
QUICK = {(form, "chunks") for form in ("evict, K6V4", "mask", "zero", "gpu, mask, K6V4", "gpu, zero")}
QUICK |= {("gpu, evict, K6V4, balanced", "padding"), ("gpu, mask", "after a reset")}
QUICK |= {("evict, K6V4, triattention", "padding")}


class Checked:
    """A pruned tiny model whose layers are held to numpy in every call."""

    def __init__(self, item: PruneKv) -> None:
        rewrite = applied(TINY["5.5"], *EXACT, item)
        self.check = PackedCheck(rewrite.description.layers)
        self.runner = Runner(self.check.tapped(rewrite.model), "CPU", EXACT_PROPERTIES)

    def play(self, calls: list[Call]) -> list[np.ndarray]:
        """The logits of each call; asserts nothing."""
        random, results = np.random.RandomState(3), []
        self.runner.reset()
        self.check.reset()
        self.check.largest = 0.0
        for call in calls:
            if call.reset:
                self.runner.reset()
                self.check.reset()
            ids = random.randint(0, 256, (call.batch, call.tokens)).astype(np.int64)
            shown = np.ones(ids.shape, np.int64)
            shown[1:, : call.pad] = 0
            beams = np.array(call.beams or range(call.batch), np.int32)
            results.append(np.array(self.runner.step(ids, shown, beams)))
            self.check.step(self.runner.request, shown, self.runner.mask, beams)
        return results

    def states(self) -> dict[str, np.ndarray]:
        return {state.name: np.array(state.state.data) for state in self.runner.request.query_state()}


@functools.cache
def checked(form: str) -> Checked:
    return Checked(FORMS[form].at(queries.folder()))


@pytest.mark.parametrize(
    ("form", "schedule"),
    [
        pytest.param(form, name, marks=() if form in WHOLE or (form, name) in QUICK else pytest.mark.slow)
        for form in FORMS
        for name in SCHEDULES
    ],
)
def test_attention_equals_numpy(form: str, schedule: str) -> None:
    """What numpy keeps by its own scores, and the attention to that, in every call; the graph's own count besides."""
    model = checked(form)
    model.play(SCHEDULES[schedule])
    assert 0 < model.check.largest <= 32 * EPS
    assert model.check.pruned > 0
    assert not model.check.miscounted


@pytest.mark.parametrize("tokens", [150, pytest.param(600, marks=pytest.mark.slow)])
def test_evicting_is_masking(tokens: int) -> None:
    """One by one from the 30th token on: not one is kept by the one and not by the other."""
    models = [Checked(PruneKv(**SMALL | {"slack": 0, "mode": mode})) for mode in ("evict", "mask")]
    calls = [Call(30), *[Call(1)] * (tokens - 30)]
    results = [model.play(calls) for model in models]
    for model in models:
        assert 0 < model.check.largest <= 32 * EPS  # also to numpy
    largest = max(float(np.abs(a - b).max()) for a, b in zip(*results, strict=True))
    assert largest <= TOLERANCE * max(float(np.abs(a).max()) for a in results[0])
    evicted, masked = (model.states() for model in models)
    alive = masked[SCORE][..., 0] > VISIBLE_ABOVE  # (batch, heads, tokens)
    assert alive.sum(-1).tolist() == [[32] * 4]
    assert np.array_equal(evicted[POSITION][0, :, :, 0], [np.flatnonzero(row) for row in alive[0]])


@pytest.mark.parametrize("mode", ["evict", "mask"])
def test_both_targets_keep_the_same_tokens(mode: str) -> None:
    """One by one, with no slack: the same scores, and layer 1's tokens (layer 3 is fed by what layer 1 had pruned)."""
    items = (PruneKv(**SMALL | {"slack": 0, "mode": mode}), PruneKv(**ONE_BY_ONE, mode=mode))
    models = [Checked(item) for item in items]
    results = [model.play([Call(45), *[Call(1)] * 10, Call(50), Call(1)]) for model in models]
    largest = max(float(np.abs(a - b).max()) for a, b in zip(*results, strict=True))
    assert largest <= TOLERANCE * max(float(np.abs(a).max()) for a in results[0])
    cpu, gpu = (model.states() for model in models)
    if mode == "evict":
        assert np.array_equal(cpu[POSITION], gpu[POSITION])
    else:
        older = cpu[SCORE].shape[2]
        assert older == gpu[SCORE].shape[2] - 16
        assert np.array_equal(cpu[SCORE] > VISIBLE_ABOVE, gpu[SCORE][:, :, :older] > VISIBLE_ABOVE)
    assert np.array_equal(cpu[PRUNED], gpu[PRUNED])


def test_no_state_of_the_gpu_form_ever_grows() -> None:
    """Its bytes are those of the budget from the first token on; what is not in use yet is behind no token."""
    model = checked("gpu, evict")
    model.play([Call(3)])
    shapes = {name: state.shape for name, state in model.states().items()}
    assert shapes["ovtq.1-3.key"] == (1, 4, 32, 64)
    assert (model.states()[POSITION] == -1).all()
    for tokens in range(3, 90):
        model.runner.step(np.array([[tokens]]))
        assert {name: state.shape for name, state in model.states().items()} == shapes
        went, stay = (read(model.runner.request) for read in (pruned, kept))
        assert all((went[layer] == max(tokens + 1 - 48, 0)).all() for layer in (1, 3))
        assert all((stay[layer] == min(tokens + 1, 48)).all() for layer in (1, 3))


def test_zeroing_is_not_masking() -> None:
    """The tokens are the same, what they do is not: each is a sink more."""
    models = [Checked(PruneKv(**SMALL, mode=mode)) for mode in ("mask", "zero")]
    masked, zeroed = (model.play(SCHEDULES["one by one"])[-1] for model in models)
    assert np.abs(masked - zeroed).max() > 1e-2


def test_the_text_is_cut_as_one_likes() -> None:
    """What is kept does not depend on the calls that the same tokens came in."""
    model, found = checked("evict"), []
    for sizes in ([200], [1] * 200, [50, 1, 1, 98, 50]):
        calls = [Call(size) for size in sizes]
        ids = np.random.RandomState(0).randint(0, 256, (1, 200)).astype(np.int64)
        model.runner.reset()
        start = 0
        for call in calls:
            model.runner.step(ids[:, start : start + call.tokens])
            start += call.tokens
        # only layer 1: what layer 3 is fed depends on what layer 1 had pruned by then
        found.append(model.states()[POSITION][0, :2, :, 0])
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_counts_and_bounds() -> None:
    """Pruned and kept add up to the text; the rows of the states are as many as promised and no more."""
    model = checked("evict")
    model.play([Call(20)])
    assert {layer: count.tolist() for layer, count in pruned(model.runner.request).items()} == {
        1: [[0, 0]],
        3: [[0, 0]],
    }
    rows = []
    for tokens in range(20, 140):
        model.runner.step(np.array([[tokens]]))
        went, stay = (read(model.runner.request) for read in (pruned, kept))
        assert all((went[layer] + stay[layer] == tokens + 1).all() for layer in (1, 3))
        assert max(stay[1].max(), stay[3].max()) <= 48 + 7
        rows.append(model.states()["ovtq.1.key"].shape[2])
    assert max(rows) == 32
    assert counted(model.runner.request) == {"1": [88, 52], "3": [88, 52]}
    plain = Runner(TINY["5.5"] / "openvino_model.xml", "CPU").request
    assert pruned(plain) == {}
    assert counted(plain) is None


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"1": [92, 48], "3": [92, 48]}, "92 of 140 tokens pruned, 48 kept in layers 1, 3"),
        ({"1": [0, 40], "3": [0, 40]}, "pruning never fired: all 40 tokens are still there"),
        (
            {"1": [1000, 48], "3": [0, 1048]},
            "1,000 of 1,048 tokens pruned, 48 kept in layer 1; 0 of 1,048 tokens pruned, 1,048 kept in layer 3",
        ),
    ],
)
def test_counts_are_told_in_one_line(counts: dict[str, list[int]], line: str) -> None:
    assert told(counts) == line


def test_the_prefix_and_the_recent_tokens_stay() -> None:
    model = checked("evict")
    model.play([Call(120, 2, pad=11)])
    states = model.states()
    positions, scores = states[POSITION][..., 0], states[SCORE][..., 0]
    for row, first in ((0, 0), (1, 11)):  # what is padding is not the beginning of a text
        assert (positions[row][:, :4] == range(first, first + 4)).all()
        assert (scores[row][:, :4] == FIRST).all()


@pytest.mark.parametrize(("score", "sign"), [("norm-high", 1), ("norm-low", -1)])
def test_scores_are_norms_of_keys(score: str, sign: int) -> None:
    """Of the keys that enter the exported model's attention."""
    ids = np.random.RandomState(0).randint(0, 256, (1, 90)).astype(np.int64)
    plain = Tapped(TINY["5.5"], ())
    _, inner, _ = plain.step(ids, np.ones_like(ids), np.zeros(1, np.int32))
    runner = Runner(
        applied(TINY["5.5"], *EXACT, PruneKv(**SMALL, score=score, prefix=0)).model, "CPU", EXACT_PROPERTIES
    )
    runner.step(ids)
    states = {state.name: np.array(state.state.data) for state in runner.request.query_state()}
    norms = np.linalg.norm(inner[1][1][0].astype(np.float64), axis=-1)  # layer 1's keys, (2, 90)
    older = 90 - 16 - (90 - 16) % 8
    for head in range(2):
        stay = np.sort(np.argsort(-sign * norms[head, :older])[:32])
        assert np.array_equal(states[POSITION][0, head, :, 0], stay)


def test_best_takes_the_first_of_equals() -> None:
    assert best(np.array([[3.0, 1, 3, 3, 2]]), 2).tolist() == [[True, False, True, False, False]]


def test_keydiff_is_causal() -> None:
    """A score is written once: what comes later does not change it."""
    rule = Pruning(48, 16, 0, "keydiff", "evict", False, 8)
    keys = np.random.RandomState(0).standard_normal((2, 2, 50, 64))
    shown = np.ones((2, 50))
    shown[1, :7] = 0
    whole = rule.scores(1, keys, keys, shown)
    assert np.allclose(rule.scores(1, keys[:, :, :30], keys[:, :, :30], shown[:, :30]), whole[:, :, :30], rtol=1e-12)
    alone = rule.scores(1, keys[1:, :, 7:], keys[1:, :, 7:], shown[1:, 7:])
    assert np.allclose(alone, whole[1:, :, 7:], rtol=1e-9)


def test_two_packed_caches_in_one_model_are_refused() -> None:
    """Their states would have the same names."""
    with pytest.raises(PreconditionFailed, match=r"prune-kv: the model has a state ovtq\.recent already"):
        applied(TINY["5.5"], *EXACT, QuantizeKv(protect="first:1"), PruneKv(protect="last:1"))


def test_the_calls_overfill_the_budget() -> None:
    for limit in (40, 300, 1183):
        calls = overflow(limit)
        one = calls[: next(i for i, call in enumerate(calls) if call.batch == 2)]
        assert sum(call.tokens for call in one) > limit
        assert sum(call.tokens for call in calls[len(one) :]) > limit
