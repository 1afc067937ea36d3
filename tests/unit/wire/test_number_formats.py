"""Sixteen-bit floats by integer arithmetic are those of NumPy and torch, except that finite numbers stay finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ray.config.teacher_options import PayloadDtype
from trl_ray.wire.number_formats import from_bits, to_bits

HALF, BRAIN = PayloadDtype.FLOAT16, PayloadDtype.BFLOAT16
EVERY = np.arange(2**16, dtype=np.uint16)


def by_library(values: np.ndarray, dtype: PayloadDtype) -> np.ndarray:
    if dtype is HALF:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_every_float16_is_read_as_numpy_reads_it() -> None:
    np.testing.assert_array_equal(from_bits(EVERY, HALF), EVERY.view(np.float16).astype(np.float32))


def test_every_bfloat16_is_read_as_torch_reads_it() -> None:
    expected = torch.from_numpy(EVERY.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bits(EVERY, BRAIN), expected)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_every_number_of_the_format_comes_back_as_it_was(dtype: PayloadDtype) -> None:
    values = from_bits(EVERY, dtype)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(to_bits(values, dtype)[numbers], EVERY[numbers])
    assert np.isnan(from_bits(to_bits(values, dtype), dtype)[~numbers]).all()


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_numbers_of_all_sizes_are_rounded_as_the_library_rounds_them(dtype: PayloadDtype) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32)
    # Half way between two neighbours, where ties go to even.
    words[:100_000] &= np.uint32(0xFFFF_F000 if dtype is HALF else 0xFFFF_8000)
    words[:20_000] = words[:20_000] % np.uint32(0x1000_0000) + np.uint32(0x3000_0000)
    values = words.view(np.float32)
    expected = by_library(values, dtype)
    usual = np.isfinite(values) & np.isfinite(from_bits(expected, dtype))
    np.testing.assert_array_equal(to_bits(values, dtype)[usual], expected[usual])


@pytest.mark.parametrize(("dtype", "largest"), [(HALF, 65504.0), (BRAIN, 3.3895314e38)])
def test_what_is_finite_stays_finite_and_what_is_not_stays_so(dtype: PayloadDtype, largest: float) -> None:
    lowest = float(np.finfo(np.float32).min)
    values = np.array([lowest, -lowest, -np.inf, np.inf, np.nan, -0.0], dtype=np.float32)
    expected = np.array([-largest, largest, -np.inf, np.inf, np.nan, -0.0], dtype=np.float32)
    np.testing.assert_array_equal(from_bits(to_bits(values, dtype), dtype), expected)


def test_a_nan_of_all_ones_does_not_become_a_number() -> None:
    values = np.array([0x7FFF_FFFF, 0xFFFF_FFFF], dtype=np.uint32).view(np.float32)
    for dtype in (HALF, BRAIN):
        assert np.isnan(from_bits(to_bits(values, dtype), dtype)).all()


@given(st.lists(st.floats(-60000, 60000, width=32), max_size=20), st.sampled_from([HALF, BRAIN]))
def test_single_numbers_are_rounded_as_the_library_rounds_them(numbers: list[float], dtype: PayloadDtype) -> None:
    values = np.array(numbers, dtype=np.float32)
    np.testing.assert_array_equal(to_bits(values, dtype), by_library(values, dtype))


def test_shapes_are_kept_and_long_arrays_are_converted_whole() -> None:
    values = -np.arange(200_000, dtype=np.float32).reshape(2, 50_000, 2) / 7
    bits = to_bits(values, HALF)
    assert bits.shape == (2, 50_000, 2)
    np.testing.assert_array_equal(bits, values.astype(np.float16).view(np.uint16))
    assert to_bits(np.empty((0, 3), np.float32), BRAIN).shape == (0, 3)
