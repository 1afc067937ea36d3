"""Weights as one flat buffer with a manifest: how a learner publishes and an engine validates.

    model.named_parameters() -> export_weights -> WeightPayload -> named_tensors -> engine.load_weights

The checksum covers names, shapes, dtypes and bytes, so an engine that reports it has provably read them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from trl_ray.errors import WeightError
from trl_ray.types import TensorEntry, WeightPayload, WeightVersion

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGNMENT = 64


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a torch dtype, e.g. ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def build_manifest(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TensorEntry, ...]:
    """Lay tensors out one after the other, each aligned for vector loads.

    Raises:
        WeightError: a tensor's dtype cannot be published.
    """
    entries, offset = [], 0
    for name, tensor in tensors:
        dtype = dtype_name(tensor.dtype)
        if dtype not in _DTYPES:
            raise WeightError(f"published weights must be one of {sorted(_DTYPES)}, but {name} is {dtype}")
        num_bytes = tensor.numel() * tensor.element_size()
        entries.append(
            TensorEntry(name=name, shape=tuple(tensor.shape), dtype=dtype, offset=offset, num_bytes=num_bytes)
        )
        offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(entries)


def checksum(manifest: Sequence[TensorEntry], buffer: NDArray[np.uint8]) -> str:
    """Hex digest over the manifest and every byte of the buffer."""
    digest = xxhash.xxh3_128()
    for entry in manifest:
        digest.update(f"{entry.name}|{entry.shape}|{entry.dtype}|{entry.offset};".encode())
    digest.update(np.ascontiguousarray(buffer).data)
    return digest.hexdigest()


def export_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], *, version: int, manifest: Sequence[TensorEntry] | None = None
) -> WeightPayload:
    """Copy tensors into one flat read-only buffer.

    Args:
        tensors: (Hugging Face name, tensor of any shape) pairs; tied tensors appear once. Each is used before the next
            is asked for,
            unless the manifest has to be made from them.
        version: the number this set of weights is published under.
        manifest: of just these tensors (`build_manifest`).
    """
    if manifest is None:
        tensors = list(tensors)
        manifest = build_manifest(tensors)
    size = manifest[-1].offset + manifest[-1].num_bytes if manifest else 0
    buffer = np.zeros(size, dtype=np.uint8)
    flat = torch.from_numpy(buffer)
    for entry, (name, tensor) in zip(manifest, tensors, strict=True):
        assert (entry.name, entry.shape) == (name, tuple(tensor.shape)), f"{name} is not where {entry} lies"
        source = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        flat[entry.offset : entry.offset + entry.num_bytes].copy_(source)
    buffer.flags.writeable = False
    identity = WeightVersion(version=version, checksum=checksum(manifest, buffer))
    return WeightPayload(identity=identity, manifest=tuple(manifest), buffer=buffer)


class _Borrowed:
    """Offers a buffer's memory as if it were writable, and keeps the buffer alive.

    torch warns about read-only arrays, and the object store's arrays are read-only; nothing here writes to them.
    """

    def __init__(self, buffer: NDArray[np.uint8]) -> None:
        self.owner = buffer
        pointer, _ = buffer.__array_interface__["data"]
        self.__array_interface__ = {"shape": buffer.shape, "typestr": "|u1", "data": (pointer, False), "version": 3}


def named_tensors(payload: WeightPayload) -> Iterator[tuple[str, torch.Tensor]]:
    """The payload's tensors as views that must not be written to (they may lie in shared memory).

    A view keeps the payload's buffer alive, so it stays valid after the payload is gone.
    """
    if not payload.manifest:
        return
    flat = torch.from_numpy(np.asarray(_Borrowed(np.ascontiguousarray(payload.buffer))))
    for entry in payload.manifest:
        raw = flat[entry.offset : entry.offset + entry.num_bytes]
        yield entry.name, raw.view(_DTYPES[entry.dtype]).view(entry.shape)


def verify_checksum(payload: WeightPayload) -> None:
    """Check that the bytes are those that were published.

    Raises:
        WeightError: the digest differs.
    """
    actual = checksum(payload.manifest, payload.buffer)
    if actual != payload.identity.checksum:
        raise WeightError(
            f"weights of version {payload.identity.version} must have checksum {payload.identity.checksum}, "
            f"but the received bytes have {actual}. The transport damaged them; the engine keeps its weights."
        )


def verify_manifest(expected: Sequence[TensorEntry], received: Sequence[TensorEntry]) -> None:
    """Check names and shapes before an engine is touched (dtypes may differ: engines convert).

    Raises:
        WeightError: a parameter is missing, unknown, twice there, or of another shape.
    """
    want = {entry.name: entry.shape for entry in expected}
    have = {entry.name: entry.shape for entry in received}
    missing, unknown = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    common = sorted(want.keys() & have.keys())
    wrong = [f"{name} is {have[name]}, must be {want[name]}" for name in common if want[name] != have[name]]
    if missing or unknown or wrong or len(have) != len(received):
        raise WeightError(
            f"published weights must match the engine's model; missing: {missing[:5]}, unknown: {unknown[:5]}, "
            f"wrong shape: {wrong[:5]}, repeated: {len(received) - len(have)}. "
            "Start learner and engine from the same model."
        )


def verify_layout(payload: WeightPayload) -> None:
    """Check that every entry is readable: a known dtype, as many bytes as its shape needs, inside the buffer.

    Raises:
        WeightError: an entry cannot be read.
    """
    for entry in payload.manifest:
        dtype = _DTYPES.get(entry.dtype)
        fits = 0 <= entry.offset <= entry.offset + entry.num_bytes <= payload.buffer.size
        if dtype is None or not fits or entry.num_bytes != math.prod(entry.shape) * dtype.itemsize:
            raise WeightError(
                f"{entry.name} must be one of {sorted(_DTYPES)} and lie inside {payload.buffer.size} received bytes, "
                f"but is {entry}. The transport damaged the weights; the engine keeps those it has."
            )


def verify_payload(expected: Sequence[TensorEntry], payload: WeightPayload) -> None:
    """All checks before an engine is touched: names and shapes, layout, checksum.

    Raises:
        WeightError: a check fails.
    """
    verify_manifest(expected, payload.manifest)
    verify_layout(payload)
    verify_checksum(payload)
