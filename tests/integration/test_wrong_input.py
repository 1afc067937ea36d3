"""Whatever is wrong with the input ends with exit code 2, one message on stderr, and nothing written.

config.yaml + changes --trl_ray.cli.main.main--> exit code, stderr;   the folder before == the folder after
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from refusals import assert_one_message, contents, refuse
from tiny_models import MAX_POSITIONS, build_tiny_model, build_tokenizer, random_model
from tiny_reward_models import build_reward_model
from trl_ray.cli.main import main

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
QUESTIONS = [{"prompt": [{"role": "user", "content": f"{n} + 1 = ?"}], "answer": str(n + 1)} for n in range(8)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Folders that exist but are not all fit to train."""

    good: str
    judge: str
    three_labels: str
    silent_judge: str
    other_words: str
    no_template: str
    no_weights: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One mistake: what differs from a good configuration, and what the message must say."""

    name: str
    says: Sequence[str]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Top-level keys of the YAML file; None removes a key. `{models.x}` and `{tmp}` stand for folders."""
    rows: Sequence[Mapping[str, Any]] | None = None
    """The dataset, when the mistake lies there."""
    arguments: Sequence[str] = ()
    """Overrides on the command line, in which `{models.x}` and `{tmp}` stand for folders too."""
    command: str = "grpo"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    base = tmp_path_factory.mktemp("models")
    no_template, no_weights = base / "no_template", base / "no_weights"
    other_words = Path(build_tiny_model(base / "other_words"))
    words = other_words / "tokenizer.json"
    words.write_text(words.read_text().replace("<|pad|>", "<|filler|>"))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(no_template)
    random_model().save_pretrained(no_template)
    build_tokenizer().save_pretrained(no_weights)
    return Models(
        good=build_tiny_model(base / "good"),
        judge=build_reward_model(base / "judge"),
        three_labels=build_reward_model(base / "three_labels", num_labels=3),
        silent_judge=build_reward_model(base / "silent_judge", tokenizer=tokenizer),
        other_words=str(other_words),
        no_template=str(no_template),
        no_weights=str(no_weights),
    )


def write_config(folder: Path, models: Models, case: Case) -> Path:
    """A configuration that would run, made wrong as the case says."""
    rows = QUESTIONS if case.rows is None else case.rows
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "model_name_or_path": models.good,
        "dataset_name": str(folder / "data.jsonl"),
        "reward_funcs": ["exact_answer"],
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "output_dir": str(folder / "run"),
        "rollout": {"engine": "transformers", "max_model_len": 128},
        "runtime": {"kind": "local"},
        "html_report": False,
    }
    for key, value in case.changes.items():
        if isinstance(value, str):
            value = value.format(models=models, tmp=folder)
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            value = {**values[key], **value}
        values[key] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


