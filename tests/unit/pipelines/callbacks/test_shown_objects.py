"""What a callback of transformers may read: every attribute is there, or the error says where to look."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState, TrainingArguments

import dataset_runs
from runs import events
from tiny_models import build_tiny_model
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.errors import CallbackError
from trl_ray.pipelines.callbacks.hooks import TrainerState as ShownState
from trl_ray.pipelines.callbacks.shown_objects import ShownArguments, with_their_names


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def run(model: str, folder: Path, callback: Any, **changes: Any) -> Any:
    return dataset_runs.train("sft", model, folder, inputs={"callbacks": [callback]}, max_steps=2, **changes)


READ = [field.name for field in dataclasses.fields(TrainingArguments)] + [
    "world_size", "process_index", "local_process_index", "n_gpu", "device", "train_batch_size", "eval_batch_size",
    "should_save", "should_log",
]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_option_of_transformers_can_be_read(name: str) -> None:
    getattr(ShownArguments(SFTConfig(output_dir="somewhere")), name)


def test_options_are_the_runs_own_and_the_rest_is_what_transformers_has_by_default() -> None:
    args = ShownArguments(SFTConfig(output_dir="somewhere", learning_rate=0.5, warmup_steps=0.25, eval_steps=3))
    assert (args.learning_rate, args.output_dir, args.packing) == (0.5, "somewhere", False)
    assert (args.auto_find_batch_size, args.get_warmup_steps(8), args.eval_strategy) == (False, 2, "steps")
    assert isinstance(args, SFTConfig)
    assert json.loads(args.to_json_string())["learning_rate"] == args.to_dict()["learning_rate"] == 0.5
    with pytest.raises(AttributeError, match=r"args has no learning_rat\. Did you mean learning_rate\?"):
        args.learning_rat  # noqa: B018


def test_the_state_has_all_that_transformers_has(tmp_path: Path) -> None:
    for field in dataclasses.fields(TrainerState):
        assert hasattr(ShownState(), field.name), field.name
    ShownState(global_step=3).save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")).global_step == 3


class Reads(TrainerCallback):
    """Looks at everything that a user looks at."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.rates: list[float] = []

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any,
        processing_class: Any,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        self.seen = {
            "type": model.config.model_type,
            "parameters": model.num_parameters(),
            "eos": processing_class.eos_token,
            "batches": len(train_dataloader),
            "rows": len(train_dataloader.dataset),
            "keys": sorted(kwargs),
        }

    def on_step_end(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        self.rates.append(lr_scheduler.get_last_lr()[0])
        assert optimizer.param_groups[0]["lr"] == self.rates[-1]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any) -> None:  # type: ignore[override]
        self.seen["logged"] = set(logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / "checkpoints" / f"step-{state.global_step}"
        self.seen["saved"] = (folder / "model.safetensors").is_file()


def test_a_callback_reads_model_tokenizer_loader_and_learning_rate(model: str, tmp_path: Path) -> None:
    reads = Reads()
    run(model, tmp_path / "run", reads, warmup_steps=2)
    seen = reads.seen
    assert (seen["type"], seen["eos"], seen["rows"], seen["saved"]) == ("qwen2", "<|im_end|>", 28, True)
    # 28 rows, 8 a step in two micro-batches: four steps an epoch.
    assert seen["batches"] == 8 and seen["parameters"] > 1000
    assert seen["keys"] == ["eval_dataloader", "lr_scheduler", "optimizer"]
    assert reads.rates[0] < reads.rates[1]
    assert {"loss", "learning_rate", "epoch", "grad_norm"} <= seen["logged"]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda given: given["model"].state_dict(), r"model\.state_dict cannot be had.*on_save"),
        (lambda given: given["model"]([1]), "model cannot be used in a callback: the weights live in the learner"),
        (lambda given: given["optimizer"].state, r"optimizer\.state cannot be had"),
        (lambda given: given["optimizer"].step(), "optimizer cannot be used"),
        (lambda given: given["lr_scheduler"].base_lrs, r"lr_scheduler\.base_lrs cannot be had.*lr_scheduler_type"),
        (lambda given: next(iter(given["train_dataloader"])), r"train_dataloader cannot be used.*Iterate \.dataset"),
    ],
)
def test_what_lives_in_the_learner_is_answered_with_where_to_look(
    use: Any, message: str, model: str, tmp_path: Path
) -> None:
    class Uses:
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            use(given)

    with pytest.raises(CallbackError, match=message):
        run(model, tmp_path / "run", Uses())


def test_hooks_that_nobody_calls_are_told(model: str, tmp_path: Path) -> None:
    class Waits(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise AssertionError("nobody calls it")

    run(model, tmp_path / "run", Waits())
    said = [str(each["detail"]["detail"]) for each in events(tmp_path / "run", "warning")]
    assert [
        each for each in said if "Waits.on_pre_optimizer_step is never called: gradients are in the learner" in each
    ]


def test_lines_have_the_names_of_trl() -> None:
    told = with_their_names({"lr": 0.1, "reward/mean": 2.0, "reward/judge/mean": 3.0, "kl/ref": 0.5}, epoch=1.5)
    assert told == {
        "lr": 0.1, "reward/mean": 2.0, "reward/judge/mean": 3.0, "kl/ref": 0.5, "epoch": 1.5,
        "learning_rate": 0.1, "reward": 2.0, "rewards/judge/mean": 3.0, "kl": 0.5,
    }  # fmt: skip
