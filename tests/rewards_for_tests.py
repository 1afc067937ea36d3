"""Reward functions that tests name by path: fast, deterministic, and some of them broken on purpose."""

import time
from pathlib import Path


def vowels(completions, **_):
    """The share of vowels: something a random byte-level model can be scored on."""
    texts = [_text(completion) for completion in completions]
    return [sum(char in "aeiou" for char in text) / max(1, len(text)) for text in texts]


def vowels_with_feedback(completions, log_extra, **kwargs):
    """`vowels`, with a word on each completion."""
    log_extra("feedback", [f"{len(_text(completion))} letters" for completion in completions])
    return vowels(completions, **kwargs)


def length(completion_ids, **_):
    """Token count, scaled."""
    return [len(ids) / 16 for ids in completion_ids]


def sleepy(completions, **kwargs):
    """`vowels`, a second later."""
    time.sleep(1.0)
    return vowels(completions, **kwargs)


def hangs_once(completions, marker, **kwargs):
    """Hangs the first time it is called in a run; the dataset's column names the file that remembers."""
    marker = Path(marker[0])
    if not marker.exists():
        marker.write_text("hung")
        time.sleep(3600)
    return vowels(completions, **kwargs)


def raises(completions, **_):
    """Always fails."""
    raise RuntimeError("no judge today")


def _text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]
