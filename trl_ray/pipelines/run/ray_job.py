"""What a run must know of `ray job submit`, where a driver lives in a copy of a folder and is given seconds to end.

environment of the process --> in_ray_job, grace_s --> Stop          output_dir --> is_deleted_with_job --> a warning
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the program of a job."""
_JOB_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
_JOB_GRACE_S = 3.0
"""What `ray job stop` leaves between SIGTERM and SIGKILL, where that variable says nothing else."""
_GRACE_S = 30.0
"""What Kubernetes and Slurm leave."""
_COPIES = ("runtime_resources", "working_dir_files")
"""Where Ray unpacks the folder that a job was submitted with, below its session's folder."""


def in_ray_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `ray job submit` started this process."""
    return _IN_JOB in environ


def grace_s(given: float | None, environ: Mapping[str, str] = os.environ) -> float:
    """Seconds between the signal that ends a run and the one that kills it.

    Args:
        given: `runtime.stop_grace_s`; None takes what the scheduler is known to leave.
        environ: of this process.
    """
    if given is not None:
        return given
    if not in_ray_job(environ):
        return _GRACE_S
    try:
        return float(environ.get(_JOB_GRACE, _JOB_GRACE_S))
    except ValueError:
        return _JOB_GRACE_S


def give_more_grace(seconds: float) -> str:
    """How to have `ray job stop` wait for so long."""
    variables = f'{{"env_vars": {{"{_JOB_GRACE}": "{round(seconds)}"}}}}'
    return f"Submit it with --runtime-env-json '{variables}'."


def is_deleted_with_job(folder: Path) -> bool:
    """Whether a folder lies in the copy of the submitted folder, which Ray deletes some time after the job."""
    parts = folder.resolve().parts
    return _COPIES in itertools.pairwise(parts)
