"""Scores that tokens are kept by, one a file; `SCORES` maps their command-line names to their classes."""

from ovtq.forms.scores.base import Arriving, Score, Tokens
from ovtq.forms.scores.keydiff import KeyDiff
from ovtq.forms.scores.norm_high import NormHigh
from ovtq.forms.scores.norm_low import NormLow
from ovtq.forms.scores.random import Random
from ovtq.forms.scores.triattention import TriAttention
from ovtq.forms.scores.value_norm import ValueNorm

SCORES: dict[str, type[Score]] = {
    cls.name: cls for cls in (NormHigh, NormLow, KeyDiff, ValueNorm, TriAttention, Random)
}

__all__ = ["SCORES", "Arriving", "Score", "Tokens"]
