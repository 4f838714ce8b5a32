"""prune-kv: keep a budget of tokens in each full layer, chosen by a score of their keys."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import openvino as ov

from ovtq import files
from ovtq.codec.coding import BITS
from ovtq.errors import InputError, VerificationFailed
from ovtq.forms import triattention
from ovtq.forms.pruning import MODES, Pruning
from ovtq.forms.scores import SCORES
from ovtq.forms.table import TARGET, TARGETS
from ovtq.models.description import ModelDescription
from ovtq.passes.base import Pass, Rewrite, basis_option, calibration_option, centre_option, option
from ovtq.passes.full_cache import FullCache, FullCachePass
from ovtq.passes.quantize_kv import QuantizeKv

AUTO = -1  # as a slack


@dataclass(frozen=True)
class PruneKv(FullCachePass):
    """softmax over the `budget` tokens that are worth most, by a score written once, and over a call's own tokens.

    For each KV head, of the tokens older than the recent ones those of highest score stay. The first `prefix` tokens
    and the last `recent-window` always do, and all count for the budget. A call attends to what was kept before it and
    to its own tokens, all of them; what leaves is decided at its end. So a prefill in one call loses nothing in itself,
    one in chunks is pruned between them.

    `evict`: tokens leave the states, `slack` + 1 at a time, and no state ever holds more than budget + slack of them.
    `mask`: they stay and are masked; nothing is freed. `zero`: they stay, their keys and values read as 0, so that each
    is one more sink of logit 0; for comparison, not for use. The same tokens in all three.

    With `k-bits` and `v-bits` the tokens kept are packed as by quantize-kv, whose options these are; its residual
    window, if longer, takes the place of the recent window. Bytes move as they are, nothing is quantised again.

    For a CPU its form is that of quantize-kv, and tokens leave `slack` + 1 at a time. For a GPU they leave one by one:
    what is kept lies in states of one fixed length, which every step copies, or, masked, in a history appended in
    place. Refuses a slack for a GPU, and what quantize-kv refuses.
    Source: Devoto et al. (arXiv 2406.11430) for norm-low; KeyDiff (arXiv 2504.15364); TriAttention (arXiv 2604.04921),
    which needs statistics of the model's queries, the file triattention.npz in its folder or `stats`.
    """

    name: ClassVar[str] = "prune-kv"

    k_bits: str = option("none", "bits per coordinate of a key", choices=BITS)
    v_bits: str = option("none", "bits per coordinate of a value", choices=BITS)
    residual_window: int = option(0, "recent tokens kept at full precision, with bits")
    protect: str = option("", "full layers left alone: first:N, last:N or indices, separated by commas")
    centre: str = centre_option("none")
    seed: int = option(0, "seed of the rotation's random signs")
    target: str = option("gpu", "whose plugin the graph is made for", choices=TARGETS)
    budget: int = option(1024, "tokens kept in each full layer")
    recent_window: int = option(32, "last tokens that always stay")
    prefix: int = option(4, "first tokens that always stay")
    score: str = option("keydiff", "score that tokens are kept by", choices=tuple(SCORES))
    mode: str = option("evict", "what becomes of tokens that are not kept", choices=MODES)
    slack: int = option(
        AUTO, f"tokens over the budget before any leaves; {AUTO}: {TARGET['cpu'].batch} for a CPU, none for a GPU"
    )
    heads: str = option(
        "each", "whether each KV head keeps tokens of its own, or all the same", choices=("each", "shared")
    )
    score_seed: int = option(0, "seed of random scores")
    stats: str = option("", "file of tools/calibrate_triattention.py; without: triattention.npz in the model's folder")
    basis: str = basis_option()
    calibration: str = calibration_option()

    def __post_init__(self) -> None:
        if self.k_bits != "none" or self.v_bits != "none":
            if not 0 <= self.residual_window <= 4096:
                raise ValueError(f"residual-window must be from 0 to 4096, got {self.residual_window}")
        elif self.residual_window or self.centre != "none" or self.basis != "rotation":
            raise ValueError("residual-window, centre and basis are options of packed caches; give k-bits or v-bits")
        for what, value, least in (
            ("recent-window", self.recent_window, 0), ("slack", self.slack, AUTO), ("prefix", self.prefix, 0),
        ):  # fmt: skip
            if not least <= value <= 4096:
                raise ValueError(f"{what} must be from {least} to 4096, got {value}")
        if not self.window + self.prefix < self.budget <= 2**20:
            raise ValueError(
                f"budget must be from {self.window + self.prefix + 1} (the recent window, {self.window}, the prefix, "
                f"{self.prefix}, and one more) to {2**20}, got {self.budget}"
            )
        if self.stats and self.score != "triattention":
            raise ValueError(f"stats belong to the score triattention, not to {self.score}")
        if self.mode == "zero" and self.centre != "none":
            raise ValueError("mode zero needs centre none: a centred key that reads as 0 is not a key of 0")
        _ = self.packed

    @classmethod
    def packing(cls, item: QuantizeKv) -> PruneKv:
        """In place of a quantize-kv: with its options."""
        shared = {each.name for each in fields(cls)} & {each.name for each in fields(item)}
        return cls(**{name: getattr(item, name) for name in shared})

    @property
    def packed(self) -> FullCache:
        """What it gives to full layers, were nothing pruned."""
        bits = self.k_bits, self.v_bits
        return FullCache(
            bits, self.window, self.protect, self.centre, self.seed, self.target,
            basis=self.basis, calibration=self.calibration,
        )  # fmt: skip

    @property
    def cache(self) -> FullCache:
        """What it gives to full layers."""
        return replace(self.packed, pruning=self.pruning)

    @property
    def window(self) -> int:
        """Recent tokens that are neither pruned nor packed."""
        return max(self.recent_window, self.residual_window)

    @property
    def pruning(self) -> Pruning:
        """The rule in the terms of its numpy definition."""
        return Pruning(
            self.budget, self.window, self.prefix, self.score, self.mode, self.heads == "shared",
            (TARGET[self.target].batch if self.slack == AUTO else self.slack) + 1, self.score_seed,
            triattention.load(Path(self.stats)) if self.stats else None,
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        """The fields by name, but not where the statistics lay: a copy is beside the model."""
        return {**super().options, "stats": ""}

    def at(self, folder: Path) -> Pass:
        """With the statistics that lie in a model's folder, unless others are named."""
        return super(PruneKv, self._scored(folder)).at(folder)

    def _scored(self, folder: Path) -> PruneKv:
        if self.score != "triattention" or self.stats:
            return self
        path = folder / triattention.NAME
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; the score triattention needs it, or another with --stats FILE; "
                "tools/calibrate_triattention.py makes it"
            )
        return replace(self, stats=str(path))

    def leave(self, folder: Path) -> None:
        """The statistics, under the name that `at` knows."""
        super().leave(folder)
        if self.stats:
            files.copy(Path(self.stats), folder / triattention.NAME)

    def requires(self, description: ModelDescription) -> None:
        """Refuses what quantize-kv refuses, and a slack for a GPU."""
        self.refuse_if(TARGET[self.target].unfit(self.pruning))
        self.refuse_if(self.packed.unfit(description))
        if self.score == "triattention" and not self.stats:
            raise self.refuse("the score triattention needs stats, a file of tools/calibrate_triattention.py")
        found = self.pruning.statistics
        for layer in self.chosen(description):
            reason = "" if found is None else found.unfit(layer.index, layer.query_heads, layer.head_dim)
            if reason:
                raise self.refuse(f"{self.stats} {reason}; make one of this model")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each layer's states and attention; tells which statistics the scores come from."""
        sites, found = self.sites(description), self.pruning.statistics
        model, description, made = self.cache.give(model, description)
        if found is None:
            return Rewrite(model, description, sites, made)
        facts = {"sha256": files.sha256(Path(self.stats)), "tokens": int(found.tokens)}
        facts |= {"text_sha256": str(found.text_sha256), "model_sha256": str(found.model_sha256)}
        return Rewrite(model, description, sites, {**made, "statistics": facts})

    def ensures(self, rewrite: Rewrite) -> None:
        """No layer has floats in place of codes; and, evicting, no more rows of tokens than the budget and a flush."""
        if fault := self.packed.not_as_asked(rewrite.description):
            raise VerificationFailed(f"{self.name}: {fault}")
        limit = self.budget + self.pruning.flush
        pruned = {layer.index for layer in self.chosen(rewrite.description)}
        for state in rewrite.description.states if self.mode == "evict" else ():
            if pruned & {*state.layers} and state.rows(2**40) > limit:
                raise VerificationFailed(f"{self.name}: the state {state.name} grows beyond {limit} rows")
