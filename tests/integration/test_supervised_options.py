"""Every option of the supervised pipelines, from YAML: each trains, to a finite loss, and moves the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from dataset_runs import WORDS, rows, train, values, write_rows
from runs import ledger, lines
from tiny_models import build_tiny_model
from trl_ray.config.load import load_config
from trl_ray.config.losses.preference_options import CPOLossType, PreferenceLossType
from trl_ray.pipelines.pipeline_registry import PIPELINES

pytestmark = pytest.mark.integration
STEPS = 2
PACKED = {"packing": True, "max_length": 48, "per_device_train_batch_size": 2, "eval_steps": 1}
# Rates are low, because what is learnt too well has no gradient any more.
LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
ON_TURNS = {"assistant_only_loss": True, "dataset_name": "{folder}/chats.jsonl"}
CONVERSATIONS = {"dataset_name": "{folder}/chats.jsonl", "max_length": 40}
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft packed, best fit": ("sft", {**PACKED, "packing_strategy": "bfd"}),
    "sft packed, split": ("sft", {**PACKED, "packing_strategy": "bfd_split", "max_length": 20}),
    "sft packed, wrapped": ("sft", {**PACKED, "packing_strategy": "wrapped", "max_length": 32}),
    "sft packed, but not held out": ("sft", {**PACKED, "eval_packing": False}),
    "sft completions": ("sft", {"completion_only_loss": True}),
    "sft prompts too": ("sft", {"completion_only_loss": False}),
    "sft assistant": ("sft", ON_TURNS),
    "sft assistant, packed": ("sft", {**ON_TURNS, "packing": True, "max_length": 128}),
    "sft texts": ("sft", {"dataset_name": "{folder}/texts.jsonl", "dataset_text_field": "body"}),
    "sft dft": ("sft", {"loss_type": "dft"}),
    "sft smoothed": ("sft", {"label_smoothing_factor": 0.1}),
    "sft noise": ("sft", {"neftune_noise_alpha": 5.0}),
    "sft adapter": ("sft", LORA),
    "sft token budget": ("sft", {"max_tokens_per_micro_batch": 64}),
    "sft end of conversations": ("sft", {**CONVERSATIONS, "truncation_mode": "keep_end"}),
    "sft stream": ("sft", {"dataset_streaming": True, "dataset_name": "{folder}/sft.jsonl", "stream_window": 10}),
    "sft mixture": (
        "sft",
        {
            "datasets": [
                {"path": "{folder}/sft.jsonl", "weight": 3.0},
                {"path": "{folder}/chats.jsonl", "columns": ["messages"]},
            ],
            "mixture_stopping": "all_exhausted",
        },
    ),
    **{
        f"dpo {kind}": ("dpo", {"loss_type": str(kind), "label_smoothing": 0.1 if str(kind) in SMOOTHED else 0.0})
        for kind in PreferenceLossType
    },
    "dpo mpo": ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "dpo forward KL": ("dpo", {"f_divergence_type": "forward_kl"}),
    "dpo Jensen-Shannon": ("dpo", {"f_divergence_type": "js_divergence"}),
    "dpo alpha": ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    "dpo length": ("dpo", {"ld_alpha": 0.4}),
    "dpo length, precomputed": ("dpo", {"ld_alpha": 0.4, "precompute_ref_log_probs": True}),
    "dpo weighted": ("dpo", {"use_weighting": True}),
    "dpo precomputed": ("dpo", {"precompute_ref_log_probs": True, "eval_steps": 1}),
    "dpo synchronised": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "dpo adapter": ("dpo", LORA),
    "dpo adapter, precomputed": ("dpo", {**LORA, "precompute_ref_log_probs": True}),
    "dpo separate prompts": ("dpo", {"share_prompt": "never"}),
    "dpo token budget": ("dpo", {"max_tokens_per_micro_batch": 128}),
    "dpo without prompts": ("dpo", {"dataset_name": "{folder}/implicit.jsonl"}),
    "dpo bfloat16, recomputed": ("dpo", {"bf16": True, "gradient_checkpointing": True}),
    "kto": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7, "eval_steps": 1}),
    "kto apo": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "kto precomputed": ("kto", {"precompute_ref_log_probs": True, "eval_steps": 1}),
    "kto adapter": ("kto", LORA),
    "kto pairs": ("kto", {"dataset_name": "{folder}/pairs.jsonl"}),
    **{f"cpo {kind}": ("cpo", {"loss_type": str(kind)}) for kind in CPOLossType},
    "cpo smoothed": ("cpo", {"label_smoothing": 0.1}),
    "cpo simpo proper": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}),
    "cpo alpha": ("cpo", {"loss_type": "alphapo", "alpha": 0.25}),
    "cpo adapter": ("cpo", LORA),
    "orpo": ("orpo", {"beta": 0.3, "eval_steps": 1}),
    "orpo adapter": ("orpo", LORA),
    "reward": ("reward", {"eval_steps": 1}),
    "reward margins": ("reward", {"dataset_name": "{folder}/margins.jsonl"}),
    "reward centred": ("reward", {"center_rewards_coefficient": 0.01}),
    "reward adapter": ("reward", LORA),
    "reward token budget": ("reward", {"max_tokens_per_micro_batch": 64}),
    "prm": ("prm", {"eval_steps": 1}),
    "prm last step": ("prm", {"train_on_last_step_only": True, "eval_steps": 1}),
    "prm separators": ("prm", {"step_separator": "<|endoftext|>"}),
    "prm long separators": ("prm", {"step_separator": "\n\n"}),
    "prm limits": ("prm", {"max_prompt_length": 4, "max_completion_length": 40}),
    "prm adapter": ("prm", LORA),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of every form that the options name."""
    path, pairs = tmp_path_factory.mktemp("data"), rows("dpo", 20)
    for name in ("sft", "dpo", "kto", "cpo", "orpo", "reward", "prm"):
        write_rows(path / f"{name}.jsonl", rows(name, 20))
    write_rows(path / "chats.jsonl", [{"messages": chat(number)} for number in range(12)])
    write_rows(path / "texts.jsonl", [{"body": " ".join(WORDS[: n % 6 + 1]), "text": 3} for n in range(12)])
    write_rows(path / "pairs.jsonl", pairs)
    implicit = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in pairs]
    write_rows(path / "implicit.jsonl", implicit)
    write_rows(path / "margins.jsonl", [{**row, "margin": 0.5 * place} for place, row in enumerate(pairs)])
    return path


