"""The frame in which questions to teachers and their answers travel: a header of 72 bytes, then raw arrays.

    magic, format, kind, number formats | sizes | temperature, version | checksum ║ array ║ array ║ ...
    0                                                                          72          each at a multiple of 8

All little-endian. The sizes in the header tell where every array lies and how long the frame must be, so an array is
read where it is, out of Ray's object store or the body of an HTTP message alike. Nothing is ever unpickled. The
checksum (64-bit xxh3) covers all of it.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.errors import TeacherError

Frame: TypeAlias = NDArray[np.uint8]
MEDIA_TYPE = "application/vnd.trl-ray.teacher"
"""Of frames in HTTP messages."""

_MAGIC = b"TRLTEACH"
_FORMAT = 1
# Magic, format; kind, dtype, ids, has_tail, 0; completions, top_k, width, vocab; temperature, version, 2 x tokens.
_FIELDS = struct.Struct("<8sHBBBBHIIIIdqQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = 72
_ALIGNMENT = 8
_DTYPES = tuple(PayloadDtype)
_IDS = tuple(PayloadIds)


class FrameKind(enum.IntEnum):
    """What a frame holds."""

    REQUESTS = 1
    SCORES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """Everything about a frame but its numbers."""

    kind: FrameKind
    dtype: PayloadDtype
    """Of log-probs."""
    ids: PayloadIds
    """Of ids in answers; in requests they are int32."""
    has_tail: bool
    num_completions: int
    top_k: int
    """The teacher's own tokens at each place."""
    width: int
    """All tokens at each place, those that were asked about included."""
    vocab_size: int
    temperature: float
    version: int | None
    """Of the teacher's weights, in answers."""
    num_tokens: int
    """Of all completions."""
    num_prompt_tokens: int
    """Of all prompts, in requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameArray:
    """One array of a frame."""

    name: str
    dtype: str
    """NumPy's name, little-endian."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Without the gap behind it."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def frame_bytes(arrays: Sequence[FrameArray]) -> int:
    """Length of a frame with these arrays."""
    return HEADER_BYTES + sum(_aligned(array.num_bytes) for array in arrays)


def open_frame(header: FrameHeader, arrays: Sequence[FrameArray]) -> tuple[Frame, dict[str, NDArray[Any]]]:
    """A frame with its header, and its arrays by name, to be written where they lie; `seal_frame` ends it.

    Args:
        header: of the frame.
        arrays: what the header says must follow.
    """
    frame = np.zeros(frame_bytes(arrays), dtype=np.uint8)
    start = _FIELDS.pack(
        _MAGIC,
        _FORMAT,
        header.kind,
        _DTYPES.index(header.dtype),
        _IDS.index(header.ids),
        header.has_tail,
        0,
        header.num_completions,
        header.top_k,
        header.width,
        header.vocab_size,
        header.temperature,
        -1 if header.version is None else header.version,
        header.num_tokens,
        header.num_prompt_tokens,
    )
    frame[: _FIELDS.size] = np.frombuffer(start, dtype=np.uint8)
    return frame, _views(frame, arrays)


def seal_frame(frame: Frame) -> Frame:
    """The frame with the checksum of what was written; nothing may be changed after it."""
    frame[_FIELDS.size : HEADER_BYTES] = np.frombuffer(_CHECKSUM.pack(_checksum(frame)), dtype=np.uint8)
    return frame


def read_header(frame: Frame, *, kind: FrameKind, teacher: str) -> FrameHeader:
    """The header of a frame whose checksum is right.

    Raises:
        TeacherError: not a frame of this kind and format, or damaged on the way.
    """
    if len(frame) < HEADER_BYTES:
        raise damaged(teacher, "frame", f"must have a header of {HEADER_BYTES} bytes, got {len(frame)} bytes")
    fields = _FIELDS.unpack(frame[: _FIELDS.size].tobytes())
    magic, form, number, dtype, ids, has_tail, _, *sizes, temperature, version, tokens, prompt_tokens = fields
    completions, top_k, width, vocab = sizes
    if magic != _MAGIC or form != _FORMAT:
        raise damaged(teacher, "frame", f"must begin with {_MAGIC!r} and format {_FORMAT}, got {magic!r} and {form}")
    (checksum,) = _CHECKSUM.unpack(frame[_FIELDS.size : HEADER_BYTES].tobytes())
    if checksum != _checksum(frame):
        raise damaged(teacher, "checksum", f"must be that of the {len(frame)} bytes that came, got {checksum:#x}")
    if number != kind or dtype >= len(_DTYPES) or ids >= len(_IDS) or has_tail > 1:
        raise damaged(teacher, "header", f"must be of kind {kind.name} and known number formats, got {fields[2:6]}")
    return FrameHeader(
        kind=kind,
        dtype=_DTYPES[dtype],
        ids=_IDS[ids],
        has_tail=bool(has_tail),
        num_completions=completions,
        top_k=top_k,
        width=width,
        vocab_size=vocab,
        temperature=temperature,
        version=None if version < 0 else version,
        num_tokens=tokens,
        num_prompt_tokens=prompt_tokens,
    )


def read_arrays(frame: Frame, arrays: Sequence[FrameArray], *, teacher: str) -> dict[str, NDArray[Any]]:
    """The arrays by name, as views of the frame that cannot be written to.

    Raises:
        TeacherError: the frame is longer or shorter than they are.
    """
    if len(frame) != frame_bytes(arrays):
        raise damaged(teacher, "frame", f"must have {frame_bytes(arrays)} bytes for its sizes, got {len(frame)}")
    views = _views(frame, arrays)
    for view in views.values():
        view.flags.writeable = False
    return views


def as_frame(body: Frame | bytes | bytearray | memoryview) -> Frame:
    """Bytes of any kind as a frame, without copying."""
    return body if isinstance(body, np.ndarray) else np.frombuffer(body, dtype=np.uint8)


def damaged(teacher: str, what: str, problem: str) -> TeacherError:
    """The error of a frame that cannot be read."""
    return TeacherError(
        f"teacher {teacher}: {what}: {problem}. It was damaged on the way, or the other side speaks another format; "
        "run the same version of trl_ray on both."
    )


def _views(frame: Frame, arrays: Sequence[FrameArray]) -> dict[str, NDArray[Any]]:
    views, offset = {}, HEADER_BYTES
    for array in arrays:
        views[array.name] = frame[offset : offset + array.num_bytes].view(array.dtype).reshape(array.shape)
        offset += _aligned(array.num_bytes)
    return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _checksum(frame: Frame) -> int:
    digest = xxhash.xxh3_64(frame[: _FIELDS.size].tobytes())
    digest.update(np.ascontiguousarray(frame[HEADER_BYTES:]).data)
    return digest.intdigest()
