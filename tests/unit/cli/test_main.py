"""The command line without a run: what it parses, what it prints, and how it ends."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tiny_models import build_tiny_model
from tiny_reward_models import build_reward_model
from trl_ray import errors
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.cli.main import ExitCode, build_parser, main
from trl_ray.config.load import dump_yaml
from trl_ray.pipelines.run.pipeline import Pipeline
from trl_ray.pipelines.run.session import TrainOutput


def subclasses(cls):
    return [cls, *(found for each in cls.__subclasses__() for found in subclasses(each))]


@pytest.fixture
def config(tmp_path):
    """A configuration that loads; its model is not there."""
    return write_config(tmp_path / "config.yaml", model_name_or_path="none")


def write_config(path, **changes):
    options = {
        "reward_funcs": ["exact_answer"],
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "rollout": {"max_model_len": 64},
        "runtime": {"kind": "local"},
    }
    path.write_text(yaml.safe_dump({**options, **changes}))
    return str(path)


def ends_with(monkeypatch, outcome):
    """Let `train` end like this instead of running; the configurations it was called with."""
    seen = []

    def train(self):
        seen.append(self.config)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(Pipeline, "train", train)
    return seen


def output(**ledger):
    balance = {"issued": 8, "trained": 8, "dropped": {}, "live": {}, **ledger}
    snapshot = LedgerSnapshot(**balance, fenced=0, reissued=0, step=2, version=2)
    return TrainOutput(
        steps=2, run_dir=Path("runs/x"), metrics={}, ledger=snapshot, model=Path("runs/x/m"), worst_age=1
    )


def test_a_report_is_announced_where_there_is_one(monkeypatch, config, capsys, tmp_path):
    ends_with(monkeypatch, replace(output(), run_dir=tmp_path))
    assert main(["grpo", "--config", config]) == ExitCode.DONE
    assert "report" not in capsys.readouterr().out
    (tmp_path / "report.html").write_text("<html>")
    assert main(["grpo", "--config", config]) == ExitCode.DONE
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


EXPECTED = {
    **dict.fromkeys(subclasses(errors.RunError), ExitCode.FAILED),
    **dict.fromkeys(subclasses(errors.InputError), ExitCode.WRONG_INPUT),
    errors.InterruptedRun: ExitCode.INTERRUPTED,
    KeyboardInterrupt: ExitCode.INTERRUPTED,
    asyncio.CancelledError: ExitCode.INTERRUPTED,
}


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_every_kind_of_failure_has_its_exit_code_and_one_message(kind, monkeypatch, config, capsys):
    ends_with(monkeypatch, kind("what went wrong"))
    assert main(["grpo", "--config", config]) == EXPECTED[kind]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("trl-ray: ")
    assert shown.err.count("what went wrong") == (not issubclass(kind, (KeyboardInterrupt, asyncio.CancelledError)))


def test_the_exit_codes_are_those_the_manual_promises():
    assert {code.name: int(code) for code in ExitCode} == {"DONE": 0, "WRONG_INPUT": 2, "FAILED": 3, "INTERRUPTED": 130}


def test_a_failed_run_says_how_to_go_on(monkeypatch, config, capsys):
    ends_with(monkeypatch, errors.StallError("nothing moves"))
    main(["grpo", "--config", config])
    assert "trl-ray resume" in capsys.readouterr().err


def test_a_run_that_ends_well_prints_its_balance(monkeypatch, config, capsys):
    ends_with(monkeypatch, output(issued=9, trained=8, dropped={"zero_variance": 1}))
    assert main(["grpo", "--config", config]) == 0
    assert "issued 9 = trained 8 + dropped 1 + live 0" in capsys.readouterr().out


@pytest.mark.parametrize("ledger", [{"issued": 9}, {"issued": 9, "live": {"ready": 1}}], ids=["unbalanced", "live"])
def test_a_run_with_work_unaccounted_for_never_exits_with_0(ledger, monkeypatch, config, capsys):
    ends_with(monkeypatch, output(**ledger))
    assert main(["grpo", "--config", config]) == 3
    assert "unaccounted" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "meant"), [("async-gpro", "async-grpo"), ("resum", "resume"), ("reprot", "report")])
def test_an_unknown_command_names_the_nearest(typed, meant, capsys):
    assert main([typed, "--config", "x.yaml"]) == 2
    assert f"Did you mean {meant!r}?" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_the_file(monkeypatch, config):
    seen = ends_with(monkeypatch, output())
    assert main(["grpo", "seed=7", "max_steps=2", "--config", config, "rollout.num_cpus=3", "max_steps=5"]) == 0
    [made] = seen
    assert (made.seed, made.rollout.num_cpus) == (7, 3.0)
    # The last one wins.
    assert made.max_steps == 5


def test_each_pipeline_runs_under_its_own_name(monkeypatch, config):
    seen = ends_with(monkeypatch, output())
    main(["grpo", "--config", config])
    main(["async-grpo", "--config", config, "max_staleness=1"])
    main(["rloo", "--config", config, "normalize_advantages=true"])
    main(["sdpo", "--config", config, "max_staleness=2"])
    main(["distill", "--config", config, "lmbda=0.5"])
    assert [made.pipeline for made in seen] == ["grpo", "async-grpo", "rloo", "sdpo", "distill"]


def test_resume_goes_on_with_the_pipeline_that_the_run_was_started_with(monkeypatch, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    write_config(run / "config.yaml", model_name_or_path="none", pipeline="async-grpo", max_staleness=3)
    seen = ends_with(monkeypatch, output())
    assert main(["resume", str(run)]) == 0
    assert (seen[0].pipeline, seen[0].max_staleness, seen[0].output_dir) == ("async-grpo", 3, str(run))


def test_resume_takes_what_may_change_and_refuses_the_rest_by_name(monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    write_config(run / "config.yaml", model_name_or_path="none", pipeline="async-grpo", max_steps=3)
    seen = ends_with(monkeypatch, output())
    assert main(["resume", str(run), "max_steps=9", "--save_steps", "2"]) == 0
    assert (seen[0].max_steps, seen[0].save_steps, seen[0].output_dir) == (9, 2, str(run))
    assert main(["resume", str(run), "max_steps=9", "learning_rate=0.5"]) == 2
    assert "learning_rate must stay as the run began with" in capsys.readouterr().err
    assert main(["resume", str(run), "max_stepz=9"]) == 2
    assert "max_steps" in capsys.readouterr().err
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [
        ("sdpo", {"distillation_weight": 0.5, "teacher_update_rate": 0.25, "beta": 0.1, "max_staleness": 1}),
        ("sdpo", {"teacher": {"placement": "learner"}, "model_init_kwargs": {"dtype": "bfloat16"}}),
        ("sdpo", {"generation_kwargs": {"min_tokens": 3}, "reprompt_template": "{prompt}: {solution}{feedback}"}),
        ("distill", {"teachers": [{"server": {"url": "http://127.0.0.1:1"}, "max_attempts": 5}], "lmbda": 0.25}),
        ("distill", {"teacher_model_name_or_path": "far", "teacher_model_revision": "v2", "max_prompt_length": 9}),
    ],
)
def test_a_resumed_run_keeps_every_option(pipeline, options, monkeypatch, tmp_path):
    seen = ends_with(monkeypatch, output())
    config = write_config(
        tmp_path / "config.yaml", output_dir=str(tmp_path / "run"), model_name_or_path="none", **options
    )
    main([pipeline, "--config", config])
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    # What a run writes into its directory.
    (run / "config.yaml").write_text(dump_yaml(seen[0]))
    assert main(["resume", str(run)]) == 0
    assert seen[1] == seen[0]


def test_a_run_whose_functions_lie_beside_its_file_is_started_and_resumed_from_any_folder(monkeypatch, tmp_path):
    seen = ends_with(monkeypatch, output())
    mine, run, elsewhere = tmp_path / "mine", tmp_path / "run", tmp_path / "elsewhere"
    for folder in (mine, run, elsewhere):
        folder.mkdir()
    (mine / "beside.py").write_text("def short(completions, **columns):\n    return [0.0 for _ in completions]\n")
    (elsewhere / "here.py").write_text("def long(completions, **columns):\n    return [1.0 for _ in completions]\n")
    file = write_config(mine / "c.yaml", model_name_or_path="none", reward_funcs=["beside.py:short"])
    monkeypatch.chdir(elsewhere)
    assert main(["grpo", "--config", file, "callbacks=[here.py:Tells]"]) == 0
    assert seen[0].reward_funcs == [f"{mine.resolve()}/beside.py:short"]
    assert seen[0].callbacks[0].path == f"{elsewhere.resolve()}/here.py:Tells"
    (run / "metrics.jsonl").touch()
    (run / "config.yaml").write_text(dump_yaml(seen[0]))
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(run)]) == 0
    assert seen[1].reward_funcs == seen[0].reward_funcs and seen[1].callbacks == seen[0].callbacks


def test_a_run_of_an_unknown_pipeline_is_not_resumed(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("pipeline: ppo\n")
    assert main(["resume", str(tmp_path)]) == 2
    assert "'ppo'" in capsys.readouterr().err


def test_env_prints_one_fact_a_line(capsys):
    assert main(["env"]) == 0
    facts = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert facts.keys() >= {"python", "torch", "ray", "vllm", "gpu"}


def test_a_dry_run_shows_reward_models_with_their_actors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1 = ", "answer": "2"}\n' * 6)
    judge = build_reward_model(tmp_path / "a_judge")
    config = write_config(
        tmp_path / "config.yaml",
        model_name_or_path=build_tiny_model(tmp_path / "model"),
        dataset_name=str(tmp_path / "data.jsonl"),
        reward_models=[{"model_name_or_path": judge, "num_workers": 2, "num_cpus": 0.5}],
    )
    assert main(["grpo", "--config", config, "--dry-run"]) == 0
    plan = capsys.readouterr().out.partition("# plan")[2]
    assert "reward models: a_judge (sequence)" in plan
    [row] = [line for line in plan.splitlines() if line.startswith("reward_model a_judge")]
    assert row.split()[2:] == ["2", "0.5", "0", "0.6", "by", "Ray"]


@pytest.mark.parametrize(
    ("command", "changes", "teachers", "row"),
    [
        (
            "sdpo",
            ["teacher.num_workers=2", "teacher.num_cpus=0.5"],
            "ema, held by actors",
            ["teacher", "ema", "2", "0.5"],
        ),
        ("sdpo", ["distillation_mode=full_logits"], "ema, held by the learner", None),
        ("sdpo", ["teacher_model_kind=live", "use_teacher_server=true"], "live, held by the rollout engines", None),
        ("sdpo", ["distillation_weight=0.0"], None, None),
        (
            "distill",
            ["teacher_model_name_or_path=MODEL"],
            "teacher (MODEL), held by actors",
            ["teacher", "teacher", "1", "1"],
        ),
        (
            "distill",
            ["teacher_model_name_or_path=MODEL", "loss_support=full"],
            "teacher (MODEL), held by the learner",
            None,
        ),
    ],
)
def test_a_dry_run_shows_who_teaches_and_where(command, changes, teachers, row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1 = ", "answer": "2"}\n' * 6)
    model = build_tiny_model(tmp_path / "model")
    config = write_config(
        tmp_path / "config.yaml",
        model_name_or_path=model,
        dataset_name=str(tmp_path / "data.jsonl"),
        output_dir=str(tmp_path / "run"),
    )
    changes = [change.replace("MODEL", model) for change in changes]
    assert main([command, "--config", config, "--dry-run", *changes]) == 0
    page = capsys.readouterr().out
    assert yaml.safe_load(page.partition("# plan")[0])["pipeline"] == command
    plan = page.partition("# plan")[2].splitlines()
    told = [line.removeprefix("teachers: ") for line in plan if line.startswith("teachers: ")]
    assert told == ([] if teachers is None else [teachers.replace("MODEL", model)])
    rows = [line.split() for line in plan if line.startswith("teacher ")]
    assert [each[:4] for each in rows] == ([] if row is None else [row])
    assert all(each[-3:] == ["0.6", "by", "Ray"] for each in rows)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_configuration_actors_and_memory_and_writes_nothing(tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    model = build_tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1 + 1 = ", "answer": "2"}\n' * 6)
    config = write_config(
        tmp_path / "config.yaml",
        model_name_or_path=model,
        dataset_name=str(data),
        output_dir="run",
        runtime={"kind": "ray"},
        rollout={"max_model_len": 64, "num_workers": 3, "kv_cache_memory_gib": 2.0},
    )
    assert main(["async-grpo", "--config", config, "--dry-run", "max_staleness=1", "max_steps=9"]) == 0
    page = capsys.readouterr().out
    resolved = yaml.safe_load(page.partition("# plan")[0])
    assert (resolved["max_steps"], resolved["max_staleness"], resolved["pipeline"]) == (9, 1, "async-grpo")
    plan = page.partition("# plan")[2]
    # 4 completions a step are 2 groups; (1 + 1) * 2 slots.
    assert "optimizer steps: 9" in plan
    assert "prompt groups per step: 2" in plan
    assert "admission slots: 4" in plan
    rows = {line.split()[0]: line.split() for line in plan.splitlines() if line.startswith(("learner", "rollout"))}
    assert rows["rollout"][1:5] == ["3", "1", "0", "2.6"]
    assert rows["learner"][-2:] == ["a", "checkpoint"]
    # 0.6 + 0.2 + 3 * 2.6 + 0.2 GiB; the tiny model's few MB vanish.
    assert "memory expected in all: 8.8 GiB" in plan
    assert list(work.iterdir()) == []


def test_the_help_says_that_a_resumed_run_lacks_what_env_set() -> None:
    assert "what env set is not kept" in " ".join(build_parser().format_help().split())
