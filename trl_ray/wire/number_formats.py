"""float32 as 16 bits and back.

    float32 [..] --to_bits--> uint16 [..] --from_bits--> float32 [..]        of float16 or bfloat16

NumPy knows no bfloat16, torch knows both; memory is shared with it, not copied. It is imported when it is used: the
queue reads frames of groups and never has to hold torch. Rounding is to nearest, ties to even, but what is finite stays
finite: it saturates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.teacher_options import PayloadDtype
from trl_ray.types import FloatArray

if TYPE_CHECKING:
    import torch

Bits: TypeAlias = NDArray[np.uint16]


def to_bits(values: FloatArray, dtype: PayloadDtype) -> Bits:
    """Round to 16 bits.

    Args:
        values: any shape; NaN stays NaN, infinity stays infinity, everything else stays finite.
        dtype: float16 or bfloat16.
    """
    import torch

    wide, short = torch.from_numpy(_readable(values, np.float32)), _short(dtype)
    largest = torch.finfo(short).max
    rounded = wide.clamp(-largest, largest).to(short)
    infinite = wide.isinf()
    if infinite.any():
        rounded = torch.where(infinite, wide.to(short), rounded)
    bits: Bits = rounded.view(torch.uint16).numpy()
    return bits


def from_bits(bits: Bits, dtype: PayloadDtype) -> FloatArray:
    """Exactly the numbers that the bits stand for; any shape."""
    import torch

    values: FloatArray = torch.from_numpy(_readable(bits, np.uint16)).view(_short(dtype)).float().numpy()
    return values


def _short(dtype: PayloadDtype) -> torch.dtype:
    import torch

    assert dtype is not PayloadDtype.FLOAT32, "float32 is no 16-bit format"
    return torch.float16 if dtype is PayloadDtype.FLOAT16 else torch.bfloat16


def _readable(array: NDArray[np.generic], dtype: type[np.generic]) -> NDArray[np.generic]:
    """In one piece and writable, which torch insists on though nothing is written; a view of a frame is neither."""
    if array.flags.writeable and array.flags.c_contiguous and array.dtype == dtype:
        return array
    return np.array(array, dtype=dtype, order="C")
