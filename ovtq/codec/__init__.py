"""How vectors are coded, in numpy: what is right. The public names are those of TurboQuant's quantisers."""

from ovtq.codec.turboquant import (
    FLOOR,
    STEPS,
    AdaptiveUniform,
    RotatedQuantizer,
    TurboQuantMSE,
    TurboQuantProd,
    dequantize,
    distortion,
    gaussian_projection,
    qjl_decode,
    qjl_encode,
    quantize,
)

__all__ = [
    "FLOOR",
    "STEPS",
    "AdaptiveUniform",
    "RotatedQuantizer",
    "TurboQuantMSE",
    "TurboQuantProd",
    "dequantize",
    "distortion",
    "gaussian_projection",
    "qjl_decode",
    "qjl_encode",
    "quantize",
]
