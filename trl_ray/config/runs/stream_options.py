"""The options of rows that are read while training goes on: a stream, which does not say how long it is."""

from __future__ import annotations

from trl_ray.config.base import Positive, Section


class StreamConfig(Section):
    """How a stream is read."""

    dataset_streaming: bool = False
    """Read and tokenise rows while training goes on, instead of before it; needs `max_steps`."""
    stream_window: Positive = 1000
    """Rows that are read, tokenised and shuffled together (and packed, where that is asked) when streaming."""
