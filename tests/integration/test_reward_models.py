"""Runs that are rewarded by a model: its parts in what a run writes, a killed and a hung copy, and both runtimes."""

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from runs import PROMPTS, REWARDS, Disturbance, assert_balanced, async_grpo, events, grpo, lines, pid_of
from tiny_models import build_tiny_model
from tiny_reward_models import build_reward_model
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.pipelines.grpo import GRPOPipeline

pytestmark = pytest.mark.integration
RAY = {"kind": "ray", "health_interval_s": 0.3, "health_deadline_s": 6.0}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return build_reward_model(tmp_path_factory.mktemp("models") / "judge")


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    return build_reward_model(tmp_path_factory.mktemp("models") / "prm", labels=2)


def completions(run: Path) -> list[dict]:
    return [row for file in sorted((run / "completions").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_an_asynchronous_run_is_rewarded_by_a_function_and_two_models(ray_local, policy, judge, prm, tmp_path, capfd):
    run = tmp_path / "run"
    config = async_grpo(
        policy,
        run,
        max_staleness=1,
        reward_weights=[0.5],
        reward_models=[
            {"model_name_or_path": judge, "weight": 2.0, "num_workers": 2},
            {"model_name_or_path": prm, "aggregation": "mean"},
        ],
        runtime=RAY,
    )
    AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    # Ray says so of actors that it may not be able to restart.
    assert "constructor arguments in the object store" not in capfd.readouterr().err
    assert_balanced(run, trained=16)
    for line in lines(run / "metrics.jsonl"):
        assert {f"reward/{name}/mean" for name in ("vowels", "judge", "prm")} <= line.keys()
        assert 0 <= line["reward/prm/mean"] <= 1
        assert (line["reward/judge/truncated_fraction"], line["reward/prm/truncated_fraction"]) == (0.0, 0.0)
        assert line["reward/prm/steps"] >= 0
    rows = completions(run)
    assert len(rows) == 4 * 16
    for row in rows:
        stepped = row["reward/prm"] or 0.0
        assert row["reward"] == pytest.approx(0.5 * row["reward/vowels"] + 2 * row["reward/judge"] + stepped, abs=1e-9)
    assert len({row["reward/judge"] for row in rows}) > 8
    started = {event["actor"] for event in events(run, "actor_started")}
    assert {"reward-model-judge-0", "reward-model-judge-1", "reward-model-prm-0"} <= started
    assert {"reward-model-judge-0", "reward-model-prm-0"} <= {span["actor"] for span in lines(run / "trace.jsonl")}


def test_a_local_run_is_rewarded_by_a_model_alone_and_repeats_itself(policy, judge, tmp_path):
    seen = []
    for name in ("first", "second"):
        config = grpo(policy, tmp_path / name, max_steps=2, reward_funcs=[])
        GRPOPipeline(args=config, reward_funcs=judge, train_dataset=PROMPTS).train()
        assert_balanced(tmp_path / name, trained=8)
        seen.append([row["reward/judge"] for row in completions(tmp_path / name)])
    assert seen[0] == seen[1] and len(set(seen[0])) > 4


def disturbed(policy: str, judge: str, run: Path, act, **options) -> None:
    config = async_grpo(
        policy,
        run,
        max_steps=40,
        max_staleness=2,
        reward_models=[{"model_name_or_path": judge, **options}],
        runtime=RAY,
    )
    disturbance = Disturbance(run, after_step=3, act=act)
    AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert disturbance.done, "the run was over before it could be disturbed"
    assert len(lines(run / "metrics.jsonl")) == 40
    assert_balanced(run, trained=160)


@pytest.mark.parametrize("name", ["reward-model-judge-0", "reward-0"])
def test_a_killed_reward_model_comes_back_and_so_does_a_worker_that_asks_it(ray_local, policy, judge, tmp_path, name):
    run = tmp_path / "run"
    disturbed(policy, judge, run, lambda: os.kill(pid_of(run, name), signal.SIGKILL))
    assert name in [event["actor"] for event in events(run, "actor_lost")]
    [restarted] = events(run, "actor_restarted")
    assert restarted["actor"] == name and restarted["detail"]["pid"] != pid_of(run, name)
    assert not events(run, "reward_failed")
    assert len({row["reward/judge"] for row in completions(run)}) > 8


def test_a_reward_model_that_hangs_is_replaced_and_its_group_scored_again(ray_local, policy, tmp_path):
    """The model's own code hangs once, in its third pass."""
    run, marker = tmp_path / "run", tmp_path / "marker"
    judge = hanging_model(tmp_path / "hanging", marker)
    config = async_grpo(
        policy,
        run,
        max_steps=8,
        max_staleness=1,
        reward_models=[{"model_name_or_path": judge, "timeout_s": 2.0, "trust_remote_code": True, "kind": "sequence"}],
        runtime=RAY,
    )
    AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert marker.exists()
    assert_balanced(run, trained=32)
    failures = [event["detail"] for event in events(run, "reward_failed")]
    assert {(failure["function"], failure["kind"]) for failure in failures} == {("hanging", "timeout")}
    assert "reward-model-hanging-0" in [event["actor"] for event in events(run, "actor_restarted")]


HANGING = """
import os, time
from transformers import Qwen2ForSequenceClassification

class HangingForSequenceClassification(Qwen2ForSequenceClassification):
    passes = 0

    def forward(self, *args, **kwargs):
        type(self).passes += 1
        if type(self).passes == 3 and not os.path.exists({marker!r}):
            open({marker!r}, "w").close()
            time.sleep(3600)
        return super().forward(*args, **kwargs)
"""


def hanging_model(folder: Path, marker: Path) -> str:
    build_reward_model(folder)
    (folder / "modeling_hanging.py").write_text(HANGING.format(marker=str(marker)))
    file = folder / "config.json"
    values = json.loads(file.read_text())
    name = "HangingForSequenceClassification"
    values |= {
        "architectures": [name],
        "auto_map": {"AutoModelForSequenceClassification": f"modeling_hanging.{name}"},
    }
    file.write_text(json.dumps(values))
    return str(folder)


def test_rewards_of_functions_and_models_are_the_same_in_a_run_and_outside_of_it(policy, judge, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = tmp_path / "run"
    config = grpo(policy, run, max_steps=1, reward_funcs=[f"{REWARDS}:vowels"], reward_model_name_or_path=judge)
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    GRPOPipeline(args=config, train_dataset=chats).train()
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(judge), AutoTokenizer.from_pretrained(judge)
    for row in completions(run)[:6]:
        said = [*json.loads(row["prompt"]), {"role": "assistant", "content": row["completion"]}]
        ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            assert row["reward/judge"] == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-4)
