"""Codes packed into bytes, to be unpacked by arithmetic on whole slices."""

from __future__ import annotations

import numpy as np

WIDTHS = (8, 4, 2, 1)  # of planes: those that divide a byte
OFFSET = 128  # stored as i8: the in-place KV cache of OpenVINO's GPU plugin knows i8, f16 and f32, not u8


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes that codes are cut into, from the low bits up: 6 → (4, 2), 3 → (2, 1), 4 → (4,).

    Raises ValueError unless bits (bits per code) is 1 … 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    return tuple(width for width in WIDTHS if bits & width)


def packed_bytes(bits: int, head_dim: int) -> int:
    """Bytes of a packed vector, head_dim·bits/8 exactly.

    Raises ValueError if head_dim does not fill the bytes of each plane: it must divide by 8 over the narrowest width.
    """
    codes_a_byte = 8 // min(planes(bits))
    if head_dim < 1 or head_dim % codes_a_byte:
        raise ValueError(f"{bits}-bit codes need a head_dim divisible by {codes_a_byte}, got {head_dim}")
    return head_dim * bits // 8


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """byte_j = Σ_k plane[j + k·d·w/8]·2^(w·k) − 128, planes of w bits side by side: (…, d) → (…, d·bits/8) i8.

    A plane of w bits cuts the d codes into 8/w contiguous slices and lays them over each other: of 4-bit codes, byte j
    is code[j] + 16·code[j + d/2], of 2-bit codes it is made of four quarters. No code is moved within its slice, so
    the inverse is a floor division and a subtraction for each slice and one Concat. Codes are integers below 2^bits
    (TypeError, ValueError); d as for `packed_bytes`.
    """
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    packed_bytes(bits, codes.shape[-1])
    if codes.size and not 0 <= codes.min() <= codes.max() < 2**bits:
        raise ValueError(f"{bits}-bit codes must be 0 to {2**bits - 1}, got {codes.min()} to {codes.max()}")
    rest, packed = codes.astype(np.int32), []
    for width in planes(bits):
        slices = np.split(rest % 2**width, 8 // width, axis=-1)
        packed.append(sum(part * 2 ** (width * k) for k, part in enumerate(slices)))
        rest = rest // 2**width
    return (np.concatenate(packed, axis=-1) - OFFSET).astype(np.int8)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: (…, d·bits/8) i8 → (…, d) u8.

    Raises TypeError if `packed` is not i8, ValueError if its length is not that of a packed vector.
    """
    packed = np.asarray(packed)
    if packed.dtype != np.int8:
        raise TypeError(f"packed codes must be int8, got {packed.dtype}")
    widths, length = planes(bits), packed.shape[-1]
    head_dim, left = divmod(length * 8, bits)
    if left or not length or head_dim % (8 // min(widths)):
        raise ValueError(f"{length} bytes are no packed vector of {bits}-bit codes")
    rest, codes, low = packed.astype(np.int32) + OFFSET, np.zeros((*packed.shape[:-1], head_dim), np.int32), 0
    for width in widths:
        plane, rest = np.split(rest, [head_dim * width // 8], axis=-1)
        slices = [plane // 2 ** (width * k) % 2**width for k in range(8 // width)]
        codes += np.concatenate(slices, axis=-1) * 2**low
        low += width
    return codes.astype(np.uint8)
