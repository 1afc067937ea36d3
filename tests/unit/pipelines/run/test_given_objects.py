"""What TRL's trainers take as objects: folders beside the run for weights, options for the rest, or a reason."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset_runs import rows, values
from runs import PROMPTS
from tiny_models import build_tiny_model, build_tokenizer, random_model
from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import DPOConfig, SFTConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ConfigError
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
    with pytest.raises(ConfigError, match=r"compute_metrics must be None here.*on_evaluate"):
        GRPOPipeline(model=model, reward_funcs=len, compute_metrics=lambda prediction: {})
    with pytest.raises(ConfigError, match=r"data_collator must be None here.*packed without padding"):
        sft(tmp_path, model=model, data_collator=list)
    with pytest.raises(ConfigError, match="Did you mean 'processing_class'"):
        sft(tmp_path, model=model, procesing_class=build_tokenizer())
    with pytest.raises(ConfigError, match="processing_class needs a model"):
        sft(tmp_path, processing_class=build_tokenizer())
    assert trainer_objects(compute_metrics=None, data_collator=None).compute_metrics is None


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