def chat(number: int) -> list[dict[str, str]]:
    """Two exchanges."""
    turns = [("user", f"{number}?"), ("assistant", "one"), ("user", "and?"), ("assistant", " ".join(WORDS[:2]))]
    return [{"role": role, "content": content} for role, content in turns]


def filled(value: Any, folder: Path) -> Any:
    """With the folder of the datasets put in."""
    if isinstance(value, str):
        return value.replace("{folder}", str(folder))
    if isinstance(value, Mapping):
        return {key: filled(inner, folder) for key, inner in value.items()}
    return [filled(inner, folder) for inner in value] if isinstance(value, list) else value


def moved(model: str, run: Path) -> bool:
    """Whether the weights of the last checkpoint, or its adapter's, are others than at the start."""
    checkpoint = run / "checkpoints" / f"step-{STEPS}"
    if (checkpoint / "adapter_model.safetensors").exists():
        with safe_open(checkpoint / "adapter_model.safetensors", framework="np") as kept:
            # LoRA's second factor starts at zero.
            return any(kept.get_tensor(name).any() for name in kept.keys() if "lora_B" in name)  # noqa: SIM118
    with (
        safe_open(checkpoint / "model.safetensors", framework="np") as kept,
        safe_open(Path(model) / "model.safetensors", framework="np") as before,
    ):
        shared = set(kept.keys()) & set(before.keys())
        return any((kept.get_tensor(name) != before.get_tensor(name)).any() for name in shared)


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_trains(case: str, model: str, folder: Path, tmp_path: Path) -> None:
    name, options = OPTIONS[case]
    options = filled(options, folder)
    if options.get("precompute_ref_log_probs"):
        options["ref_log_probs_cache_dir"] = str(tmp_path / "cache")
    if "datasets" not in options:
        options.setdefault("dataset_name", str(folder / f"{name}.jsonl"))
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(values(model, tmp_path / "run", **{"max_steps": STEPS, "learning_rate": 1e-4, **options}))
    )
    chosen: Any = PIPELINES[name]
    held_out = rows(name, 5, start=100) if options.get("eval_steps") else None
    output = chosen(args=load_config(chosen.config_class, path), eval_dataset=held_out).train()
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics)
    assert all(line["learner/skipped_steps"] == 0 for line in metrics)
    if held_out:
        assert all(math.isfinite(line["eval/loss"]) for line in metrics)
    assert output.ledger.balanced and ledger(tmp_path / "run")["live"] == {}
    assert moved(model, tmp_path / "run")


def test_of_a_conversation_the_assistants_turns_are_trained_or_everything(
    model: str, folder: Path, tmp_path: Path
) -> None:
    def tokens(assistant_only_loss: bool) -> float:
        run = tmp_path / str(assistant_only_loss)
        data = {"dataset_name": str(folder / "chats.jsonl"), "shuffle_dataset": False}
        output = train("sft", model, run, max_steps=1, assistant_only_loss=assistant_only_loss, **data)
        return output.metrics["tokens/trained"]

    # 8 chats; a token is a byte, and every turn ends with two: <|im_end|> and a line's end.
    answers = len("one") + 2 + len("one two") + 2
    questions = len("0?") + 2 + len("and?") + 2
    headers = 2 * (1 + len("user\n")) + 2 * (1 + len("assistant\n"))
    assert tokens(True) == 8 * answers
    assert tokens(False) == 8 * (headers + questions + answers - 1)  # nothing predicts the first token
