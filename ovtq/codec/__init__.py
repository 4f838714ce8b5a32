"""How vectors are coded, in numpy: what is right. The public names are those of TurboQuant's quantiser."""

from ovtq.codec.turboquant import FLOOR, STEPS, AdaptiveUniform, TurboQuantMSE

__all__ = ["FLOOR", "STEPS", "AdaptiveUniform", "TurboQuantMSE"]
