"""What an engineer outside the package adds without a change inside it: a loss, its options, a pipeline, a teacher."""

from __future__ import annotations

import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dataset_runs
import runs
from fakes import group
from outside_package import best_of
from outside_package.best_of import BestOf, BestOfConfig, BestOfPipeline
from outside_package.reinforce import Reinforce
from outside_package.scaled_loss import ScaledLoss, ScaledOptions
from tiny_models import build_tiny_model
from trl_ray.algorithms import loss_registry
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import Loss, LossInputs, SampleTokens, StepTotals
from trl_ray.algorithms.loss_registry import build_loss, resolve_options
from trl_ray.cli.main import main
from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.errors import ConfigError
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.pipeline_registry import find_pipeline
from trl_ray.pipelines.sdpo import SDPOPipeline

REINFORCE = "outside_package.reinforce:Reinforce"
BEST_OF = "outside_package.best_of:BestOfPipeline"
SCALED = "outside_package.scaled_loss:ScaledLoss"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def two_samples(**totals: float) -> LossInputs:
    """Three tokens of two completions, advantages 2 and -1, log-probs -1, -2, -4; sampled by the policy itself."""
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    return LossInputs(
        tokens=SampleTokens(
            sample_index=torch.tensor([0, 0, 1]),
            num_sequences=2,
            advantages=torch.tensor([2.0, 2.0, -1.0]),
            sampler_logprobs=logprobs.detach().clone(),
        ),
        scores=TokenLogprobs(logprobs=logprobs, entropy=torch.ones(3)),
        micro_batch_tokens=3,
        totals=StepTotals(num_valid_tokens=3, num_samples=2, num_micro_batches=1, named=totals),
    )


