"""The ledger's state as journal records: what stands in a compacted journal for everything before it.

    begin, on the ledger's thread: counts, live groups, and references to what does not change any more
    run, on any thread:            base | part: prompt ids | part: settled | part: prompts | ... | what came since
    finish, on the ledger's thread: the new journal is the journal

A settled group changes in a restore only, prompts and their ids never do: the owner abandons a compaction before a
restore. Parts are small, so that writing them never keeps the other thread waiting for long.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_ray.buffer.entry import GroupEntry
from trl_ray.buffer.journal import Journal, JournalDraft, Rewrite

_PART = 500
"""Groups or prompt ids of one record."""
_PART_BYTES = 1 << 20
"""Prompts of one record, unless a single one is larger."""


class Compaction:
    """One compaction under way.

    Protocol in use::

        compaction = Compaction(journal, head=..., prompt_ids=..., settled=..., prompts=...)
        compaction.run()                    # on any thread, once
        compaction.finish()                 # False when it was abandoned

    NOTE: whatever fails leaves the journal as it was.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        head: Mapping[str, Any],
        prompt_ids: list[str],
        settled: Sequence[GroupEntry],
        prompts: Mapping[int, bytes],
    ) -> None:
        """Take hold of the state that stands for everything written so far.

        Args:
            journal: to be replaced.
            head: of the base record; its parts are counted here.
            prompt_ids: of all groups; only those that are there now count, and more may be appended meanwhile.
            settled: entries that change no more while this goes on.
            prompts: by group id; copied.
        """
        self._rewrite = Rewrite(journal)
        self._head = head
        self._prompt_ids, self._count = prompt_ids, len(prompt_ids)
        self._settled = settled
        self._prompts = list(prompts.items())
        self._abandoned = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Write the new journal; returns early when abandoned.

        Raises:
            JournalError: it could not be written.
        """
        with self._lock:
            if not self._abandoned.is_set():
                try:
                    self._rewrite.write(self._drafts())
                except _AbandonedError:
                    return

    def finish(self) -> bool:
        """Put the new journal in place, unless abandoned; returns whether it did.

        Raises:
            JournalError: it could not be written.
        """
        if self._abandoned.is_set():
            return False
        self._rewrite.finish()
        return True

    def abandon(self) -> None:
        """Stop, wait until the writing thread has, and remove what it wrote; a second call does nothing."""
        self._abandoned.set()
        with self._lock:
            self._rewrite.abandon()

    def _drafts(self) -> Iterator[JournalDraft]:
        pages = list(_pages(self._prompts))
        parts = -(-self._count // _PART) + -(-len(self._settled) // _PART) + len(pages)
        yield JournalDraft(head={**self._head, "parts": parts})
        for start in range(0, self._count, _PART):
            yield self._part({"prompt_ids": self._prompt_ids[start : min(start + _PART, self._count)]})
        for start in range(0, len(self._settled), _PART):
            yield self._part({"settled": [entry.to_state() for entry in self._settled[start : start + _PART]]})
        for page in pages:
            blobs = [blob for _, blob in page]
            head = {"prompts": [group_id for group_id, _ in page], "sizes": [len(blob) for blob in blobs]}
            yield self._part(head, b"".join(blobs))

    def _part(self, head: Mapping[str, Any], payload: bytes = b"") -> JournalDraft:
        if self._abandoned.is_set():
            raise _AbandonedError("the journal is needed for something else")
        return JournalDraft(head={"op": "part", **head}, payload=payload)


class _AbandonedError(Exception):
    """The owner wants the thread to stop."""


def _pages(prompts: Sequence[tuple[int, bytes]]) -> Iterator[Sequence[tuple[int, bytes]]]:
    start = size = 0
    for end, (_, blob) in enumerate(prompts):
        if end > start and (end - start >= _PART or size + len(blob) > _PART_BYTES):
            yield prompts[start:end]
            start, size = end, 0
        size += len(blob)
    if start < len(prompts):
        yield prompts[start:]


def split_blobs(payload: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Blobs that were stored one behind the other."""
    ends = list(itertools.accumulate(sizes))
    assert (ends[-1] if ends else 0) == len(payload), f"Sizes {sizes} must add up to {len(payload)} bytes."
    return [payload[end - size : end] for end, size in zip(ends, sizes, strict=True)]
