"""What a run writes down about one step, from groups whose numbers are known."""

import json
import time
from dataclasses import replace

import pytest

from fakes import completion, group, prompt, reward
from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.algorithms.policy.group_samples import build_step
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.config.losses.advantage_options import AdvantageConfig
from trl_ray.errors import WeightError
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.pipelines.run.recording import Recorder, StepTimes
from trl_ray.types import Event, FinishReason, Metric, RewardErrorKind, RewardFailure, ScoredGroup, StepResult


class Notes:
    """An observer that remembers."""

    def __init__(self):
        self.steps, self.events, self.trained = [], [], []

    def step(self, step, metrics):
        self.steps.append((step, metrics))

    def event(self, event):
        self.events.append(event)

    def report(self, report):
        for event in report.events:
            self.event(event)

    def completions(self, trained):
        self.trained.append(trained)

    def close(self):
        pass


SNAPSHOT = LedgerSnapshot(
    issued=9,
    trained=2,
    dropped={"zero_variance": 1},
    live={"issued": 1, "leased": 1, "generated": 0, "scored": 0, "ready": 2, "taken": 2},
    fenced=0,
    reissued=1,
    step=2,
    version=2,
)


@pytest.fixture
def stage(tmp_path):
    notes = Notes()
    directory = RunDirectory.create(tmp_path / "run")
    return Recorder(directory=directory, observer=notes, max_age_at_use=1, start_step=2), notes


def test_a_step_is_one_line_with_its_ledger_and_its_completions(stage):
    recorder, notes = stage
    groups = [group(4, version=2), group(5, version=1)]
    built = build_step(groups, config=AdvantageConfig())
    staleness = recorder.check_staleness(3, groups)
    begin, metrics = time.time(), {"entropy": Metric(value=0.7)}
    result = StepResult(version=3, loss=0.5, grad_norm=2.0, lr=1e-3, metrics=metrics, seconds=2.0)
    numbers = recorder.line(
        groups=groups,
        built=built,
        result=result,
        times=StepTimes(begin=begin, taken=begin + 3, trained=begin + 5, published=begin + 6),
        version=3,
        snapshot=SNAPSHOT,
        slots=4,
        staleness=staleness,
    )
    recorder.step(3, line=numbers, groups=groups, built=built, snapshot=SNAPSHOT, evaluated={"reward": 0.25})
    [(step, line)] = notes.steps
    assert (step, line["loss"], line["grad_norm"], line["lr"], line["weights/version"]) == (3, 0.5, 2.0, 1e-3, 3)
    assert (line["entropy"], line["reward/mean"], line["eval/reward"]) == (0.7, 0.5, 0.25)
    # Half of the tokens are one step old.
    assert (line["staleness/mean"], line["staleness/max"]) == (0.5, 1)
    # Of the 6 that are live 2 are ready and 2 taken.
    assert (line["queue/ready"], line["queue/in_flight"], line["queue/slots"]) == (2, 2, 4)
    assert (line["ledger/issued"], line["ledger/trained"], line["ledger/dropped"]) == (9, 2, 1)
    assert (line["time/wait_s"], line["time/learner_s"], line["time/publish_s"]) == pytest.approx((3, 2, 1))
    # Two groups of two completions of two tokens.
    assert (line["tokens/trained"], line["tokens/generated"]) == (8, 8)
    assert json.loads(recorder.directory.ledger.read_text())["issued"] == 9
    [trained] = notes.trained
    assert (trained.step, trained.learner_version, len(trained.groups)) == (3, 2, 2)
    assert recorder.worst_age == 1
    assert recorder.last == line


def test_a_token_older_than_the_bound_ends_the_run(stage):
    recorder, _ = stage
    with pytest.raises(WeightError, match="age 2 in group 7"):
        recorder.check_staleness(4, [group(7, version=1)])


def test_an_evaluation_is_the_mean_over_prompts_that_were_scored(stage):
    recorder, notes = stage
    failure = RewardFailure(function="judge", kind=RewardErrorKind.TIMEOUT, detail="")
    scored = [
        ScoredGroup(rewards=(reward(1.0),)),
        ScoredGroup(rewards=(reward(0.5),)),
        ScoredGroup(rewards=(reward(None),)),
        ScoredGroup(failure=failure),
    ]
    answers = [EvaluatedPrompt(prompt=prompt(0), completions=(completion(),), scored=each) for each in scored]
    numbers = recorder.evaluated(3, answers, None, 1.23456)
    [event] = notes.events
    assert isinstance(event, Event)
    told = {key: value for key, value in event.detail.items() if not key.startswith("eval/")}
    assert told == {"step": 3, "prompts": 4, "scored": 2, "seconds": 1.235}
    assert {key.removeprefix("eval/"): value for key, value in event.detail.items() if key not in told} == numbers
    assert numbers["reward"] == 0.75 and numbers["reward_std"] == pytest.approx(0.3535534)
    recorder.evaluated(3, answers[2:], None, 1)
    detail = notes.events[-1].detail
    assert detail["scored"] == 0 and not any("reward" in key for key in detail)


def test_an_evaluation_has_the_numbers_of_trl_and_its_completions_are_kept(stage):
    recorder, notes = stage

    def answer(totals, lengths):
        return EvaluatedPrompt(
            prompt=prompt(0),
            completions=tuple(
                completion("a" * length, finish=FinishReason.LENGTH if length == 9 else FinishReason.STOP)
                for length in lengths
            ),
            scored=ScoredGroup(
                rewards=tuple(replace(reward(total), parts={"judge": total, "shy": None}) for total in totals),
                metrics={"share": totals[0]},
            ),
        )

    numbers = recorder.evaluated(3, [answer((1.0, 0.0), (2, 4)), answer((0.5, 0.5), (9, 1))], None, 1.0, name="far")
    # Totals 1, 0, .5, .5: deviations of .5, .5, 0, 0 from their mean, divided by 3.
    spread = pytest.approx((0.5 / 3) ** 0.5)
    assert numbers == {
        "far_reward": 0.5, "far_reward_std": spread, "far_frac_reward_zero_std": 0.5,
        "far_rewards/judge/mean": 0.5, "far_rewards/judge/std": spread,
        "far_completions/mean_length": 4.0, "far_completions/min_length": 1.0, "far_completions/max_length": 9.0,
        "far_completions/mean_terminated_length": pytest.approx(7 / 3),
        "far_completions/min_terminated_length": 1.0, "far_completions/max_terminated_length": 4.0,
        "far_completions/clipped_ratio": 0.25, "far_entropy": 1.0, "far_share": 0.75,
    }  # fmt: skip
    [kept] = notes.trained
    assert (kept.step, kept.held_out, len(kept.groups)) == (3, "far", 2)
