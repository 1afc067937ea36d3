"""Whole runs in one process: exact equalities that Ray's timing would hide."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file

from runs import PROMPTS, assert_balanced, async_grpo, comparable, events, grpo, ledger, lines
from tiny_models import build_tiny_model
from trl_ray.errors import ConfigError, DataError, InterruptedRun, RewardError, StallError, WeightError
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.pipelines.grpo import GRPOPipeline

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def weights(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run_dir / "checkpoints" / f"step-{step}" / "model.safetensors")


def assert_same_weights(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.array_equal(value, second[name]), name


def test_a_run_leaves_the_whole_run_directory_and_a_balanced_ledger(model, tmp_path):
    run = tmp_path / "run"
    config = grpo(model, run, save_steps=2, eval_steps=2)
    output = GRPOPipeline(args=config, train_dataset=PROMPTS, eval_dataset=PROMPTS[:6]).train()
    assert output.steps == 4
    assert output.worst_age == 0
    assert_balanced(run, trained=16)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert pq.read_table(run / "completions" / "step-000003.parquet").num_rows == 16
    assert (run / "report.html").stat().st_size > 1000
    assert [event["detail"]["step"] for event in events(run, "evaluated")] == [0, 2, 4]
    assert events(run, "run_finished")


def test_every_documented_metric_is_written(model, tmp_path):
    run = tmp_path / "run"
    GRPOPipeline(args=grpo(model, run, max_steps=1, beta=0.05), train_dataset=PROMPTS).train()
    line = lines(run / "metrics.jsonl")[0]
    expected = {
        "step",
        "time",
        "loss",
        "grad_norm",
        "lr",
        "reward/mean",
        "reward/std",
        "reward/vowels/mean",
        "advantage/zero_std_fraction",
        "entropy",
        "kl/ref",
        "kl/sampler",
        "clip/low",
        "clip/high",
        "staleness/mean",
        "staleness/max",
        "staleness/in_flight",
        "staleness/in_queue",
        "queue/ready",
        "queue/in_flight",
        "queue/slots",
        "weights/version",
        "time/step_s",
        "time/wait_s",
        "time/publish_s",
        "tokens/trained",
        "tokens/generated",
        "throughput/trained_tokens_per_s",
        "throughput/generated_tokens_per_s",
        "completion/length_mean",
        "completion/truncated_fraction",
    }
    assert expected <= line.keys(), expected - line.keys()


def test_the_policy_learns_the_reward(model, tmp_path):
    run = tmp_path / "run"
    config = grpo(model, run, max_steps=20, learning_rate=3e-3, lr_scheduler_type="constant")
    GRPOPipeline(args=config, train_dataset=PROMPTS).train()
    rewards = [line["reward/mean"] for line in lines(run / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_async_without_lag_gives_the_synchronous_numbers(model, tmp_path):
    GRPOPipeline(args=grpo(model, tmp_path / "sync"), train_dataset=PROMPTS).train()
    # TRL's asynchronous trainer has another schedule by default.
    config = async_grpo(model, tmp_path / "async", max_staleness=0, lr_scheduler_type="linear")
    AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert comparable(tmp_path / "sync") == comparable(tmp_path / "async")
    assert_same_weights(weights(tmp_path / "sync", 4), weights(tmp_path / "async", 4))


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(model, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    names = {"reward_funcs": grpo(model, straight).reward_funcs}
    GRPOPipeline(args=grpo(model, straight, max_steps=6), train_dataset=PROMPTS).train()

    class Interrupting(GRPOPipeline):
        """Sends itself Ctrl-C while step 4 is under way."""

        def prepare(self):
            prepared = super().prepare()
            original = prepared.prompts.prompt

            def prompt(ordinal):
                # Not when prompts are read for their fingerprint, before the first step.
                if ordinal == 12 and lines(broken / "metrics.jsonl"):
                    os.kill(os.getpid(), signal.SIGINT)
                return original(ordinal)

            object.__setattr__(prepared.prompts, "prompt", prompt)
            return prepared

    with pytest.raises(InterruptedRun, match="resume"):
        Interrupting(args=grpo(model, broken, max_steps=6, **names), train_dataset=PROMPTS).train()
    done = len(lines(broken / "metrics.jsonl"))
    assert 3 <= done < 6
    assert (broken / "checkpoints" / f"step-{done}").is_dir()
    GRPOPipeline.from_run(broken, train_dataset=PROMPTS).train()
    assert comparable(straight) == comparable(broken)
    assert_same_weights(weights(straight, 6), weights(broken, 6))
    assert_balanced(broken, trained=24)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps_exactly(model, tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    GRPOPipeline(args=grpo(model, straight, max_steps=6, save_steps=2), train_dataset=PROMPTS).train()

    from trl_ray.pipelines.run.recording import Recorder

    original = Recorder.step

    def dies_in_step_four(self, step, **kwargs):
        original(self, step, **kwargs)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "step", dies_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        GRPOPipeline(args=grpo(model, broken, max_steps=6, save_steps=2), train_dataset=PROMPTS).train()
    monkeypatch.setattr(Recorder, "step", original)
    GRPOPipeline.from_run(broken, train_dataset=PROMPTS).train()
    assert comparable(straight) == comparable(broken)
    assert_same_weights(weights(straight, 6), weights(broken, 6))
    assert_balanced(broken, trained=24)


def test_lag_is_used_and_bounded(model, tmp_path):
    run = tmp_path / "run"
    config = async_grpo(model, run, max_steps=10, max_staleness=2, adaptive_slots=False)
    output = AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert output.worst_age <= 2
    assert max(line["staleness/max"] for line in lines(run / "metrics.jsonl")) > 0
    assert_balanced(run, trained=40)


def test_groups_without_variance_are_dropped_and_replaced(model, tmp_path):
    run = tmp_path / "run"
    config = grpo(model, run, zero_variance_groups="drop", max_completion_length=2, max_steps=3)
    GRPOPipeline(args=config, train_dataset=PROMPTS).train()
    final = ledger(run)
    assert final["dropped"]["zero_variance"] > 0
    assert_balanced(run, trained=12)
    assert all(line["advantage/zero_std_fraction"] == 0 for line in lines(run / "metrics.jsonl"))


def test_a_reward_that_always_fails_stops_the_run_and_names_the_function(model, tmp_path):
    run = tmp_path / "run"
    functions = [name.replace(":vowels", ":raises") for name in grpo(model, run).reward_funcs]
    config = grpo(model, run, reward_funcs=functions, reward={"max_failures_in_a_row": 5})
    with pytest.raises(RewardError, match="no judge today"):
        GRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert events(run, "reward_failed")
    assert events(run, "run_failed")
    assert lines(run / "metrics.jsonl") == []


def test_an_engine_pinned_to_old_weights_raises_the_alarm_of_the_weight_check(model, tmp_path, monkeypatch):
    from trl_ray.engines.transformers import TransformersBackend

    run = tmp_path / "run"
    original = TransformersBackend.load

    def pinned(self, payload):
        before = {name: value.clone() for name, value in self._model.state_dict().items()}
        original(self, payload)
        if payload.identity.version >= 2:
            self._model.load_state_dict(before)

    monkeypatch.setattr(TransformersBackend, "load", pinned)
    config = grpo(model, run, runtime={"max_restarts": 1})
    with pytest.raises(WeightError, match="weight check"):
        GRPOPipeline(args=config, train_dataset=PROMPTS).train()
    alarms = [event for event in events(run, "canary") if not event["detail"]["agrees"]]
    assert alarms


def test_a_stalled_run_stops_and_names_who_it_waits_for(model, tmp_path, monkeypatch):
    from trl_ray.actors.rollout_worker import RolloutWorker

    async def never(self, ticket, future):
        import asyncio

        await asyncio.sleep(3600)

    monkeypatch.setattr(RolloutWorker, "_finish", never)
    config = grpo(model, tmp_path / "run", runtime={"stall_deadline_s": 3.0})
    with pytest.raises(StallError, match=r"leased by rollout-0"):
        GRPOPipeline(args=config, train_dataset=PROMPTS).train()


def always_one(completions, **columns):
    return [1.0] * len(completions)


def test_rewards_that_never_differ_stop_a_run_that_drops_such_groups_with_the_reason(model, tmp_path):
    run = tmp_path / "run"
    config = grpo(model, run, reward_funcs=[], zero_variance_groups="drop", max_resampled_groups=7)
    with pytest.raises(StallError, match=r"at most 7 .*\(max_resampled_groups\), but 8 were .*all their rewards"):
        GRPOPipeline(args=config, train_dataset=PROMPTS, reward_funcs=[always_one]).train()
    assert len(events(run, "group_dropped")) == 8
    assert lines(run / "metrics.jsonl") == []


def test_a_run_goes_on_for_more_steps_with_its_own_rows_and_with_no_others(model, tmp_path):
    run = tmp_path / "run"
    GRPOPipeline(args=grpo(model, run, max_steps=2), train_dataset=PROMPTS).train()
    others = [{**row, "prompt": f"{row['prompt']}!"} for row in PROMPTS]
    with pytest.raises(DataError, match=r"must go on with the rows that it began with.*other prompts"):
        GRPOPipeline.from_run(run, changes=["max_steps=3"], train_dataset=others).train()
    output = GRPOPipeline.from_run(run, changes=["max_steps=3"], train_dataset=PROMPTS).train()
    assert output.steps == 3
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert events(run, "run_resumed")[-1]["detail"]["changed"] == {"max_steps": "2 -> 3"}


EDITS = {
    "seed: 42": "seed: 43",
    "learning_rate: 0.001": "learning_rate: 0.01",
    "num_generations: 4": "num_generations: 2",
    "per_device_train_batch_size: 8": "per_device_train_batch_size: 4",
}


def test_options_and_rows_that_are_edited_between_kill_and_resume_are_noticed(model, tmp_path):
    run, file = tmp_path / "run", tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    config = grpo(model, run, max_steps=1, dataset_name=str(file))
    GRPOPipeline(args=config).train()
    written = (run / "config.yaml").read_text()
    for old, new in EDITS.items():
        assert old in written
        (run / "config.yaml").write_text(written.replace(old, new))
        name = new.partition(":")[0]
        with pytest.raises(ConfigError, match=f"{name}.* must stay as the run began with when it goes on"):
            GRPOPipeline.from_run(run)
        (run / "config.yaml").write_text(written)
        value = yaml.safe_load(new)[name]
        with pytest.raises(ConfigError, match=f"^{name} must stay as the run began with when it goes on"):
            GRPOPipeline(args=config.replace(**{name: value})).train(resume_from_checkpoint=True)
    file.write_text("\n".join(map(json.dumps, [*PROMPTS[:-1], {"prompt": "count to 99: "}])))
    for again in (
        lambda: GRPOPipeline.from_run(run, changes=["max_steps=2"]).train(),
        lambda: GRPOPipeline(args=config.replace(max_steps=2)).train(resume_from_checkpoint=True),
    ):
        with pytest.raises(DataError, match="24 rows then and 24 now, with other prompts"):
            again()
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    assert GRPOPipeline(args=config.replace(max_steps=2)).train(resume_from_checkpoint=True).steps == 2
    assert events(run, "run_resumed")[-1]["detail"]["changed"] == {"max_steps": "1 -> 2"}
