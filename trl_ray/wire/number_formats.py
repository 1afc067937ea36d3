"""float32 as 16 bits and back, in NumPy, at the speed of memory.

float32 [..] --to_bits--> uint16 [..] --from_bits--> float32 [..]        of float16 or bfloat16

NumPy converts float16 element by element in software and has no bfloat16; integer arithmetic on whole blocks is several
times faster. Rounding is to nearest, ties to even, but what is finite stays finite: it saturates.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.teacher_options import PayloadDtype
from trl_ray.types import FloatArray

Bits: TypeAlias = NDArray[np.uint16]
_Words: TypeAlias = NDArray[np.uint32]

_BLOCK = 65536
"""Numbers converted together, so that what lies between two steps stays in the cache."""
_INFINITY = 0x7F80_0000
_HALF_MAX = 0x477F_E000
"""65504 as float32."""
_HALF_MIN_NORMAL = 0x3880_0000
"""2^-14 as float32."""
_BRAIN_MAX_BITS = 0x7F7F_7FFF
_BRAIN_MAX = np.array(_BRAIN_MAX_BITS, dtype=np.uint32).view(np.float32)[()]
"""The largest float32 that bfloat16 does not round to infinity."""
_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""[65536] every float16."""


def to_bits(values: FloatArray, dtype: PayloadDtype) -> Bits:
    """Round to 16 bits.

    Args:
        values: any shape; NaN stays NaN, infinity stays infinity, everything else stays finite.
        dtype: float16 or bfloat16.
    """
    assert dtype is not PayloadDtype.FLOAT32, "float32 is no 16-bit format"
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    convert = _half_bits if dtype is PayloadDtype.FLOAT16 else _brain_bits
    bits = np.empty(flat.shape, dtype=np.uint16)
    for start in range(0, len(flat), _BLOCK):
        bits[start : start + _BLOCK] = convert(flat[start : start + _BLOCK])
    return bits.reshape(values.shape)


def from_bits(bits: Bits, dtype: PayloadDtype) -> FloatArray:
    """Exactly the numbers that the bits stand for; any shape."""
    assert dtype is not PayloadDtype.FLOAT32, "float32 is no 16-bit format"
    if dtype is PayloadDtype.FLOAT16:
        return np.take(_HALVES, bits)
    words = bits.astype(np.uint32)
    words <<= np.uint32(16)
    return words.view(np.float32)


def _half_bits(words: _Words) -> _Words:
    """float16 has 5 exponent bits (bias 15) and 10 of mantissa; below 2^-14 its steps are all 2^-24."""
    size = words & np.uint32(0x7FFF_FFFF)
    half = _round_off(size, 13, less=(127 - 15) << 23)
    small = np.flatnonzero(size < _HALF_MIN_NORMAL)
    if len(small):
        # Steps of float32 between 0.5 and 1 are 2^-24, so that adding 0.5 rounds as float16 does there.
        half[small] = (size[small].view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F00_0000)
    if size.max(initial=0) > _HALF_MAX:
        _saturate(half, size, beyond=_HALF_MAX, largest=0x7BFF, infinity=0x7C00)
    half |= (words >> np.uint32(16)) & np.uint32(0x8000)
    return half


def _brain_bits(words: _Words) -> _Words:
    """bfloat16 is the upper half of float32."""
    brain = _round_off(words, 16, less=0)
    values = words.view(np.float32)
    # False for NaN, too.
    if not (values.max(initial=0) <= _BRAIN_MAX and values.min(initial=0) >= -_BRAIN_MAX):
        _saturate(brain, words & np.uint32(0x7FFF_FFFF), beyond=_BRAIN_MAX_BITS, largest=0x7F7F, infinity=0x7F80)
        # What was saturated has lost its sign, or rounding has carried into it.
        brain &= np.uint32(0x7FFF)
        brain |= (words >> np.uint32(16)) & np.uint32(0x8000)
    return brain


def _round_off(words: _Words, bits: int, *, less: int) -> _Words:
    """Take off the difference of the exponents' biases and drop the last bits, to nearest, ties to even."""
    kept = words >> np.uint32(bits)
    kept &= np.uint32(1)
    kept += words
    kept += np.uint32((1 << (bits - 1)) - 1 - less & 0xFFFF_FFFF)
    kept >>= np.uint32(bits)
    return kept


def _saturate(bits: _Words, size: _Words, *, beyond: int, largest: int, infinity: int) -> None:
    np.copyto(bits, np.uint32(largest), where=size > beyond)
    np.copyto(bits, np.uint32(infinity), where=size == _INFINITY)
    # All mantissa bits would do; the first alone is the usual NaN.
    np.copyto(bits, np.uint32(infinity | (infinity & -infinity) >> 1), where=size > _INFINITY)
