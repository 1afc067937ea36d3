"""Real Ray actors are killed, stopped and hung; each run finishes, says what happened, and its ledger balances."""

import os
import signal
import time
from pathlib import Path

import pytest

from runs import PROMPTS, REWARDS, Disturbance, assert_balanced, async_grpo, events, lines, pid_of
from tiny_models import build_tiny_model
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline

pytestmark = pytest.mark.integration
RAY = {"kind": "ray", "health_interval_s": 0.3, "health_deadline_s": 6.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def run_disturbed(model: str, run: Path, act, *, steps: int = 30, **changes) -> None:
    """A run of `steps` steps that is disturbed after its third."""
    config = async_grpo(model, run, **{"max_steps": steps, "max_staleness": 2, "runtime": RAY, **changes})
    disturbance = Disturbance(run, after_step=3, act=act)
    output = AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert disturbance.done, "the run was over before it could be disturbed"
    assert output.steps == steps
    assert output.worst_age <= 2
    assert len(lines(run / "metrics.jsonl")) == steps
    assert_balanced(run, trained=4 * steps)


def lost(run: Path) -> list[str]:
    return [event["actor"] for event in events(run, "actor_lost")]


def test_a_killed_rollout_worker_is_replaced_and_its_leases_are_issued_again(ray_local, model, tmp_path):
    run = tmp_path / "run"
    run_disturbed(model, run, lambda: os.kill(pid_of(run, "rollout-0"), signal.SIGKILL))
    assert lost(run) == ["rollout-0"]
    restarted = events(run, "actor_restarted")[0]
    assert restarted["actor"] == "rollout-0+1"
    pulled = [event["actor"] for event in events(run, "weights_pulled")]
    assert "rollout-0+1" in pulled


def test_a_stopped_rollout_worker_is_noticed_and_replaced(ray_local, model, tmp_path):
    run = tmp_path / "run"
    run_disturbed(model, run, lambda: os.kill(pid_of(run, "rollout-0"), signal.SIGSTOP))
    assert lost(run) == ["rollout-0"]
    assert "must answer within" in events(run, "actor_lost")[0]["detail"]["reason"]


def test_a_killed_queue_comes_back_from_its_journal(ray_local, model, tmp_path):
    run = tmp_path / "run"
    run_disturbed(model, run, lambda: os.kill(pid_of(run, "queue"), signal.SIGKILL), steps=40)
    assert "queue" in lost(run)
    assert "queue" in [event["actor"] for event in events(run, "actor_restarted")]


def test_a_killed_reward_worker_comes_back(ray_local, model, tmp_path):
    run = tmp_path / "run"
    run_disturbed(model, run, lambda: os.kill(pid_of(run, "reward-0"), signal.SIGKILL), steps=40)
    assert "reward-0" in lost(run)
    assert "reward-0" in [event["actor"] for event in events(run, "actor_restarted")]


def test_a_killed_learner_restarts_from_the_last_checkpoint(ray_local, model, tmp_path):
    run = tmp_path / "run"
    run_disturbed(model, run, lambda: os.kill(pid_of(run, "learner"), signal.SIGKILL), steps=12, save_steps=2)
    assert lost(run).count("learner") == 1
    assert events(run, "run_resumed")


def test_a_killed_rank_of_the_learner_takes_the_group_back_to_the_last_checkpoint(ray_local, model, tmp_path):
    run = tmp_path / "run"
    two = {**RAY, "num_learners": 2, "learner_num_cpus": 0.5}
    run_disturbed(
        model,
        run,
        lambda: os.kill(pid_of(run, "learner-1"), signal.SIGKILL),
        steps=12,
        save_steps=2,
        runtime=two,
        per_device_train_batch_size=4,
    )
    assert lost(run).count("learner") == 1
    assert "learner-1" in events(run, "actor_lost")[0]["detail"]["reason"]
    assert events(run, "run_resumed")


def test_a_reward_function_that_hangs_is_killed_and_its_group_scored_again(ray_local, model, tmp_path):
    run, marker = tmp_path / "run", tmp_path / "marker"
    config = async_grpo(
        model,
        run,
        max_steps=6,
        max_staleness=2,
        reward_funcs=[f"{REWARDS}:hangs_once"],
        reward={"timeout_s": 3.0},
        runtime=RAY,
    )
    begin = time.monotonic()
    marked = [{**row, "marker": str(marker)} for row in PROMPTS]
    AsyncGRPOPipeline(args=config, train_dataset=marked).train()
    assert time.monotonic() - begin < 120
    failure = events(run, "reward_failed")[0]["detail"]
    assert failure["kind"] == "timeout"
    assert_balanced(run, trained=24)


def test_a_killed_vllm_engine_is_replaced_and_refitted(ray_local, model, tmp_path):
    pytest.importorskip("vllm")
    run = tmp_path / "run"
    engine = {"engine": "vllm", "max_model_len": 64, "kv_cache_memory_gib": 0.1}
    # The engine lives in its worker's process, so the worker's pid is the engine's.
    run_disturbed(model, run, lambda: os.kill(pid_of(run, "rollout-0"), signal.SIGKILL), steps=20, rollout=engine)
    assert lost(run) == ["rollout-0"]
    agreed = [event for event in events(run, "canary") if event["actor"] == "rollout-0+1"]
    assert agreed
    assert all(event["detail"]["agrees"] for event in agreed)
