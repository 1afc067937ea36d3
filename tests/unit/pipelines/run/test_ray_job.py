"""What a run in a Ray job is told: how long it has to end, and that its folder may not outlive it."""

from pathlib import Path

import pytest

from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.sinks import EventsFile, Observer
from trl_ray.pipelines.run.ray_job import grace_s, is_deleted_with_job
from trl_ray.pipelines.run.recording import RunRecorder


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, 30.0),
        (None, {"RAY_JOB_STOP_WAIT_TIME_S": "60"}, 30.0),
        (None, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, 3.0),
        (None, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "60"}, 60.0),
        (None, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "soon"}, 3.0),
        (7.0, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "60"}, 7.0),
    ],
)
def test_the_grace_is_what_the_scheduler_leaves(given: float | None, environ: dict[str, str], expected: float) -> None:
    assert grace_s(given, environ) == expected


def recorder(folder: Path) -> RunRecorder:
    directory = RunDirectory.create(folder)
    return RunRecorder(directory=directory, observer=Observer([EventsFile(directory.events)]))


def test_a_job_whose_checkpoints_take_longer_than_the_grace_is_told_once_what_to_submit_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = recorder(tmp_path / "run")
    told.tell_of_grace(50.0, grace=30.0, is_measured=True)  # in no job: whoever kills it says how long before
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    told.tell_of_grace(2.9, grace=3.0, is_measured=True)
    assert told.directory.events.read_text() == ""
    told.tell_of_grace(12.3, grace=3.0, is_measured=True)
    told.tell_of_grace(13.0, grace=3.0, is_measured=True)
    [line] = told.directory.events.read_text().splitlines()
    assert "a checkpoint takes 12.3 s, but `ray job stop` kills after 3 s" in line
    assert r"""--runtime-env-json '{\"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"35\"}}'""" in line


def test_a_folder_in_the_copy_of_what_was_submitted_is_deleted_with_the_job(tmp_path: Path) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    lost, kept = recorder(copy / "runs" / "run"), recorder(tmp_path / "runs" / "run")
    for each in (lost, kept):
        each.tell_of_lost_folder()
    assert "which Ray deletes with the job. Give it an absolute path" in lost.directory.events.read_text()
    assert kept.directory.events.read_text() == ""
    assert not is_deleted_with_job(tmp_path / "working_dir_files" / "runtime_resources")
