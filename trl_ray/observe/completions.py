"""Writes the completions of each step to parquet: what was asked, answered, rewarded, and how old it was.

    TrainedGroups -> completion_rows -> completions/step-000012.parquet   (one row per completion)
                                        completions/eval-000012.parquet   (of held-out prompts, without advantages)

Columns: step, group_id, attempt, prompt, completion, finish_reason, reward, ``reward/<function>`` for every function,
extras (JSON), advantage, versions (JSON ``[[version, start, end], ...]``), age (optimizer steps), worker.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_ray.observe.run_files import atomic_write, clean_text, to_json
from trl_ray.observe.sinks import Sink, TrainedGroups
from trl_ray.types import Completion, Prompt, Reward, RolloutGroup

_COLUMNS = (
    ("step", pa.int64()),
    ("group_id", pa.int64()),
    ("attempt", pa.int64()),
    ("prompt", pa.string()),
    ("completion", pa.string()),
    ("finish_reason", pa.string()),
    ("reward", pa.float64()),
    ("extras", pa.string()),
    ("advantage", pa.float64()),
    ("versions", pa.string()),
    ("age", pa.int64()),
    ("worker", pa.string()),
)
PART_PREFIX = "reward/"


class CompletionsFiles(Sink):
    """One parquet file per step in `folder`, and one per evaluation of a held-out set."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def completions(self, trained: TrainedGroups) -> None:
        """Write the step's file.

        Raises:
            RunError: the file cannot be written.
        """
        write_completions(self._folder / f"{_begin(trained)}-{trained.step:06d}.parquet", trained)


def _begin(trained: TrainedGroups) -> str:
    if trained.held_out is None:
        return "step"
    name = re.sub(r"[^\w.-]", "_", trained.held_out)
    return f"eval-{name}" if name else "eval"


def write_completions(path: Path, trained: TrainedGroups) -> Path:
    """Write one row per completion, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    rows = completion_rows(trained)
    # Arrow takes its columns from the schema, so that a step in which one function never answered keeps its column.
    names = sorted({name for row in rows for name in row if name.startswith(PART_PREFIX)})
    before, after = _COLUMNS[:7], _COLUMNS[7:]
    schema = pa.schema([*before, *((name, pa.float64()) for name in names), *after])
    table = pa.Table.from_pylist(rows, schema=schema)
    atomic_write(path, lambda stream: pq.write_table(table, stream))
    return path


def completion_rows(trained: TrainedGroups) -> list[dict[str, Any]]:
    """One mapping from column to value per completion, groups in order."""
    return [
        _row(trained, group, completion, reward, float(advantage))
        for group, advantages in zip(trained.groups, trained.advantages, strict=True)
        for completion, reward, advantage in zip(group.completions, group.rewards, advantages, strict=True)
    ]


def _row(
    trained: TrainedGroups, group: RolloutGroup, completion: Completion, reward: Reward, advantage: float
) -> dict[str, Any]:
    versions = [[span.version, span.start, span.end] for span in completion.versions]
    return {
        "step": trained.step,
        "group_id": group.ticket.group_id,
        "attempt": group.ticket.attempt,
        "prompt": _prompt_text(group.ticket.prompt),
        "completion": clean_text(completion.text),
        "finish_reason": completion.finish_reason.value,
        "reward": reward.total,
        **{PART_PREFIX + clean_text(name): value for name, value in reward.parts.items()},
        "extras": to_json(reward.extra),
        "advantage": None if math.isnan(advantage) else advantage,
        "versions": to_json(versions),
        "age": max(0, trained.learner_version - completion.min_version) if versions else None,
        "worker": group.worker,
    }


def _prompt_text(prompt: Prompt) -> str:
    if prompt.messages is not None:
        return to_json(prompt.messages)
    return clean_text(prompt.text or "")
