"""What a run writes down about one step, from groups whose numbers are known."""

import json
import time

import pytest

from fakes import completion, group, prompt, reward
from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.algorithms.policy.group_samples import build_step
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.config.losses.advantage_options import AdvantageConfig
from trl_ray.errors import WeightError
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.pipelines.run.recording import Recorder, StepTimes
from trl_ray.types import Event, Metric, RewardErrorKind, RewardFailure, ScoredGroup, StepResult


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
    recorder.step(
        3,
        groups=groups,
        built=built,
        result=result,
        times=StepTimes(begin=begin, taken=begin + 3, trained=begin + 5, published=begin + 6),
        version=3,
        snapshot=SNAPSHOT,
        slots=4,
        staleness=staleness,
    )
    [(step, line)] = notes.steps
    assert (step, line["loss"], line["grad_norm"], line["lr"], line["weights/version"]) == (3, 0.5, 2.0, 1e-3, 3)
    assert (line["entropy"], line["reward/mean"]) == (0.7, 0.5)
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
    recorder.evaluated(3, answers, None, 1.23456)
    [event] = notes.events
    assert isinstance(event, Event)
    assert dict(event.detail) == {"step": 3, "prompts": 4, "scored": 2, "reward/mean": 0.75, "seconds": 1.235}
    recorder.evaluated(3, answers[2:], None, 1)
    assert notes.events[-1].detail["reward/mean"] is None
