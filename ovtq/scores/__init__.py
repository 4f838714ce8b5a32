"""Scores that tokens are kept by, one a file; `SCORES` maps their command-line names to their classes."""

from ovtq.scores.base import Arriving, Score, Tokens
from ovtq.scores.keydiff import KeyDiff
from ovtq.scores.norm_high import NormHigh
from ovtq.scores.norm_low import NormLow
from ovtq.scores.random import Random
from ovtq.scores.triattention import TriAttention
from ovtq.scores.value_norm import ValueNorm

SCORES: dict[str, type[Score]] = {
    cls.name: cls for cls in (NormHigh, NormLow, KeyDiff, ValueNorm, TriAttention, Random)
}

__all__ = ["SCORES", "Arriving", "Score", "Tokens"]
