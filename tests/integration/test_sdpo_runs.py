"""Self-distillation from end to end in one process: modes, teachers, feedback, exact repetition, resume, lag."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from runs import PROMPTS, REWARDS, assert_balanced, comparable, events, lines, sdpo
from tiny_models import build_tiny_model
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.errors import InterruptedRun
from trl_ray.pipelines.sdpo import SDPOPipeline

pytestmark = pytest.mark.integration
TOP = {"distillation_mode": "topk_logits", "distillation_topk": 5}
FULL = {"distillation_mode": "full_logits", "distillation_alpha": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def train(config: SDPOConfig, **inputs: Any) -> Path:
    output = SDPOPipeline(args=config, train_dataset=PROMPTS, **inputs).train()
    assert output.steps == config.max_steps
    return output.run_dir


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def assert_same_weights(first: Path, second: Path, step: int) -> None:
    one, two = weights(first, step), weights(second, step)
    assert all(np.array_equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["ema", "live", "base"])
@pytest.mark.parametrize("mode", [{}, TOP, FULL], ids=["sampled", "top", "full"])
def test_every_mode_learns_from_every_teacher(model: str, tmp_path: Path, mode: dict[str, Any], kind: str) -> None:
    run = train(sdpo(model, tmp_path / "run", max_steps=2, teacher_model_kind=kind, **mode))
    assert_balanced(run, trained=8)
    for line in lines(run / "metrics.jsonl"):
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0
        assert 0 < line["self_distillation/reprompt_sample_fraction"] <= 1
        assert np.isfinite(line["self_distillation/distillation_loss"])


def test_actors_and_the_learner_hold_the_same_teacher(model: str, tmp_path: Path) -> None:
    options = {"teacher_update_rate": 0.5, "max_steps": 3}
    acting = train(sdpo(model, tmp_path / "acting", **options))
    resident = train(sdpo(model, tmp_path / "resident", teacher={"placement": "learner"}, **options))
    for one, two in zip(lines(acting / "metrics.jsonl"), lines(resident / "metrics.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3, abs=1e-6)
        assert one["reward/mean"] == two["reward/mean"]


def test_a_run_without_lag_repeats_itself_exactly(model: str, tmp_path: Path) -> None:
    first, second = (train(sdpo(model, tmp_path / name, max_steps=3)) for name in ("first", "second"))
    drop = ("teacher/", "time")
    for one, two in zip(comparable(first), comparable(second), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(drop)} == {
            k: v for k, v in two.items() if not k.startswith(drop)
        }
    assert_same_weights(first, second, 3)


@pytest.mark.parametrize("placement", ["actor", "learner"])
def test_an_interrupted_run_with_an_averaged_teacher_goes_on_as_if_it_had_not_been(
    model: str, tmp_path: Path, placement: str
) -> None:
    options = {"max_steps": 4, "teacher": {"placement": placement}, "teacher_update_rate": 0.5}
    whole = train(sdpo(model, tmp_path / "whole", **options))
    half = sdpo(model, tmp_path / "half", **options)
    stopped = SDPOPipeline(args=half, train_dataset=PROMPTS, callbacks=[Interrupt(after=2)])
    with pytest.raises(InterruptedRun):
        stopped.train()
    SDPOPipeline.from_run(tmp_path / "half", train_dataset=PROMPTS, callbacks=[]).train()
    assert_same_weights(whole, tmp_path / "half", 4)
    assert (tmp_path / "half" / "checkpoints" / "step-4" / "teacher").is_dir()


class Interrupt:
    """Sends what Ctrl-C sends, once."""

    def __init__(self, *, after: int) -> None:
        self._after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._after:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_asynchronous_run_stays_within_its_bound_and_its_teacher_follows(model: str, tmp_path: Path) -> None:
    run = train(sdpo(model, tmp_path / "run", max_steps=6, max_staleness=2))
    assert_balanced(run, trained=24)
    assert max(line["staleness/max"] for line in lines(run / "metrics.jsonl")) <= 2
    pulled = [event["detail"]["version"] for event in events(run, "weights_pulled") if "teacher" in event["actor"]]
    assert pulled == [0, 1, 2, 3, 4, 5, 6]


def test_the_rollout_engine_stands_in_for_a_live_teacher(model: str, tmp_path: Path) -> None:
    live = {"teacher_model_kind": "live", "max_steps": 3}
    served = train(sdpo(model, tmp_path / "served", use_teacher_server=True, **live))
    acting = train(sdpo(model, tmp_path / "acting", **live))
    for one, two in zip(lines(served / "metrics.jsonl"), lines(acting / "metrics.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3, abs=1e-5)
    assert not [event for event in events(served, "actor_started") if "teacher" in event["actor"]]


@pytest.mark.parametrize("mode", [{}, TOP], ids=["sampled", "top"])
def test_vllm_stands_in_for_a_live_teacher(model: str, tmp_path: Path, mode: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    rollout = {"engine": "vllm", "max_model_len": 400, "kv_cache_memory_gib": 0.1}
    options = {"teacher_model_kind": "live", "use_teacher_server": True, "max_steps": 2, "rollout": rollout, **mode}
    run = train(sdpo(model, tmp_path / "run", **options))
    assert_balanced(run, trained=8)
    for line in lines(run / "metrics.jsonl"):
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0
        assert line["self_distillation/logprob_abs_diff"] > 0


def test_top_k_of_the_rollout_engine_is_the_teachers(model: str, tmp_path: Path) -> None:
    options = {"teacher_model_kind": "live", "use_teacher_server": True, "max_steps": 2, **TOP}
    run = train(sdpo(model, tmp_path / "run", **options))
    assert all(np.isfinite(line["loss"]) for line in lines(run / "metrics.jsonl"))


def test_feedback_of_the_dataset_and_of_a_reward_function_reaches_the_teacher(model: str, tmp_path: Path) -> None:
    rows = [{**row, "privileged_context": "Count faster."} for row in PROMPTS]
    options = {"use_successful_as_teacher": False, "max_steps": 1}
    without = sdpo(model, tmp_path / "without", **options)
    SDPOPipeline(args=without, train_dataset=rows).train()
    assert lines(tmp_path / "without" / "metrics.jsonl")[0]["self_distillation/reprompt_sample_fraction"] == 0
    for name, rewards, dataset in (("row", "vowels", rows), ("reward", "vowels_with_feedback", PROMPTS)):
        run = tmp_path / name
        config = sdpo(model, run, include_environment_feedback=True, reward_funcs=[f"{REWARDS}:{rewards}"], **options)
        SDPOPipeline(args=config, train_dataset=dataset).train()
        line = lines(run / "metrics.jsonl")[0]
        assert line["self_distillation/feedback_used_fraction"] == 1
        assert line["grad_norm"] > 0


def test_callbacks_see_what_the_teacher_is_shown(model: str, tmp_path: Path) -> None:
    seen: list[str] = []

    class Watcher:
        """Looks at the four hooks of self-distillation."""

        def on_generation_prompts_selected(self, generation_prompts: Any, **kwargs: Any) -> None:
            seen.append(f"prompts {len(generation_prompts)}")

        def on_teacher_context_built(
            self, teacher_input_ids: Any, teacher_attention_mask: Any, self_distillation_mask: Any, **kwargs: Any
        ) -> None:
            assert teacher_input_ids.shape == teacher_attention_mask.shape
            seen.append(f"contexts {len(teacher_input_ids)} of {int(self_distillation_mask.sum())}")

        def on_self_distillation_batch_prepared(self, prompt_ids: Any, old_per_token_logps: Any, **kwargs: Any) -> None:
            assert old_per_token_logps is None
            seen.append(f"batch {len(prompt_ids)}")

        def on_generation_batch_built(self, generate_every: int, steps_per_generation: int, **kwargs: Any) -> None:
            seen.append(f"built {generate_every} {steps_per_generation}")

    run = train(sdpo(model, tmp_path / "run", max_steps=1), callbacks=[Watcher()])
    distilled = lines(run / "metrics.jsonl")[0]["self_distillation/reprompt_sample_fraction"] * 16
    assert seen == ["prompts 16", f"contexts 16 of {distilled:.0f}", "batch 16", "built 2 2"]


def test_a_blend_has_a_policy_part_and_a_clip_where_there_are_several_updates(model: str, tmp_path: Path) -> None:
    config = sdpo(
        model, tmp_path / "run", max_steps=2, distillation_weight=0.5, num_iterations=2, gradient_accumulation_steps=2
    )
    train(config)
    for line in lines(tmp_path / "run" / "metrics.jsonl"):
        assert np.isfinite(line["self_distillation/policy_loss"])
        assert line["self_distillation/is_ratio"] > 0


def test_a_run_that_can_learn_nothing_warns_at_its_first_step(model: str, tmp_path: Path) -> None:
    run = train(sdpo(model, tmp_path / "run", max_steps=2, success_reward_threshold=9.0))
    details = [event["detail"]["detail"] for event in events(run, "warning")]
    assert any("neither a sibling's success nor feedback" in detail for detail in details)
    assert all(line["grad_norm"] == 0 for line in lines(run / "metrics.jsonl"))
