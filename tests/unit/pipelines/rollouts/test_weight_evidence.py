"""What weight checks of the actors on a fake runtime say of engines."""

import asyncio

from rollout_actor_stage import Stage
from trl_ray.actors.rollout_worker import PullReport
from trl_ray.pipelines.rollouts.agreement_check import Evidence
from trl_ray.types import EventKind, SamplingGap


def test_an_engine_that_may_disagree_is_told_of_and_works_on_and_is_evidence():
    async def run():
        await stage.start()
        wrong = PullReport(
            version=1,
            checksum="c1",
            seconds=0.1,
            weight_check_mean=0.05,
            weight_check_max=0.5,
            own_files_mean=0.01,
            disagreement="experts stay as they were",
        )
        stage.runtime.handles["rollout-0"].answers["pull"] = wrong
        stage.runtime.published = 1
        await stage.actors.publish(step=1)
        await stage.actors.pull()

    stage = Stage()
    asyncio.run(run())
    [(_, told)] = stage.told(EventKind.WEIGHT_CHECK)
    assert (told["agrees"], told["mean"]) == (False, 0.05)
    assert [detail["detail"] for _, detail in stage.told(EventKind.WARNING)] == ["experts stay as they were"]
    assert stage.actors.evidence == Evidence(weights=0.05, own_files=0.01)


def test_what_an_engine_said_of_its_samples_is_evidence_until_there_is_news():
    async def pull(version, sampling):
        report = PullReport(version=version, checksum=f"c{version}", seconds=0.1, sampling=sampling)
        stage.runtime.handles["rollout-0"].answers["pull"] = report
        stage.runtime.published = version
        await stage.actors.publish(step=version)
        await stage.actors.pull()
        return stage.actors.evidence.sampling

    async def run():
        await stage.start()
        return [await pull(version, gap) for version, gap in ((1, gaps[0]), (2, None), (3, gaps[1]))]

    stage = Stage()
    gaps = [SamplingGap(version=version, tokens=64, abs_diff=0.1, diff=0.0, doubt=0.5) for version in (0, 2)]
    # Between two steps there may be several pulls, some of which find nothing to compare.
    assert asyncio.run(run()) == [(gaps[0],), (gaps[0],), (gaps[1],)]


def test_what_was_seen_at_version_0_goes_into_checkpoints_and_along_with_later_checks():
    async def run():
        await stage.actors.start()
        state = stage.actors.weights.state_dict()
        again = Stage()
        again.actors.weights.load_state_dict(state)
        again.runtime.published = 5
        await again.actors.start()
        [pull] = again.runtime.handles["rollout-0"].asked("pull")
        return state, pull.args[1]

    stage = Stage()
    state, check = asyncio.run(run())
    assert state == {"initial_logprobs": [0.0, 0.0], "baseline": 0.0}
    assert (check.version, check.baseline, list(check.initial_logprobs)) == (5, 0.0, [0.0, 0.0])
