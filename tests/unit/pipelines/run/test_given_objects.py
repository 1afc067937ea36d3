"""What TRL's trainers take as objects: folders beside the run for weights, options for the rest, or a reason."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dataset_runs import rows, values
from runs import PROMPTS
from tiny_models import build_tiny_model, build_tokenizer, random_model
from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import DPOConfig, SFTConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ConfigError, ModelError
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.preference import DPOPipeline
from trl_ray.pipelines.rollouts.reward_model_actors import name_reward_models
from trl_ray.pipelines.run.given_objects import GivenFolders, trainer_objects
from trl_ray.pipelines.sft import SFTPipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def sft(tmp_path: Path, **given: Any) -> SFTPipeline:
    options = {key: value for key, value in values("", tmp_path / "run").items() if key != "model_name_or_path"}
    return SFTPipeline(args=build(SFTConfig, options), train_dataset=rows("sft", 8), **given)


def test_a_model_that_was_given_lies_beside_the_run_and_is_gone_unless_the_run_starts(tmp_path: Path) -> None:
    pipeline = sft(tmp_path, model=random_model(), processing_class=build_tokenizer())
    assert list(tmp_path.iterdir()) == []
    pipeline.prepare()
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith("run-model-") and str(folder) == pipeline.config.model_name_or_path
    del pipeline
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_the_model_of_a_run_that_started_stays(tmp_path: Path) -> None:
    folders = GivenFolders(str(tmp_path / "run"))
    folder = Path(folders.add("model", random_model(), build_tokenizer()))
    folders.write(ModelConfig())
    folders.keep()
    del folders
    gc.collect()
    assert (folder / "model.safetensors").is_file()


def test_a_formatting_function_makes_the_texts_that_are_trained(tmp_path: Path, model: str) -> None:
    plan = sft(tmp_path, model=model, formatting_func=lambda row: "text: " + row["completion"]).prepare()
    assert plan.train is not None
    [sample] = plan.train.examples[0].samples
    tokenizer = build_tokenizer()
    trained = tokenizer.decode([*sample.prompt_ids, *sample.completion_ids])
    assert trained == "text: " + rows("sft", 1)[0]["completion"] + "<|im_end|>"


def test_a_formatting_function_makes_texts_of_rows_that_the_configuration_names(tmp_path: Path, model: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("sft", 8)))
    options = {**values(model, tmp_path / "run"), "dataset_name": str(path)}
    pipeline = SFTPipeline(args=build(SFTConfig, options), formatting_func=lambda row: "text: " + row["completion"])
    train = pipeline.prepare().train
    assert train is not None
    [sample] = train.examples[0].samples
    trained = build_tokenizer().decode([*sample.prompt_ids, *sample.completion_ids])
    assert trained == "text: " + rows("sft", 1)[0]["completion"] + "<|im_end|>"


def test_a_formatting_function_is_given_renamed_rows_and_those_that_are_held_out(tmp_path: Path, model: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"a": str(n), "b": "x"}) + "\n" for n in range(8)))
    options = {**values(model, tmp_path / "run"), "dataset_name": str(path), "eval_steps": 1}
    options |= {"column_mapping": {"a": "said"}, "test_split_size": 0.25}
    pipeline = SFTPipeline(args=build(SFTConfig, options), formatting_func=lambda row: "text: " + row["said"])
    plan = pipeline.prepare()
    assert plan.train is not None
    tokens = [sample.completion_ids for found in (plan.train, plan.held_out[""]) for e in found.examples
              for sample in e.samples]  # fmt: skip
    said = [build_tokenizer().decode(ids).removesuffix("<|im_end|>")[-1] for ids in tokens]
    assert (len(plan.train), len(plan.held_out[""]), sorted(said)) == (6, 2, list("01234567"))


def test_a_reference_may_be_another_model(tmp_path: Path, model: str) -> None:
    options = build(DPOConfig, values(model, tmp_path / "run"))
    pipeline = DPOPipeline(args=options, train_dataset=rows("dpo", 8), ref_model=model)
    assert pipeline.prepare().config.ref_model_name_or_path == model
    given = DPOPipeline(
        args=options, train_dataset=rows("dpo", 8), ref_model=random_model(), processing_class=build_tokenizer()
    )
    assert "run-reference-" in str(given.prepare().config.ref_model_name_or_path)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs must be false with ref_model_name_or_path"):
        DPOPipeline(
            args=options.replace(precompute_ref_log_probs=True), train_dataset=rows("dpo", 8), ref_model=model
        ).prepare()
    with pytest.raises(ConfigError, match="ref_model_name_or_path must be left out"):
        sft(tmp_path, model=model, ref_model=model).prepare()


def test_optimizers_become_options(tmp_path: Path, model: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.25, momentum=0.5)
    config = sft(tmp_path, model=model, optimizers=(optimizer, None)).config
    assert (config.optim, config.learning_rate, config.optim_args) == ("sgd", 0.25, {"momentum": 0.5})


def test_what_cannot_be_had_is_refused_with_what_to_do(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match=r"preprocess_logits_for_metrics must be None here.*Remove it"):
        GRPOPipeline(model=model, reward_funcs=len, preprocess_logits_for_metrics=lambda logits, labels: logits)
    with pytest.raises(ConfigError, match=r"data_collator must be None here.*packed without padding"):
        sft(tmp_path, model=model, data_collator=list)
    with pytest.raises(ConfigError, match="Did you mean 'processing_class'"):
        sft(tmp_path, model=model, procesing_class=build_tokenizer())
    with pytest.raises(ConfigError, match="processing_class needs a model"):
        sft(tmp_path, processing_class=build_tokenizer())
    assert trainer_objects(tools=None, data_collator=None).tools is None


def test_reward_models_as_objects_are_named_by_their_folders(tmp_path: Path) -> None:
    folders = GivenFolders(str(tmp_path / "run"))
    scores, tokenizer = random_model(), build_tokenizer()
    named, written = name_reward_models([len, scores, "accuracy"], [None, tokenizer, None], folders)
    assert named is not None and named[0] is len and named[2] == "accuracy"
    assert written == {named[1]} and "run-reward1-" in named[1]
    with pytest.raises(ConfigError, match=r"reward_funcs must be names, functions or models.*got a Linear"):
        name_reward_models(torch.nn.Linear(2, 1), None, folders)
    with pytest.raises(ConfigError, match="one entry for each of the 2 reward_funcs"):
        name_reward_models([len, len], [None], folders)


def test_a_pipeline_takes_a_reward_model_among_its_functions_with_its_weight(tmp_path: Path, model: str) -> None:
    config = build(GRPOConfig, {"model_name_or_path": model, "output_dir": str(tmp_path / "run")})
    pipeline = GRPOPipeline(
        args=config.replace(reward_weights=[0.5, 2.0]),
        reward_funcs=[len, random_model()],
        reward_processing_classes=[None, build_tokenizer()],
        train_dataset=PROMPTS,
    )
    [scoring] = pipeline.config.scoring_models
    assert "run-reward1-" in str(scoring.model_name_or_path) and scoring.weight == 2.0
    assert pipeline.config.reward_weights == [0.5]


def test_a_model_with_an_adapter_is_trained_on_and_keeps_what_was_changed_of_it(tmp_path: Path, model: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: value.clone() for name, value in peft.get_peft_model_state_dict(wrapped).items()}
    output = sft(tmp_path, model=wrapped, processing_class=AutoTokenizer.from_pretrained(model)).train()
    saved = load_file(output.model / "adapter_model.safetensors")
    assert saved.keys() == before.keys()
    moved = max(float((saved[name] - value).abs().max()) for name, value in before.items())
    # Four steps of Adam at 1e-3: the adapter that was given has moved a little, and was not drawn anew.
    assert 0 < moved < 0.01
    with pytest.raises(ConfigError, match=r"peft_config must be None with a PeftModel.*merge_and_unload"):
        sft(tmp_path, model=wrapped, peft_config=peft.LoraConfig(r=2))


def test_a_resized_model_with_more_tokens_and_another_template_is_saved_as_it_was_given(
    tmp_path: Path, model: str
) -> None:
    given, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<tool>"])
    given.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    given.config.kept = "by hand"
    output = sft(tmp_path, model=given.to(torch.bfloat16), processing_class=tokenizer).train()
    found, config = AutoModelForCausalLM.from_pretrained(output.model), AutoConfig.from_pretrained(output.model)
    assert found.get_input_embeddings().weight.shape[0] == len(tokenizer) and found.dtype is torch.bfloat16
    assert config.kept == "by hand"
    again = AutoTokenizer.from_pretrained(output.model)
    assert (
        again.chat_template == tokenizer.chat_template and again.convert_tokens_to_ids("<tool>") == len(tokenizer) - 1
    )


@pytest.mark.parametrize(
    "other",
    [
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        peft.AdaLoraConfig(r=4, target_modules=["q_proj"], total_step=10),
        {"r": 4},
    ],
    ids=lambda each: type(each).__name__,
)
def test_adapters_of_other_kinds_are_answered(tmp_path: Path, model: str, other: Any) -> None:
    with pytest.raises(ModelError, match=rf"must be a peft\.LoraConfig, got {type(other).__name__}\. Other kinds"):
        sft(tmp_path, model=model, peft_config=other)
