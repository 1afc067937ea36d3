"""The options of a run that goes on, with changes for what is left of it.

config.yaml, overrides ─ resumed_config ─► options      only those change that say how long, how often, how much
options given in Python ─ check_resumed ─► the same
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trl_ray.config.base import Section
from trl_ray.config.load import apply_overrides, build, read_yaml
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_FREE = frozenset(
    {
        *(
            "max_steps",
            "num_train_epochs",
            "max_skipped_steps",
            "on_non_finite",
            "max_attempts",
            "max_resampled_groups",
            "on_bad_row",
        ),
        *("logging_steps", "logging_strategy", "logging_first_step", "log_completions", "num_completions_to_print"),
        *("report_to", "project", "run_name", "trackio_space_id", "html_report"),
        *("wandb_project", "wandb_entity", "wandb_run_group"),
        *("save_steps", "save_strategy", "save_total_limit", "save_only_model"),
        *("eval_steps", "eval_strategy", "eval_delay", "eval_on_start", "eval_num_prompts"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("early_stopping_patience", "early_stopping_threshold"),
        *("trackio_bucket_id", "hub_token", "callbacks", "compute_metrics"),
        *("torch_empty_cache_steps", "dataset_num_proc", "per_device_eval_batch_size"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        *("reward.timeout_s", "reward.num_workers", "reward.num_cpus", "reward.max_failures_in_a_row"),
        *("teacher.timeout_s", "teacher.num_workers", "teacher.max_attempts", "teacher.max_failures_in_a_row"),
        *("rollout.num_workers", "rollout.num_cpus", "rollout.num_gpus", "rollout.lease_s", "rollout.hang_deadline_s"),
        *("rollout.min_workers", "rollout.max_workers"),
        *("rollout.kv_cache_memory_gib", "rollout.gpu_memory_utilization", "rollout.max_num_seqs"),
        *("rollout.canary_every", "rollout.canary_tolerance", "rollout.on_disagreement"),
    }
)
_OF_A_START = frozenset({"output_dir", "overwrite_output_dir", "resume_from_checkpoint"})
"""Say where a run is, and how it is started."""
_SECRET = frozenset({"hub_token"})
_BOUND_OF_RUNTIME = frozenset({"runtime.kind", "runtime.num_learners"})


def resumed_config(
    section: type[ConfigT], path: str | Path, overrides: Sequence[str] = (), *, recorded: str | Path | None = None
) -> ConfigT:
    """The options of a run with changes, all of which may be made while it goes on.

    Args:
        section: of its pipeline.
        path: of its config.yaml.
        overrides: ``key=value`` or ``section.key=value``.
        recorded: what the run wrote down for itself, by which an edited config.yaml is known; None: the file itself.

    Raises:
        ConfigError: a file or a change is wrong, or a change is of what was trained with so far; names all of these.
    """
    values = read_yaml(path)
    before = build(section, values if recorded is None else read_yaml(recorded))
    after = build(section, apply_overrides(values, overrides) if overrides else values)
    check_resumed(before, after)
    return after


def check_resumed(before: RunConfig, after: RunConfig, *, unresolved: Collection[str] = ()) -> dict[str, str]:
    """See that a run goes on with the options that it began with, but for those that may change.

    Args:
        before: as the run began.
        after: as it goes on.
        unresolved: options of `after` that are not known yet.

    Returns:
        The options that change, as ``old -> new`` by name.

    Raises:
        ConfigError: others change; names all of these.
    """
    changed = {key: told for key, told in _changed(before, after) if key not in unresolved and key not in _OF_A_START}
    bound = [key for key in changed if not _is_free(key)]
    if bound:
        raise ConfigError(
            f"{', '.join(bound)} must stay as the run began with when it goes on, got another value: what was trained "
            "so far would not fit to what comes. How long it trains, how often it saves, evaluates and logs, deadlines "
            "and numbers of workers may change. For another run from its weights set model_name_or_path to its last "
            "checkpoint."
        )
    return {key: told for key, told in changed.items() if key not in _SECRET}


def _is_free(key: str) -> bool:
    return key in _FREE or (key.startswith("runtime.") and key not in _BOUND_OF_RUNTIME)


def _changed(before: Section, after: Section, parent: str = "") -> Iterator[tuple[str, str]]:
    """Names of the options that differ, those of sections with their section's, and how."""
    for name in type(before).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, Section) and isinstance(new, Section):
            yield from _changed(old, new, f"{parent}{name}.")
        elif old != new:
            yield f"{parent}{name}", f"{_plain(old)} -> {_plain(new)}"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