LONG = [{"prompt": [{"role": "user", "content": "x" * (2 * MAX_POSITIONS)}], "answer": "1"}]
CASES = [
    # Keys and values
    Case(name="unknown key", changes={"learning_rat": 1e-5}, says=["learning_rat", "'learning_rate'"]),
    Case(name="unknown key in a section", changes={"rollout": {"engin": "vllm"}}, says=["rollout.engin", "'engine'"]),
    Case(name="unknown key as an override", arguments=["runtime.knid=local"], says=["runtime.knid", "'kind'"]),
    Case(name="text for a number", changes={"num_generations": "eight"}, says=["num_generations", "'eight'"]),
    Case(name="true for a number", changes={"max_steps": True}, says=["max_steps", "True"]),
    Case(name="a list for a section", changes={"runtime": ["local"]}, says=["runtime"]),
    Case(name="a number that is not finite", arguments=["learning_rate=.nan"], says=["learning_rate", "nan"]),
    Case(name="a negative number", arguments=["beta=-1"], says=["beta", "-1"]),
    Case(name="an unknown choice", changes={"loss_type": "ppo"}, says=["loss_type", "ppo", "dapo"]),
    Case(name="an override without a value", arguments=["max_steps"], says=["max_steps", "key=value"]),
    Case(name="no steps", changes={"max_steps": 0}, says=["max_steps", "0"]),
    # Contradictions
    Case(name="batch not divisible", changes={"num_generations": 3}, says=["num_generations=3", "multiple"]),
    Case(name="clipping upside down", changes={"epsilon_high": 0.1}, says=["epsilon_high=0.1", "epsilon=0.2"]),
    Case(name="a file of another pipeline", changes={"pipeline": "async-grpo"}, says=["trl-ray async-grpo"]),
    Case(name="staleness without overlap", changes={"max_staleness": 2}, says=["max_staleness"]),
    Case(name="no baseline, but scaled", changes={"advantage_baseline": "none"}, says=["scale_rewards", "got group"]),
    Case(
        name="groups dropped for nothing",
        arguments=["zero_variance_groups=drop"],
        command="rloo",
        says=["kl_placement"],
    ),
    Case(name="a cap that is none", changes={"loss_type": "cispo"}, says=["epsilon_high", "cispo"]),
    Case(name="two-sided clip without clipping", changes={"loss_type": "sapo", "delta": 2.0}, says=["delta", "sapo"]),
    Case(name="a reference that is not there", changes={"sync_ref_model": True}, says=["sync_ref_model", "beta"]),
    Case(name="entropy bounds", arguments=["use_adaptive_entropy=true", "entropy_coef_min=2.0"], says=["entropy_coef"]),
    Case(
        name="corrected twice",
        changes={"old_logprobs": "sampler", "vllm_importance_sampling_mode": "token_mask"},
        says=["vllm_importance_sampling_mode", "old_logprobs"],
    ),
    Case(
        name="log-probs without the temperature",
        changes={"rollout": {"engine": "vllm", "engine_kwargs": {"logprobs_mode": "raw_logprobs"}}},
        says=["logprobs_mode", "processed_logprobs"],
    ),
    Case(
        name="two heads",
        changes={"use_liger_kernel": True, "chunk_lm_head_size": 4096},
        says=["chunk_lm_head_size", "use_liger_kernel"],
    ),
    Case(
        name="slices that do not divide",
        arguments=["steps_per_generation=3", "gradient_accumulation_steps=2"],
        says=["steps_per_generation"],
    ),
    Case(name="an adapter's option without adapter", changes={"use_dora": True}, says=["use_peft", "use_dora"]),
    Case(
        name="no adapter to move",
        arguments=["use_peft=true", "beta=0.1", "sync_ref_model=true"],
        says=["sync_ref_model", "use_peft"],
    ),
    Case(
        name="DeepSpeed's own clipping", changes={"deepspeed": {"gradient_clipping": 5.0}}, says=["gradient_clipping"]
    ),
    Case(name="DeepSpeed's file not there", changes={"deepspeed": "{tmp}/nope.json"}, says=["deepspeed", "nope.json"]),
    Case(name="a local run with two ranks", changes={"runtime": {"num_learners": 2}}, says=["num_learners", "local"]),
    Case(name="a local run with two workers", changes={"rollout": {"num_workers": 2}}, says=["num_workers", "local"]),
    # Model
    Case(name="no model", changes={"model_name_or_path": None}, says=["model_name_or_path"]),
    Case(name="unknown model folder", changes={"model_name_or_path": "{tmp}/nope"}, says=["model_name_or_path"]),
    Case(name="unknown model on the hub", changes={"model_name_or_path": "nobody/nothing"}, says=["nobody/nothing"]),
    Case(name="a folder without config", changes={"model_name_or_path": "{models.no_weights}"}, says=["config.json"]),
    Case(name="no chat template", changes={"model_name_or_path": "{models.no_template}"}, says=["chat template"]),
    Case(name="template file not there", changes={"chat_template": "{tmp}/nope.jinja"}, says=["chat_template", "nope"]),
    Case(
        name="longer than the model",
        changes={"rollout": {"max_model_len": MAX_POSITIONS + 1}},
        says=["rollout.max_model_len", str(MAX_POSITIONS)],
    ),
    Case(name="no room for a prompt", changes={"max_completion_length": 128}, says=["max_completion_length", "128"]),
    # Data
    Case(name="no dataset", changes={"dataset_name": None}, says=["dataset_name"]),
    Case(name="unknown dataset file", changes={"dataset_name": "{tmp}/dota.jsonl"}, says=["data.jsonl"]),
    Case(name="unknown task", changes={"dataset_name": "reasoning_gym/chain_som"}, says=["reasoning_gym/chain_sum"]),
    Case(name="empty dataset", rows=[], says=["at least one row"]),
    Case(name="no prompt column", rows=[{"prompts": "1 + 1", "answer": "2"}], says=["'prompt'", "prompts"]),
    Case(name="an empty prompt", rows=[{"prompt": " ", "answer": "2"}], says=["Row 0", "prompt"]),
    Case(name="prompt longer than the model", rows=LONG, says=["Row 0", "120 tokens"]),
    Case(name="a column a reward asks for", rows=[{"prompt": "1 + 1"}], says=["exact_answer", "'answer'"]),
    # Rewards
    Case(name="no reward", changes={"reward_funcs": []}, says=["reward_funcs"]),
    Case(name="unknown reward", changes={"reward_funcs": ["exact_anwser"]}, says=["exact_anwser", "exact_answer"]),
    Case(name="unknown reward module", changes={"reward_funcs": ["no.such:thing"]}, says=["no.such"]),
    Case(name="too many weights", changes={"reward_weights": [1.0, 2.0]}, says=["reward_weights", "2 weights"]),
    Case(name="one reward twice", changes={"reward_funcs": ["exact_answer"] * 2}, says=["exact_answer"]),
    # Reward models
    Case(
        name="no such reward model",
        changes={"reward_model_name_or_path": "{tmp}/nope"},
        says=["reward model nope", "no such directory"],
    ),
    Case(
        name="a reward model without a head",
        changes={"reward_model_name_or_path": "{models.good}"},
        says=["reward model good", "Qwen2ForCausalLM", "trl-ray reward"],
    ),
    Case(
        name="a reward model of three labels",
        changes={"reward_model_name_or_path": "{models.three_labels}"},
        says=["reward model three_labels", "num_labels=1", "has 3"],
    ),
    Case(
        name="a reward model of another kind",
        arguments=["reward_models=[{{model_name_or_path: {models.judge}, kind: steps}}]"],
        says=["reward model judge", "kind must be sequence"],
    ),
    Case(
        name="a reward model without a chat template",
        changes={"reward_model_name_or_path": "{models.silent_judge}"},
        says=["reward model silent_judge", "chat template"],
    ),
    Case(
        name="a reward model that reads more than it can",
        arguments=["reward_models=[{{model_name_or_path: {models.judge}, max_length: 513}}]"],
        says=["reward model judge", "512 positions"],
    ),
    Case(
        name="an option that reward models do not have",
        arguments=["reward_models=[{{model_name_or_path: {models.judge}, wieght: 2.0}}]"],
        says=["reward_models.0.wieght", "'weight'"],
    ),
    Case(
        name="a reward model named as a function",
        arguments=["reward_models=[{{model_name_or_path: {models.judge}, name: exact_answer}}]"],
        says=["'exact_answer' appears twice"],
    ),
    # Options of TRL's that have another name here
    Case(name="the engine under TRL's name", changes={"use_vllm": True}, says=["'use_vllm'", "rollout.engine"]),
    Case(
        name="a strategy",
        arguments=["eval_strategy=always"],
        says=["eval_strategy must be 'no', 'steps' or 'epoch'", "'always'"],
    ),
    Case(
        name="an argument for from_pretrained",
        changes={"model_init_kwargs": {"device_map": "auto"}},
        says=["model_init_kwargs", "device_map='auto'", "The run places the model itself"],
    ),
    Case(
        name="an argument for generate",
        changes={"generation_kwargs": {"num_beams": 4}},
        says=["generation_kwargs", "num_beams=4", "single samples"],
    ),
    # Self-distillation
    Case(
        name="TRL's example of a teacher server",
        command="sdpo",
        # The base of these cases sets rollout.engine=transformers; another server than the run's own cannot be had.
        arguments=["use_vllm=true", "vllm_server_host=10.0.0.5", "use_teacher_server=true", "teacher_model_kind=live"],
        says=["'use_vllm'", "rollout.engine", "'vllm_server_host'", "rollout.num_workers"],
    ),
    Case(
        name="a served average",
        command="sdpo",
        changes={"use_teacher_server": True},
        says=["teacher_model_kind must be live", "use_teacher_server"],
    ),
    Case(
        name="top without a number",
        command="sdpo",
        changes={"distillation_mode": "topk_logits"},
        says=["distillation_topk must be set", "topk_logits"],
    ),
    Case(
        name="one token for a divergence",
        command="sdpo",
        changes={"distillation_alpha": 0.5},
        says=["distillation_alpha must be 1", "sampled_token", "got 0.5"],
    ),
    Case(
        name="a template with a field of its own",
        command="sdpo",
        changes={"solution_template": "{{answer}}"},
        says=["solution_template", "{successful_previous_attempt}", "'{answer}'"],
    ),
    Case(
        name="another model as self-teacher",
        command="sdpo",
        changes={"teacher_model_name_or_path": "{models.good}"},
        says=["'teacher_model_name_or_path'", "pipeline distill"],
    ),
    Case(
        name="a prompt that the assistant ends",
        command="sdpo",
        rows=[{"prompt": [*QUESTIONS[0]["prompt"], {"role": "assistant", "content": "It is"}], "answer": "1"}],
        says=["user's turn", "'assistant'"],
    ),
    Case(
        name="a teacher without room",
        command="sdpo",
        changes={
            "use_teacher_server": True,
            "teacher_model_kind": "live",
            "max_prompt_length": 1,
            "max_completion_length": 127,
        },
        says=["max_completion_length", "128 tokens", "got 127"],
    ),
    Case(name="self-distillation without rewards", command="sdpo", changes={"reward_funcs": []}, says=["reward_funcs"]),
    # Distillation
    Case(name="no teacher", command="distill", says=["there must be a teacher", "teacher_model_name_or_path"]),
    Case(
        name="no such teacher",
        command="distill",
        changes={"teacher_model_name_or_path": "{tmp}/nope"},
        says=["teacher", "nope"],
    ),
    Case(
        name="a teacher of other words",
        command="distill",
        changes={"teacher_model_name_or_path": "{models.other_words}"},
        says=["student's vocabulary", "<|filler|>", "sft"],
    ),
    Case(
        name="a teacher that reads less",
        command="distill",
        arguments=["teachers=[{{model_name_or_path: {models.good}, max_model_len: 64}}]"],
        says=["128 tokens", "reads 64", "rollout.max_model_len"],
    ),
    Case(
        name="an option that teachers do not have",
        command="distill",
        arguments=["teachers=[{{model_name_or_path: {models.good}, dtpye: bfloat16}}]"],
        says=["teachers.0.dtpye", "'dtype'"],
    ),
    Case(
        name="a teacher with a model and a server",
        command="distill",
        arguments=["teachers=[{{model_name_or_path: {models.good}, server: {{url: 'http://127.0.0.1:1'}}}}]"],
        says=["either model_name_or_path or server"],
    ),
    Case(
        name="the whole vocabulary over HTTP",
        command="distill",
        arguments=["teachers=[{{server: {{url: 'http://127.0.0.1:1'}}}}]", "loss_support=full"],
        says=["loss_support", "server", "got full"],
    ),
    Case(
        name="two teachers and no column",
        command="distill",
        arguments=["teacher_model_name_or_path={models.good}", "teachers=[{{model_name_or_path: x, name: x}}]"],
        says=["teacher_column", "'x'"],
    ),
    Case(
        name="no completions in the dataset",
        command="distill",
        arguments=["teacher_model_name_or_path={models.good}", "lmbda=0.5"],
        says=["'completion'", "answer"],
    ),
    Case(
        name="importance weights of what was not sampled",
        command="distill",
        arguments=["teacher_model_name_or_path={models.good}", "lmbda=0.5", "distillation_objective=iw_opd"],
        says=["lmbda must be 1", "iw_opd"],
    ),
    Case(
        name="TRL's whole vocabulary",
        command="distill",
        arguments=["teacher_model_name_or_path={models.good}", "loss_top_k=0"],
        says=["loss_top_k", "loss_support=full"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_a_wrong_configuration_is_refused_before_anything_starts(
    case: Case, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, models, case)
    arguments = [argument.format(models=models, tmp=tmp_path) for argument in case.arguments]
    refuse([case.command, "--config", str(config), *arguments], case.says, folder=tmp_path, capsys=capsys)


@pytest.mark.parametrize("case", CASES[::12], ids=[case.name.replace(" ", "-") for case in CASES[::12]])
def test_a_dry_run_refuses_what_a_run_would_refuse(
    case: Case, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, models, case)
    overrides = [argument.format(models=models, tmp=tmp_path) for argument in case.arguments]
    arguments = [case.command, "--config", str(config), "--dry-run", *overrides]
    refuse(arguments, case.says, folder=tmp_path, capsys=capsys)


FILES = {
    "a key that stands twice": ("seed: 1\nseed: 2\n", ["'seed'", "twice", "line 2"]),
    "no YAML": ("seed: [1\n", ["YAML"]),
    "no mapping": ("- seed\n", ["list"]),
}


@pytest.mark.parametrize("name", FILES, ids=[name.replace(" ", "-") for name in FILES])
def test_a_file_that_is_no_configuration_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, says = FILES[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    refuse(["async-grpo", "--config", str(path)], ["config.yaml", *says], folder=tmp_path, capsys=capsys)


COMMANDS = {
    "unknown pipeline": (["async-gpro", "--config", "x.yaml"], ["'async-gpro'", "'async-grpo'"]),
    "no command": ([], ["COMMAND"]),
    "no configuration": (["async-grpo"], ["model_name_or_path"]),
    "unknown flag": (["grpo", "--config", "x.yaml", "--dry-rum"], ["--dry-rum"]),
    "configuration not there": (["grpo", "--config", "nope.yaml"], ["nope.yaml"]),
    "configuration is a folder": (["grpo", "--config", "."], ["folder"]),
    "resume of nothing": (["resume", "nope"], ["nope"]),
    "resume of no run": (["resume", "."], ["metrics.jsonl"]),
    "report of nothing": (["report", "nope"], ["nope"]),
}


@pytest.mark.parametrize("name", COMMANDS, ids=[name.replace(" ", "-") for name in COMMANDS])
def test_a_wrong_command_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, says = COMMANDS[name]
    refuse(arguments, says, folder=tmp_path, capsys=capsys)


def test_a_run_directory_that_holds_a_run_stays_as_it_is(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, models, Case(name="good", says=[]))
    run = tmp_path / "run"
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    says = [str(run), "trl-ray resume", "overwrite_output_dir"]
    before = contents(tmp_path)
    assert main(["grpo", "--config", str(config)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("trl-ray: ") and "Traceback" not in message
    assert all(text in message for text in says), message
    assert contents(tmp_path) == before


def test_a_folder_with_other_files_is_never_overwritten(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, models, Case(name="good", says=[]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("ten years of work")
    arguments = ["grpo", "--config", str(config), "overwrite_output_dir=true"]
    refuse(arguments, ["output_dir", "other files"], folder=tmp_path, capsys=capsys)


def test_an_output_directory_that_is_a_file_is_refused(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, models, Case(name="good", says=[]))
    (tmp_path / "run").write_text("a file")
    refuse(["grpo", "--config", str(config)], ["output_dir", "file"], folder=tmp_path, capsys=capsys)


def run_command(arguments: Sequence[str], *, folder: Path, ray_tmpdir: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, for what starts or joins Ray."""
    return subprocess.run(
        [sys.executable, "-m", "trl_ray.cli.main", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_TMPDIR": ray_tmpdir, "PYTHONPATH": str(ROOT)},
    )


def test_a_plan_that_does_not_fit_the_cluster_is_refused_with_a_table(
    models: Models, tmp_path: Path, ray_tmpdir: str
) -> None:
    config = write_config(tmp_path, models, Case(name="good", says=[], changes={"runtime": {"kind": "ray"}}))
    before = contents(tmp_path)
    done = run_command(
        ["grpo", "--config", str(config), "runtime.num_cpus=1", "rollout.num_cpus=8", "rollout.num_gpus=1"],
        folder=tmp_path,
        ray_tmpdir=ray_tmpdir,
    )
    assert_one_message(done.stderr, ["CPU: wants 9", "has 1", "GPU: wants 1", "has 0", "rollout 1 x 8"])
    assert (done.returncode, done.stdout, contents(tmp_path)) == (2, "", before)


def test_a_cluster_that_does_not_answer_is_refused_at_once(models: Models, tmp_path: Path, ray_tmpdir: str) -> None:
    with socket.socket() as taken:
        # Bound but not listening: nobody else can take the port, and nobody answers there.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        changes = {"runtime": {"kind": "ray", "address": address}}
        config = write_config(tmp_path, models, Case(name="good", says=[], changes=changes))
        before = contents(tmp_path)
        done = run_command(["grpo", "--config", str(config)], folder=tmp_path, ray_tmpdir=ray_tmpdir)
    assert_one_message(done.stderr, ["runtime.address", address, "ray start"])
    assert (done.returncode, done.stdout, contents(tmp_path)) == (2, "", before)
