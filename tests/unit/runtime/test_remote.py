import os

import pytest

from trl_ray.config.reward_model_options import RewardModelOptions
from trl_ray.config.runs.run_environment import learner_threads, set_environment
from trl_ray.config.sections import RewardConfig, RolloutConfig, RuntimeConfig
from trl_ray.runtime.placement import missing_resources
from trl_ray.runtime.remote import ActorPlan, actor_environment, plan_actors
from trl_ray.runtime.runtime import Role


def plans(*, runtime=None, rollout=None, reward=None, models=()):
    return plan_actors(
        runtime=RuntimeConfig(**(runtime or {})),
        rollout=RolloutConfig(**(rollout or {})),
        reward=RewardConfig(**(reward or {})),
        reward_models=[RewardModelOptions(model_name_or_path=f"models/{name}", **wants) for name, wants in models],
    )


def test_every_role_gets_the_resources_its_section_asks_for():
    made = plans(
        runtime={"learner_num_cpus": 3.0, "learner_num_gpus": 1.0},
        rollout={"num_workers": 2, "num_cpus": 2.0, "num_gpus": 0.5},
        reward={"num_workers": 4, "num_cpus": 0.25},
    )
    assert {role: (plan.count, plan.bundle) for role, plan in made.items()} == {
        Role.LEARNER: (1, {"CPU": 3.0, "GPU": 1.0}),
        Role.QUEUE: (1, {}),
        Role.ROLLOUT: (2, {"CPU": 2.0, "GPU": 0.5}),
        Role.REWARD: (4, {"CPU": 0.25}),
    }


def test_ray_restarts_only_actors_that_come_back_as_they_were():
    made = plans()
    assert {role: plan.max_restarts for role, plan in made.items()} == {
        Role.LEARNER: 0,
        Role.QUEUE: -1,
        Role.ROLLOUT: 0,
        Role.REWARD: -1,
    }
    assert [role for role, plan in made.items() if plan.survives] == [Role.QUEUE, Role.REWARD]


def test_only_the_learner_is_probed_on_a_thread_of_its_own():
    assert [role for role, plan in plans().items() if not plan.is_async] == [Role.LEARNER]


def test_threads_follow_cpus_unless_they_are_given():
    assert plans(runtime={"learner_num_cpus": 4.0})[Role.LEARNER].threads == 4
    assert plans(runtime={"learner_num_cpus": 0.5})[Role.LEARNER].threads == 1
    assert plans(runtime={"learner_num_cpus": 4.0, "learner_threads": 2})[Role.LEARNER].threads == 2
    assert plans(rollout={"num_cpus": 3.0})[Role.ROLLOUT].threads == 3


def test_a_tensor_parallel_engine_gets_a_gpu_per_rank():
    assert plans(rollout={"tensor_parallel_size": 2})[Role.ROLLOUT].num_gpus == 2
    assert plans(rollout={"tensor_parallel_size": 2, "num_gpus": 4.0})[Role.ROLLOUT].num_gpus == 4


def test_an_actors_process_inherits_the_drivers_hub_settings_and_gets_its_threads(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    plan = plans(rollout={"num_cpus": 3.0})[Role.ROLLOUT]
    environment = actor_environment(plan)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("3", "3")
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment.keys().isdisjoint({"SOMETHING_ELSE", "HF_TOKEN"})


def test_an_actors_process_gets_what_a_file_sets_under_env(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "TRL_RAY_INHERITED": "FIRST", "FIRST": "1"})
    set_environment({"JUDGE_URL": "http://judge", "DEPTH": 3, "CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": 9})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert os.environ["TRL_RAY_INHERITED"] == "FIRST,JUDGE_URL,DEPTH,CUDA_VISIBLE_DEVICES,OMP_NUM_THREADS"
    environment = actor_environment(plans(rollout={"num_cpus": 3.0})[Role.ROLLOUT])
    assert (environment["JUDGE_URL"], environment["DEPTH"]) == ("http://judge", "3")
    # Threads that are written down hold, those that are not are the plan's; GPUs are those that Ray gives.
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("9", "3")
    assert "CUDA_VISIBLE_DEVICES" not in environment
    # The learner reads them there, unless its own option says otherwise.
    assert learner_threads(RuntimeConfig(learner_num_cpus=4)) is None
    assert learner_threads(RuntimeConfig(learner_num_cpus=4, learner_threads=2)) == 2
    monkeypatch.delenv("TRL_RAY_INHERITED")
    assert learner_threads(RuntimeConfig(learner_num_cpus=4)) == 4


def test_a_plans_own_variables_win():
    plan = ActorPlan(
        role=Role.REWARD,
        count=1,
        num_cpus=0,
        num_gpus=0,
        max_restarts=-1,
        threads=1,
        is_async=True,
        environment={"OMP_NUM_THREADS": "8"},
    )
    assert actor_environment(plan)["OMP_NUM_THREADS"] == "8"


def test_a_plan_that_fits_misses_nothing():
    assert missing_resources(plans(rollout={"num_workers": 2}), {"CPU": 3.0}) is None


@pytest.mark.parametrize("available", [{"CPU": 2.0}, {}])
def test_a_plan_that_does_not_fit_says_what_is_wanted_by_whom_and_what_there_is(available):
    table = missing_resources(plans(rollout={"num_workers": 2, "num_gpus": 1.0}), available)
    assert table is not None
    assert table.splitlines() == [
        f"  CPU: wants 3 (learner 1 x 1, rollout 2 x 1), the cluster has {available.get('CPU', 0):g}",
        "  GPU: wants 2 (rollout 2 x 1), the cluster has 0",
    ]


MODELS = [("judge", {"num_workers": 2, "num_cpus": 1.5, "num_gpus": 0.5}), ("prm", {"threads": 3})]


def test_each_reward_model_has_a_plan_of_its_own_and_comes_back_by_itself():
    made = plans(models=MODELS)
    judge, prm = made["reward_model judge"], made["reward_model prm"]
    assert (judge.count, judge.bundle, judge.threads) == (2, {"CPU": 1.5, "GPU": 0.5}, 1)
    assert (prm.count, prm.bundle, prm.threads) == (1, {}, 3)
    assert all(plan.role is Role.REWARD_MODEL and plan.survives and plan.is_async for plan in (judge, prm))
    assert list(plans()) == ["learner", "queue", "rollout", "reward"]


def test_a_shortage_names_the_reward_model_that_asks_for_it():
    table = missing_resources(plans(models=MODELS), {"CPU": 3.0, "GPU": 0.0})
    assert table is not None
    assert table.splitlines() == [
        "  CPU: wants 5 (learner 1 x 1, rollout 1 x 1, reward_model judge 2 x 1.5), the cluster has 3",
        "  GPU: wants 1 (reward_model judge 2 x 0.5), the cluster has 0",
    ]
