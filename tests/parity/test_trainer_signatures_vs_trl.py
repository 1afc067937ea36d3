"""Every argument of every trainer of TRL's is taken, or answered with a sentence that says what to do."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from dataset_runs import pipeline, rows
from runs import PROMPTS
from tiny_models import build_tiny_model, build_tokenizer, random_model
from trl_ray.errors import ConfigError
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.run.trainer_methods import TrainerMethods

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
TRAINERS = {
    "sft": "trl:SFTTrainer",
    "dpo": "trl:DPOTrainer",
    "kto": "trl:KTOTrainer",
    "reward": "trl:RewardTrainer",
    "grpo": "trl:GRPOTrainer",
    "rloo": "trl:RLOOTrainer",
    "distill": "trl:DistillationTrainer",
    "cpo": "trl.experimental.cpo:CPOTrainer",
    "orpo": "trl.experimental.orpo:ORPOTrainer",
    "sdpo": "trl.experimental.sdpo:SDPOTrainer",
    "async-grpo": "trl.experimental.async_grpo:AsyncGRPOTrainer",
}


def arguments() -> list[tuple[str, str]]:
    found = []
    for name, path in TRAINERS.items():
        module, _, trainer = path.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = getattr(importlib.import_module(module), trainer)
        found += [(name, argument) for argument in inspect.signature(kind.__init__).parameters if argument != "self"]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def example(argument: str, name: str, model: str) -> Any:
    """A value that a user would give."""
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PrinterCallback

    values: dict[str, Any] = {
        "model": model,
        "ref_model": model,
        "teacher_model": model,
        "args": PIPELINES[name].config_class(model_name_or_path=model),
        "reward_funcs": [len],
        "reward_processing_classes": [None],
        "processing_class": build_tokenizer(),
        "train_dataset": PROMPTS,
        "eval_dataset": PROMPTS,
        "callbacks": [PrinterCallback()],
        "optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), None),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "peft_config": LoraConfig(r=2),
        "model_init": random_model,
    }
    return values.get(argument, str)


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_an_argument_is_taken_or_answered(name: str, argument: str, model: str, tmp_path: Path) -> None:
    kind: Any = PIPELINES[name]
    given = {argument: example(argument, name, model)}
    if argument not in ("model", "model_init"):
        given["model"] = model
    if argument == "quantization_config":
        given["peft_config"] = example("peft_config", name, model)
    if argument == "ref_model":
        given["args"] = kind.config_class(output_dir=str(tmp_path))
    if argument == "reward_processing_classes":
        given["reward_funcs"] = [len]
    try:
        kind(**given)
    except ConfigError as error:
        assert re.match(rf"{argument} must be None here, got a \w+: .+\.$", str(error)), str(error)


def test_dpo_takes_its_reference_where_trl_has_it_and_its_options_where_the_others_do(
    model: str, tmp_path: Path
) -> None:
    kind: Any = PIPELINES["dpo"]
    args = kind.config_class(output_dir=str(tmp_path))
    assert kind(model, model, args).config.ref_model_name_or_path == model
    # What follows stands in another order there, and is to be named.
    with pytest.raises(ConfigError, match=r"At most ref_model, args may follow .* got 4 arguments. Name"):
        kind(model, model, args, None, rows("dpo", 2))
    ours = kind(model, args, rows("dpo", 2), ref_model=model)
    assert ours._inputs.train_dataset == rows("dpo", 2) and ours.config.ref_model_name_or_path == model


UNASKED = {
    "add_callback", "create_model_card", "evaluate", "is_local_process_zero", "is_world_process_zero", "log_metrics",
    "pop_callback", "predict", "push_to_hub", "remove_callback", "save_metrics", "save_model", "save_state", "train",
    "get_train_dataloader", "get_eval_dataloader", "hyperparameter_search", "compute_loss", "training_step",
}  # fmt: skip
"""Methods of transformers' trainer that scripts call."""


@pytest.mark.parametrize("method", sorted(UNASKED))
def test_a_method_that_scripts_call_takes_what_theirs_takes_or_says_what_to_do(
    method: str, model: str, tmp_path: Path
) -> None:
    made = pipeline("sft", model, tmp_path / "run")
    if not hasattr(type(made), method):
        with pytest.raises(AttributeError, match=rf"SFTPipeline has no {method}: .+\."):
            getattr(made, method)
        return
    wanted = [name for name in inspect.signature(getattr(Trainer, method)).parameters if name != "self"]
    found = inspect.signature(getattr(made, method)).parameters
    keywords = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found.values())
    if method != "create_model_card":  # which has a dozen words for the text of the card
        assert [name for name in found if name not in ("card", "more")] == [name for name in wanted if name != "kwargs"]
    assert "kwargs" not in wanted or keywords


def test_a_script_around_training_does_what_it_does_with_trl(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    class Steps:
        def on_step_end(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
            seen.append(state.global_step)

    trainer = pipeline("sft", model, tmp_path / "run", max_steps=2)
    trainer.add_callback(Steps())
    assert trainer.processing_class.eos_token == "<|im_end|>" and trainer.args.max_steps == 2
    result = trainer.train(resume_from_checkpoint=None)
    metrics = dict(result.metrics) | {"train_samples": len(trainer.train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        trainer.create_model_card(dataset_name="a/b", tags=["t1"])
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(trainer.args.output_dir)
    run = tmp_path / "run"
    assert seen == [1, 2] and trainer.state.global_step == result.global_step == 2
    assert result.training_loss == pytest.approx(sum(line["loss"] for line in trainer.state.log_history) / 2)
    assert "train_samples" in capsys.readouterr().out
    assert {"train_results.json", "all_results.json", "trainer_state.json", "README.md", "model.safetensors"} <= {
        file.name for file in run.iterdir()
    }
    assert "- t1" in (run / "README.md").read_text() and "a/b" in (run / "README.md").read_text()
    again = trainer.train(resume_from_checkpoint=True)
    assert again.steps == 2 and again.model == result.model
    with pytest.raises(ConfigError, match="output_dir must be new or empty"):
        pipeline("sft", model, run).train()
    assert isinstance(trainer, TrainerMethods)
