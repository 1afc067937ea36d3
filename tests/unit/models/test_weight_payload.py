import dataclasses
import warnings

import numpy as np
import pytest
import torch

from trl_ray.errors import WeightError
from trl_ray.models.weight_payload import export_weights, named_tensors, verify_payload

TENSORS = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(5, dtype=torch.bfloat16)), ("c", torch.tensor(2.0))]


def test_tensors_come_back_as_they_were_from_a_read_only_buffer_without_a_warning():
    payload = export_weights(TENSORS, version=3)
    assert not payload.buffer.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = dict(named_tensors(payload))
    for name, tensor in TENSORS:
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype


def test_views_share_the_buffer_and_outlive_the_payload():
    payload = export_weights(TENSORS, version=3)
    address = payload.buffer.ctypes.data
    tensors = dict(named_tensors(payload))
    del payload
    assert tensors["a"].data_ptr() == address
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_one_flipped_bit_is_found():
    payload = export_weights(TENSORS, version=3)
    verify_payload(payload.manifest, payload)
    damaged = payload.buffer.copy()
    damaged[1] ^= 1
    with pytest.raises(WeightError, match="checksum"):
        verify_payload(payload.manifest, dataclasses.replace(payload, buffer=damaged))


def test_a_cut_off_buffer_is_refused():
    payload = export_weights(TENSORS, version=3)
    short = dataclasses.replace(payload, buffer=np.array(payload.buffer[:-1]))
    with pytest.raises(WeightError, match="c must"):
        verify_payload(payload.manifest, short)


def test_missing_unknown_and_misshapen_parameters_are_all_named():
    expected = export_weights(TENSORS, version=0).manifest
    payload = export_weights([("a", torch.zeros(3, 2)), ("b", TENSORS[1][1]), ("d", torch.zeros(1))], version=1)
    with pytest.raises(WeightError, match=r"missing: \['c'\], unknown: \['d'\], wrong shape: \['a is \(3, 2\)"):
        verify_payload(expected, payload)


def test_another_dtype_is_welcome():
    expected = export_weights([("a", torch.zeros(2))], version=0).manifest
    verify_payload(expected, export_weights([("a", torch.zeros(2, dtype=torch.bfloat16))], version=1))
