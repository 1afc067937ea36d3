"""Durations are taken from a clock that nobody sets; the time of day is for what people and other programs read."""

import time
from pathlib import Path

import pytest

import trl_ray
from trl_ray.types import steady_time

READ_BY_OTHERS = {"types/clock.py", "types/events.py", "observe/sinks.py", "data/sources/data_cache.py"}
"""Where the machine's own time of day is right: lines of a log, and the times of files."""


def test_the_steady_time_is_the_time_of_day_and_goes_on_when_that_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(steady_time() - time.time()) < 5
    before = steady_time()
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert 0 <= steady_time() - before < 60


def test_nothing_is_measured_with_the_time_of_day() -> None:
    package = Path(trl_ray.__file__).parent
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(use in path.read_text() for use in ("time.time()", "= time.time", "import time as", "from time import"))
    }
    assert users <= READ_BY_OTHERS
