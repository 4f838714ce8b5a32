"""Codes packed into bytes, to be unpacked by arithmetic on whole bytes and one linear map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

OFFSET = 128  # stored as i8: the in-place KV cache of OpenVINO's GPU plugin knows i8, f16 and f32, not u8

# Of a vector of d codes, in eighths of d: (first byte, bytes, shift and width in the byte, first code, its lowest bit).
# Whole codes fill the low bits of every byte; what room is left above them takes the other codes, in pieces.
_FIELDS: dict[int, tuple[tuple[int, int, int, int, int, int], ...]] = {
    1: tuple((0, 1, k, 1, k, 0) for k in range(8)),
    2: tuple((0, 2, 2 * k, 2, 2 * k, 0) for k in range(4)),
    3: ((0, 3, 0, 3, 0, 0), (0, 3, 3, 3, 3, 0), (0, 2, 6, 2, 6, 0), (2, 1, 6, 1, 6, 2), (2, 1, 7, 1, 7, 2)),
    4: ((0, 4, 0, 4, 0, 0), (0, 4, 4, 4, 4, 0)),
    5: ((0, 5, 0, 5, 0, 0), (0, 3, 5, 3, 5, 2), (3, 2, 5, 2, 5, 0), (3, 1, 7, 1, 7, 0), (4, 1, 7, 1, 7, 1)),
    6: ((0, 6, 0, 6, 0, 0), (0, 2, 6, 2, 6, 0), (2, 2, 6, 2, 6, 2), (4, 2, 6, 2, 6, 4)),
    7: ((0, 7, 0, 7, 0, 0), *((k, 1, 7, 1, 7, k) for k in range(7))),
    8: ((0, 8, 0, 8, 0, 0),),
}


@dataclass(frozen=True)
class Field:
    """Bits `shift` … `shift + width − 1` of the bytes `first` … `first + count − 1`.

    In byte first + j they hold the bits from `low` on of code `code + j`.
    """

    first: int
    count: int
    shift: int
    width: int
    code: int
    low: int


@dataclass(frozen=True)
class Layout:
    """Where the bits of head_dim codes stand in head_dim·bits/8 bytes. Make one with `layout`."""

    bits: int
    head_dim: int
    fields: tuple[Field, ...]

    @property
    def bytes(self) -> int:
        """Bytes of a packed vector."""
        return self.head_dim * self.bits // 8

    @cached_property
    def groups(self) -> tuple[Field, ...]:
        """The fields, those of neighbouring bytes with one shift and width taken together: what one formula reads."""
        merged: list[Field] = []
        for field in self.fields:
            last = merged[-1] if merged else None
            if last and (last.shift, last.width, last.first + last.count) == (field.shift, field.width, field.first):
                merged[-1] = Field(last.first, last.count + field.count, last.shift, last.width, last.code, last.low)
            else:
                merged.append(field)
        return tuple(merged)

    @cached_property
    def decode(self) -> np.ndarray:
        """D, (features, head_dim) f32: codes = features @ D, features being all groups' values side by side.

        Of 6-bit codes the features are 48 whole codes and 48 pieces of 2 bits, three of which make one of the last 16.
        """
        rows = [(field.code + j, field.low) for field in self.fields for j in range(field.count)]
        matrix = np.zeros((len(rows), self.head_dim), np.float32)
        for feature, (code, low) in enumerate(rows):
            matrix[feature, code] = 2**low
        return matrix


@cache
def layout(bits: int, head_dim: int) -> Layout:
    """The layout of `head_dim` codes of `bits` bits.

    Raises ValueError unless bits (bits per code) is 1 … 8 and head_dim divides by 8 (by 4 for 6 bits, 2 for 4, …),
    so that every field fills whole bytes.
    """
    unit = _unit(bits)
    if head_dim < 1 or head_dim % unit:
        raise ValueError(f"{bits}-bit codes need a head_dim divisible by {unit}, got {head_dim}")
    fields = (
        Field(first * head_dim // 8, count * head_dim // 8, shift, width, code * head_dim // 8, low)
        for first, count, shift, width, code, low in _FIELDS[bits]
    )
    return Layout(bits, head_dim, tuple(fields))


def _unit(bits: int) -> int:
    """What a head_dim must divide by: the fields are given in eighths of it."""
    if bits not in _FIELDS:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    return 8 // int(np.gcd.reduce([8, *(eighths for f in _FIELDS[bits] for eighths in (f[0], f[1], f[4]))]))


def packed_bytes(bits: int, head_dim: int) -> int:
    """Bytes of a packed vector, head_dim·bits/8 exactly. Raises ValueError as `layout` does."""
    return layout(bits, head_dim).bytes


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """byte = Σ field·2^shift − 128, as `layout` tells: (…, d) → (…, d·bits/8) i8.

    Codes are integers below 2^bits (TypeError, ValueError); d as for `layout`.
    """
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    where = layout(bits, codes.shape[-1])
    if codes.size and not 0 <= codes.min() <= codes.max() < 2**bits:
        raise ValueError(f"{bits}-bit codes must be 0 to {2**bits - 1}, got {codes.min()} to {codes.max()}")
    codes = codes.astype(np.int32)
    packed = np.zeros((*codes.shape[:-1], where.bytes), np.int32)
    for f in where.fields:
        piece = codes[..., f.code : f.code + f.count] >> f.low & (1 << f.width) - 1
        packed[..., f.first : f.first + f.count] += piece << f.shift
    return (packed - OFFSET).astype(np.int8)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: (…, d·bits/8) i8 → (…, d) u8.

    Raises TypeError if `packed` is not i8, ValueError if its length is not that of a packed vector.
    """
    packed = np.asarray(packed)
    if packed.dtype != np.int8:
        raise TypeError(f"packed codes must be int8, got {packed.dtype}")
    unit = _unit(bits)
    head_dim, left = divmod(packed.shape[-1] * 8, bits)
    if left or not head_dim or head_dim % unit:
        raise ValueError(f"{packed.shape[-1]} bytes are no packed vector of {bits}-bit codes")
    where = layout(bits, head_dim)
    raw = packed.astype(np.int32) + OFFSET
    features = [raw[..., g.first : g.first + g.count] >> g.shift & (1 << g.width) - 1 for g in where.groups]
    return (np.concatenate(features, axis=-1) @ where.decode.astype(np.int32)).astype(np.uint8)
