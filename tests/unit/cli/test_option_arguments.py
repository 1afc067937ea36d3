"""Options on the command line: in TRL's way and in ours, and the page that lists them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from trl_ray.cli.main import main
from trl_ray.cli.option_arguments import read_options
from trl_ray.cli.option_help import options_of
from trl_ray.config.load import apply_overrides, build
from trl_ray.config.runs.config_registry import CONFIGS
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.teacher_options import TeacherServeConfig
from trl_ray.errors import ConfigError
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.run.pipeline import Pipeline


def read(config_class: Any, line: str) -> dict[str, Any]:
    """What a command line sets."""
    return apply_overrides({}, read_options(line.split(), config_class))


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("--learning_rate 1e-5 --max_steps -1", {"learning_rate": 1e-5, "max_steps": -1}),
        ("--learning_rate=1e-5", {"learning_rate": 1e-5}),
        ("--learning-rate 2e-5", {"learning_rate": 2e-5}),
        ("learning_rate=1e-5 --seed 3 runtime.num_learners=2", {"learning_rate": 1e-5, "seed": 3,
                                                                "runtime": {"num_learners": 2}}),
        ("--runtime.num_learners 2 --runtime.kind local", {"runtime": {"num_learners": 2, "kind": "local"}}),
        ("--packing --use_peft", {"packing": True, "use_peft": True}),
        ("--packing true --use_peft False", {"packing": True, "use_peft": False}),
        ("--no_gradient_checkpointing", {"gradient_checkpointing": False}),
        ("--lora_target_modules q_proj v_proj seed=3", {"lora_target_modules": ["q_proj", "v_proj"], "seed": 3}),
        ("--lora_modules_to_save norm", {"lora_modules_to_save": ["norm"]}),
        ("--lora_modules_to_save=[norm,head]", {"lora_modules_to_save": ["norm", "head"]}),
        # A text stays one whatever it looks like.
        ("--run_name 007 --dataset_name 1e5 --output_dir no", {"run_name": "007", "dataset_name": "1e5",
                                                               "output_dir": "no"}),
        ("--run_name \U0001f600 --lora_target_modules é \U0001f600", {"run_name": "\U0001f600",
                                                                  "lora_target_modules": ["é", "\U0001f600"]}),
        # What has a = in it is a value where one must come, and else an override.
        ("--run_name lr=1e-5 --dataset_name a=b seed=3", {"run_name": "lr=1e-5", "dataset_name": "a=b", "seed": 3}),
        ("--optim_args momentum=0.9,nesterov=true", {"optim_args": "momentum=0.9,nesterov=true"}),
        ("--wandb_run_name lr=1e-5 --use_unsloth seed=3", {"wandb_run_name": "lr=1e-5", "use_unsloth": True,
                                                           "seed": 3}),
        ("--lora_target_modules q_proj learning_rat=3", {"lora_target_modules": ["q_proj"], "learning_rat": 3}),
        # All words of transformers' command line for true and false.
        ("--packing 1 --use_peft f --bf16 Yes --shuffle_dataset N", {"packing": True, "use_peft": False, "bf16": True,
                                                                     "shuffle_dataset": False}),
        ("--no-gradient-checkpointing --no_remove_unused_columns --no_cuda",
         {"gradient_checkpointing": False, "remove_unused_columns": False, "no_cuda": True}),
        ("--resume_from_checkpoint runs/1 --report_to wandb tensorboard --eval_strategy no",
         {"resume_from_checkpoint": "runs/1", "report_to": ["wandb", "tensorboard"], "eval_strategy": False}),
        ('--gradient_checkpointing_kwargs {"use_reentrant":false}', {"gradient_checkpointing_kwargs": {
            "use_reentrant": False}}),
        ("--adam_beta1=-1 --seed -3", {"adam_beta1": -1, "seed": -3}),
        # None of ours: as YAML reads it, and taken as it is.
        ("--lora_rank 8 --use_unsloth", {"lora_rank": 8, "use_unsloth": True}),
    ],
)  # fmt: skip
def test_what_is_written_in_trls_way_is_the_same_as_in_ours(line: str, values: dict[str, Any]) -> None:
    assert read(SFTConfig, line) == values


COMMANDS: list[tuple[str, str, dict[str, Any]]] = [
    ("sft", "--model_name_or_path org/base --dataset_name org/chats --learning_rate 2.0e-5 --packing "
     "--num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --eos_token <|im_end|> "
     "--eval_strategy steps --eval_steps 100 --output_dir base-SFT --push_to_hub --use_peft --lora_r 32 "
     "--lora_alpha 16",
     {"learning_rate": 2e-5, "eos_token": "<|im_end|>", "eval_steps": 100, "push_to_hub": True, "lora_r": 32}),
    ("dpo", "--dataset_name org/pairs --model_name_or_path org/chat --learning_rate 5.0e-7 --max_steps 1000 "
     "--eval_strategy steps --eval_steps 50 --output_dir chat-DPO --no_remove_unused_columns "
     "--dataset_train_split train_prefs --dataset-test-split test_prefs "
     "--loss_type sigmoid bco_pair --loss_weights 0.8 0.2 --report_to none",
     {"max_steps": 1000, "dataset_test_split": "test_prefs", "loss_type": ("sigmoid", "bco_pair"), "report_to": []}),
    ("kto", "--dataset_name org/rated --model_name_or_path=org/chat --learning_rate 5e-7 --lr_scheduler_type=cosine "
     "--eval_steps 500 --output_dir=kto-lora --warmup_steps 0.1 --logging_first_step --use_peft --load_in_4bit "
     "--lora_target_modules=all-linear --lora_r=16 --lora_alpha=16",
     {"warmup_steps": 0.1, "logging_first_step": True, "load_in_4bit": True, "lora_target_modules": ["all-linear"]}),
    ("reward", "--model_name_or_path org/chat --dataset_name org/pairs --output_dir r --gradient_checkpointing True "
     '--gradient_checkpointing_kwargs {"use_reentrant":false} --eval_strategy steps --eval_steps 50 '
     "--max_length 2048 --lora_task_type SEQ_CLS", {"gradient_checkpointing": True, "max_length": 2048}),
    ("grpo", "--model_name_or_path org/chat --dataset_name org/math --reward_funcs think_format_reward "
     "get_soft_overlong_punishment my_lib.rewards.custom --use_vllm --vllm_mode colocate --log_completions "
     "--num_generations 4 --max_completion_length 64 --bf16 --dtype bfloat16 --beta 0.0 --optim adamw_torch",
     {"num_generations": 4, "bf16": True, "dtype": "bfloat16",
      "reward_funcs": ["think_format", "soft_overlong(max_completion_len=1280, soft_punish_cache=256)",
                       "my_lib.rewards:custom"]}),
    ("rloo", "--model_name_or_path org/chat --dataset_name org/math --reward_model_name_or_path org/judge "
     "--no-shuffle-dataset --temperature 0.9 --steps_per_generation 2",
     {"reward_model_name_or_path": "org/judge", "shuffle_dataset": False, "temperature": 0.9}),
    ("sdpo", "--model_name_or_path org/math --dataset_name org/gsm --dataset_config main --output_dir outputs/sdpo "
     "--learning_rate 5e-5 --dtype bfloat16 --bf16 true --max_completion_length 128 --use_peft "
     "--lora_target_modules q_proj k_proj v_proj o_proj --per_device_train_batch_size 1 "
     "--gradient_accumulation_steps 2 --num_generations 8 --generation_batch_size 32 "
     "--distillation_alpha 1.0 --distillation_mode sampled_token "
     "--distillation_weight 0.5 --report_to none --eval_strategy steps --eval_steps 1000 --save_strategy no",
     {"generation_batch_size": 32, "distillation_mode": "sampled_token", "save_strategy": "no", "bf16": True}),
]  # fmt: skip


@pytest.mark.parametrize(("command", "line", "ours"), COMMANDS, ids=[each[0] for each in COMMANDS])
def test_a_command_of_trls_users_is_a_configuration(command: str, line: str, ours: dict[str, Any]) -> None:
    config = build(CONFIGS[command], read(CONFIGS[command], line))
    assert {name: getattr(config, name) for name in ours} == ours


def test_an_option_of_lists_takes_one_value_as_a_list_of_it() -> None:
    assert read(GRPOConfig, "--reward_funcs think_format --stop END STOP --reward_weights 1 0.5") == {
        "reward_funcs": ["think_format"],
        "stop": ["END", "STOP"],
        "reward_weights": [1, 0.5],
    }


def test_a_value_in_json_is_a_mapping() -> None:
    [override] = read_options(["--model_init_kwargs", '{"dtype": "bfloat16"}'], SFTConfig)
    assert build(SFTConfig, apply_overrides({}, [override])).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rate", "--learning_rate needs a value"),
        ("--packing learning_rate=1 --lora_r", "--lora_r needs a value"),
        ("--seed 3 4=5", "--seed takes one value, got 3 4=5"),
        ("--learning_rate 1 2", "--learning_rate takes one value, got 1 2"),
        ("1e-5 --seed 3", "unrecognized arguments: 1e-5"),
    ],
)
def test_what_belongs_to_no_option_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(SFTConfig, line)


@pytest.mark.parametrize("name", [*PIPELINES, "teacher-serve"])
def test_every_option_has_a_type_a_default_and_a_sentence_on_the_page(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PIPELINES[name].config_class if name in PIPELINES else TeacherServeConfig
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    for path, _, _, sentence in options_of(config):
        assert f"\n  {path}: " in page and len(sentence) > 6, path
        if "class" not in sentence:
            assert "<class" not in sentence and "`" not in sentence, path
    assert "typing." not in page and "<class" not in page


@pytest.mark.parametrize("line", [[], ["--help"], ["sft", "--help"], ["sdpo", "--config"], ["env"]], ids=" ".join)
def test_who_reads_may_have_seen_enough(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []
    for name in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        streams.append(os.fdopen(writing, "w", encoding="utf-8"))
        monkeypatch.setattr(sys, name, streams[-1])
    try:
        code = main(line)
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    assert code == (2 if line in ([], ["sdpo", "--config"]) else 0)
    for stream in streams:
        stream.close()  # as Python does when it ends; this raised


def test_the_page_of_options_needs_no_library_that_computes() -> None:
    code = (
        "import sys; from trl_ray.cli.main import main\n"
        f"for name in {[*PIPELINES, 'teacher-serve']}: assert main([name, '--help']) == 0\n"
        "print(sorted({'torch', 'transformers', 'ray', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_the_registries_of_configurations_and_pipelines_are_of_the_same_names() -> None:
    assert {name: pipeline.config_class for name, pipeline in PIPELINES.items()} == dict(CONFIGS)
    assert [*PIPELINES] == [*CONFIGS]


def test_a_run_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train(self: Any) -> None:
        seen.append(self.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "train", train)
    main(["sft", "--model_name_or_path", "none", "--packing", "max_length=64", "--logging-steps", "0.5"])
    [config] = seen
    assert (config.model_name_or_path, config.packing, config.max_length) == ("none", True, 64)
    assert config.logging_steps == 0.5


def test_variables_under_env_are_set_before_any_library_reads_them(tmp_path: Any) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("env: {TRL_RAY_TEST: here}\nmodel_name_or_path: none\n")
    code = (
        "import os, sys, builtins; from trl_ray.cli.main import main; real = builtins.__import__\n"
        "def spy(name, *rest):\n"
        "    if name.split('.')[0] in ('torch', 'transformers'): print(os.environ.get('TRL_RAY_TEST')); os._exit(0)\n"
        "    return real(name, *rest)\n"
        f"builtins.__import__ = spy; main(['sft', '--config', {str(file)!r}])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "here\n"


def test_variables_under_env_are_set_and_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    seen: list[Any] = []

    def train(self: Any) -> None:
        seen.append(self.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "train", train)
    monkeypatch.setenv("TRL_RAY_TEST", "before")
    monkeypatch.setenv("TRL_RAY_INHERITED", "")
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "none", "env": {"TRL_RAY_TEST": 5}}))
    assert main(["sft", "--config", str(file)]) == 130
    assert os.environ["TRL_RAY_TEST"] == "5"
    assert "env" not in seen[0].model_dump()
    file.write_text("env: [1]\n")
    assert main(["sft", "--config", str(file)]) == 2
