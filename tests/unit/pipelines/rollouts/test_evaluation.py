"""Held-out prompts are all answered, also where a worker is lost while it answers its share."""

import asyncio

import pytest

from fakes import completion, prompt, reward
from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.errors import ActorLostError, DeadlineError, EngineError
from trl_ray.pipelines.rollouts.evaluation import SHARE_TRIES, evaluate
from trl_ray.rewards.scoring import ScoredGroup
from virtual_time import run_in_virtual_time


class Workers:
    """Workers by name; the n-th call of one fails as `fails` says, and loses it."""

    def __init__(self, *names, fails=()):
        self.working, self.fails, self.asked = list(names), list(fails), []

    async def ask_worker(self, handle, method, share, *, seed, deadline_s):
        self.asked.append((handle, [each.prompt_id for each in share], seed))
        await asyncio.sleep(1)
        for lost in [lost for lost in self.fails if lost[0] == handle]:
            self.fails.remove(lost)
            self.working.remove(handle)
            raise lost[1]
        scored = ScoredGroup(rewards=(reward(1.0),))
        return [EvaluatedPrompt(prompt=each, completions=(completion(),), scored=scored) for each in share]


PROMPTS = [prompt(number) for number in range(5)]


def answered(found):
    return [answer.prompt.prompt_id for answer in found.answers]


@pytest.mark.parametrize("error", [ActorLostError("died"), DeadlineError("silent"), EngineError("hangs")])
def test_the_share_of_a_lost_worker_goes_whole_to_another_so_that_its_samples_stay_the_same(error):
    workers = Workers("rollout-0", "rollout-1", fails=[("rollout-1", error)])
    found = run_in_virtual_time(evaluate(workers, PROMPTS, seed=7, deadline_s=60))
    assert answered(found) == ["0:0", "0:2", "0:4", "0:1", "0:3"]
    assert found.lost == (str(error),)
    assert workers.asked[-1] == ("rollout-0", ["0:1", "0:3"], 7)


def test_where_the_only_worker_is_lost_its_replacement_is_waited_for():
    async def run():
        workers = Workers("rollout-0", fails=[("rollout-0", ActorLostError("died"))])
        asking = asyncio.create_task(evaluate(workers, PROMPTS, seed=7, deadline_s=60))
        await asyncio.sleep(30)
        workers.working.append("rollout-0+1")
        return await asking

    found = run_in_virtual_time(run())
    assert len(answered(found)) == 5


def test_a_share_that_is_lost_with_every_worker_is_missing_and_no_endless_task():
    names = [f"rollout-{number}" for number in range(SHARE_TRIES + 1)]
    workers = Workers(*names, fails=[(name, EngineError("refuses")) for name in names])
    found = run_in_virtual_time(evaluate(workers, PROMPTS[:1], seed=7, deadline_s=60))
    assert (answered(found), len(found.lost)) == ([], SHARE_TRIES)