def first_step(model: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Metrics of the first step of a real run in this process."""
    pipeline = GRPOPipeline(args=runs.grpo(model, folder, max_steps=1, **options), train_dataset=runs.PROMPTS)
    pipeline.train()
    return runs.lines(folder / "metrics.jsonl")[0]


def test_a_loss_is_found_by_its_path_and_takes_the_options_of_the_section() -> None:
    loss = build_loss(LossConfig(loss=REINFORCE, entropy_coef=0.5))
    assert type(loss) is Reinforce and loss.config.entropy_coef == 0.5
    # -(2 * -1 + 2 * -2 - 1 * -4) / 3 tokens, less half of the mean entropy 1
    assert loss(two_samples()).loss.item() == pytest.approx(2 / 3 - 0.5)


def test_a_loss_has_options_and_totals_of_its_own() -> None:
    loss: Loss = build_loss(LossConfig(loss=SCALED, loss_kwargs={"scale": 3.0, "by_successes": True}, epsilon=0.1))
    assert type(loss) is ScaledLoss and type(loss.config) is ScaledOptions and loss.config.epsilon == 0.1
    plain = build_loss(LossConfig(epsilon=0.1))(two_samples()).loss.item()
    # 3 * 2 samples / 1 success
    assert loss(two_samples(successes=1)).loss.item() == pytest.approx(6 * plain) and plain != 0


def test_options_that_are_resolved_already_are_taken_as_they_are() -> None:
    options = LossConfig(loss=SCALED, loss_kwargs={"scale": 3.0}, epsilon=0.1)
    resolved = resolve_options(options)
    assert resolve_options(resolved) == resolved
    loss: Loss = build_loss(resolved)
    assert (loss.config.scale, loss.config.epsilon) == (3.0, 0.1)


def test_a_loss_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[str] = []

    def find(path: str, **arguments: Any) -> Any:
        looked_for.append(path)
        return ScaledLoss

    monkeypatch.setattr(loss_registry, "find_plug_in", find)
    build_loss(LossConfig(loss=SCALED, loss_kwargs={"scale": 3.0}))
    assert looked_for == [SCALED]


def test_a_surrogate_from_outside_trains_in_a_real_run(model: str, tmp_path: Path) -> None:
    plain, outside = first_step(model, tmp_path / "a"), first_step(model, tmp_path / "b", loss=REINFORCE)
    # At ratio 1 the gradients are the same, the values are not.
    assert outside["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5) and plain["grad_norm"] > 0
    assert outside["loss"] != pytest.approx(plain["loss"], abs=1e-3)


def test_options_from_outside_reach_the_loss_of_a_real_run(model: str, tmp_path: Path) -> None:
    plain = first_step(model, tmp_path / "a")
    scaled = first_step(model, tmp_path / "b", loss=SCALED, loss_kwargs={"scale": 2.0})
    assert scaled["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-5)
    # In a group with variance not all completions can be above the mean.
    shared = first_step(model, tmp_path / "c", loss=SCALED, loss_kwargs={"by_successes": True})
    assert shared["grad_norm"] > 1.05 * plain["grad_norm"]


def test_options_from_outside_reach_the_loss_of_a_supervised_run(model: str, tmp_path: Path) -> None:
    dataset_runs.train("sft", model, tmp_path / "a", max_steps=1)
    scaled = {"loss": "outside_package.scaled_sft:ScaledSFTLoss", "loss_kwargs": {"scale": 2.0}}
    dataset_runs.train("sft", model, tmp_path / "b", max_steps=1, **scaled)
    [plain], [twice] = (runs.lines(tmp_path / name / "metrics.jsonl") for name in ("a", "b"))
    assert twice["loss"] == pytest.approx(2 * plain["loss"], rel=1e-5) and plain["loss"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": SCALED, "loss_kwargs": {"scael": 2.0}}, "Did you mean 'scale'"),
        ({"loss": REINFORCE, "loss_kwargs": {"scale": 2.0}}, "loss_kwargs must be left out"),
        ({"loss": SCALED, "loss_kwargs": {"epsilon": 0.1}}, "own options only, got epsilon"),
        ({"loss": "outside_package.scaled_loss:ScaledOptions"}, "loss must name a class with everything"),
        ({"loss": "trl_ray.algorithms.loss:FixedLoss"}, "without __call__, needs"),
        ({"loss": "outside_package.scaled_loss:ScaledLos"}, "ScaledLos"),
        ({"loss": "mine"}, "entry-point group trl_ray.losses"),
    ],
)
def test_a_loss_that_cannot_be_had_is_told_before_anything_starts(
    model: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    pipeline = GRPOPipeline(args=runs.grpo(model, tmp_path / "run", **options), train_dataset=runs.PROMPTS)
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare()
    assert not (tmp_path / "run").exists()


def test_an_objective_from_outside_keeps_the_best_of_a_group() -> None:
    built = BestOf(BestOfConfig(num_generations=4)).build([group(0, (0.0, 1.0, 3.0, 0.0))])
    assert [sample.advantage > 0 for sample in built.samples] == [False, False, True, False]
    assert [sample.advantage for sample in built.samples].count(0.0) == 3


def test_a_pipeline_from_outside_runs_by_the_command_and_is_found_again_by_its_folder(
    model: str, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "{row["prompt"]}"}}\n' for row in runs.PROMPTS))
    options = runs.values(model, tmp_path / "run", max_steps=2, save_steps=1, dataset_name=str(data), keep=2)
    file = tmp_path / "best_of.yaml"
    file.write_text(dump_yaml(build(BestOfConfig, options)))
    assert main([BestOfConfig.model_fields["pipeline"].default, "--config", str(file)]) == 0
    lines = runs.lines(tmp_path / "run" / "metrics.jsonl")
    # Four groups a step, two of each.
    assert [line["best_of/kept"] for line in lines] == [8.0, 8.0]
    again = BestOfPipeline.from_run(tmp_path / "run")
    assert type(again.config) is BestOfConfig and again.config.keep == 2
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert len(runs.lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_pipeline_in_a_file_is_named_from_any_folder_and_found_again_from_any(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, elsewhere, data = tmp_path / "mine", tmp_path / "elsewhere", tmp_path / "prompts.jsonl"
    mine.mkdir(), elsewhere.mkdir()
    source = Path(best_of.__file__).read_text(encoding="utf-8")
    (mine / "best.py").write_text(source.replace(BEST_OF, "best.py:BestOfPipeline"), encoding="utf-8")
    data.write_text("".join(f'{{"prompt": "{row["prompt"]}"}}\n' for row in runs.PROMPTS))
    file = tmp_path / "best.yaml"
    options = runs.values(model, tmp_path / "run", max_steps=1, save_steps=1, dataset_name=str(data), keep=2)
    file.write_text(dump_yaml(build(BestOfConfig, options)).replace(BEST_OF, "best.py:BestOfPipeline"))
    monkeypatch.chdir(elsewhere)
    assert main(["../mine/best.py:BestOfPipeline", "--config", str(file)]) == 0
    written = parse_yaml((tmp_path / "run" / "config.yaml").read_text(), source="config.yaml")
    assert written["pipeline"] == f"{mine.resolve()}/best.py:BestOfPipeline"
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert len(runs.lines(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outside_package.best_of:BestOf", "must be a class derived from"),
        ("trl_ray.pipelines.rollouts.rollout_pipeline:RolloutPipeline", "with a config_class"),
        ("outside_package.best_of:Missing", "Missing"),
        ("trl_ray.pipelines.grpo:GRPOPipeline", "GRPOConfig.pipeline must be"),
        ("best-of", "must be one of sft"),
    ],
)
def test_a_pipeline_that_cannot_be_had_is_told(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_pipeline(name)


def test_installed_packages_give_names_to_losses_and_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "trl_ray.losses": [EntryPoint("reinforce", REINFORCE, "trl_ray.losses")],
        "trl_ray.pipelines": [EntryPoint("gone", "no_such_package.module:Pipeline", "trl_ray.pipelines")],
    }
    monkeypatch.setattr("trl_ray.config.object_paths.entry_points", lambda *, group: given[group])
    assert type(build_loss(LossConfig(loss="reinforce"))) is Reinforce
    with pytest.raises(ConfigError, match="must be importable"):
        find_pipeline("gone")


TARGET = "outside_package.target_network:TargetNetwork"


def taught(model: str, folder: Path, **options: Any) -> Path:
    """A real run of self-distillation in this process, whose teacher lags behind where weights move much."""
    given = {"max_steps": 3, "learning_rate": 0.01, "teacher_sync_steps": 2, **options}
    SDPOPipeline(args=runs.sdpo(model, folder, **given), train_dataset=runs.PROMPTS).train()
    return folder


@pytest.mark.parametrize("placement", ["actor", "learner"])
def test_a_teacher_kind_from_outside_follows_by_its_own_rule(model: str, tmp_path: Path, placement: str) -> None:
    run = taught(model, tmp_path / "run", teacher_model_kind=TARGET, save_steps=1, teacher={"placement": placement})
    steps = [run / "checkpoints" / f"step-{step}" for step in (1, 2, 3)]
    [first, second, third] = [load_file(step / "teacher" / "weights.safetensors") for step in steps]
    initial, policy = load_file(Path(model) / "model.safetensors"), load_file(steps[1] / "model.safetensors")
    # Every second step it becomes the policy; in between it stays where it is.
    for name, weight in policy.items():
        assert torch.equal(first[name], initial[name]) and torch.equal(second[name], weight), name
        assert torch.equal(third[name], weight), name
    assert any(not torch.equal(initial[name], weight) for name, weight in policy.items())


def test_a_teacher_kind_has_options_and_state_of_its_own_and_is_resumed(model: str, tmp_path: Path) -> None:
    options = {"teacher_model_kind": TARGET, "teacher_kind_kwargs": {"anchor": 0.25}, "max_steps": 4, "save_steps": 2}
    options |= {"save_total_limit": None}
    whole = taught(model, tmp_path / "whole", **options)
    kept = load_file(whole / "checkpoints" / "step-2" / "teacher" / "weights.safetensors")
    policy = load_file(whole / "checkpoints" / "step-2" / "model.safetensors")
    for name, weight in policy.items():
        torch.testing.assert_close(kept[name], 0.75 * weight + 0.25 * kept[f"initial.{name}"])
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-4")
    SDPOPipeline.from_run(half, train_dataset=runs.PROMPTS).train()
    ends = [load_file(run / "checkpoints" / "step-4" / "teacher" / "weights.safetensors") for run in (whole, half)]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_model_kind": "outside_package.target_network:TargetNetwor"}, "TargetNetwork"),
        ({"teacher_model_kind": "outside_package.best_of:BestOf"}, "a class derived from trl_ray.models"),
        ({"teacher_model_kind": TARGET, "teacher_kind_kwargs": {"anker": 1.0}}, "anker"),
    ],
)
def test_a_teacher_kind_that_cannot_be_had_is_told_before_anything_starts(
    model: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    pipeline = SDPOPipeline(args=runs.sdpo(model, tmp_path / "run", **options), train_dataset=runs.PROMPTS)
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare()
    assert not (tmp_path / "run").exists()
