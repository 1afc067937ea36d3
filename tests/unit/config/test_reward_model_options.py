"""Options of reward models: names, weights of all parts in order, when groups are joined."""

import pytest

from trl_ray.config.load import dump_yaml, load_config
from trl_ray.config.reward_model_options import RewardModelKind, RewardModelOptions, StepFormat
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("path", "label"),
    [("org/judge-7b", "judge-7b"), ("/models/rm/", "rm"), ("runs/x/step-50", "step-50"), ("rm", "rm")],
)
def test_a_model_is_named_by_the_end_of_its_path_unless_it_has_a_name(path, label):
    assert RewardModelOptions(model_name_or_path=path).label == label
    assert RewardModelOptions(model_name_or_path=path, name="judge").label == "judge"


def test_parts_are_weighed_functions_first_then_the_short_form_then_the_list():
    config = GRPOConfig(
        reward_funcs=["a", "b"],
        reward_model_name_or_path="org/first",
        reward_models=[{"model_name_or_path": "org/second", "weight": 0.25}],
    )
    assert [model.label for model in config.scoring_models] == ["first", "second"]
    assert config.part_weights == [1.0, 1.0, 1.0, 0.25]
    assert config.replace(reward_weights=[2.0, 3.0]).part_weights == [2.0, 3.0, 1.0, 0.25]
    assert GRPOConfig(reward_funcs=["a"], reward_weights=[2.0]).part_weights == [2.0]
    assert GRPOConfig(reward_funcs=["a"]).part_weights is None


def test_a_resolved_configuration_loads_again_to_the_same_models(tmp_path):
    config = RLOOConfig(
        reward_models=[
            {"model_name_or_path": "prm", "kind": "steps", "aggregation": "product", "step_format": "numbered"}
        ]
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    loaded = load_config(RLOOConfig, tmp_path / "config.yaml")
    assert loaded == config
    [model] = loaded.scoring_models
    assert (model.kind, model.step_format) == (RewardModelKind.STEPS, StepFormat.NUMBERED)


@pytest.mark.parametrize(
    "options",
    [
        {"reward_models": [{"model_name_or_path": "a/rm"}, {"model_name_or_path": "b/rm"}]},
        {"reward_models": [{"model_name_or_path": "a/rm"}], "reward_model_name_or_path": "b/rm"},
        {"reward_models": [{"model_name_or_path": "a/rm"}], "reward_funcs": ["rm"]},
    ],
    ids=["two models", "the short form", "a function"],
)
def test_two_parts_of_one_name_are_refused(options):
    with pytest.raises(ConfigError, match=r"'rm' appears twice.*reward_models\[\]\.name"):
        GRPOConfig(**options)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kind": "token"}, "kind"),
        ({"batch_size": 0}, "batch_size"),
        ({"weigth": 2.0}, "'weight'"),
        ({"name": "a/b"}, "name"),
        ({"max_length": 1}, "max_length"),
        ({"step_separator": ""}, "step_separator"),
    ],
)
def test_a_wrong_option_is_told_by_name(wrong, says):
    with pytest.raises(ConfigError, match=says):
        GRPOConfig(reward_models=[{"model_name_or_path": "rm", **wrong}])


def test_groups_are_joined_by_themselves_only_where_a_run_need_not_repeat_itself():
    assert AsyncGRPOConfig(max_staleness=1).joins_groups
    assert not AsyncGRPOConfig(max_staleness=0).joins_groups
    assert not AsyncGRPOConfig(max_staleness=1, runtime={"kind": "local"}).joins_groups
    assert not GRPOConfig().joins_groups


def test_threads_follow_cpus_unless_they_are_given():
    assert RewardModelOptions(model_name_or_path="rm").num_threads == 1
    assert RewardModelOptions(model_name_or_path="rm", num_cpus=4.0).num_threads == 4
    assert RewardModelOptions(model_name_or_path="rm", num_cpus=4.0, threads=2).num_threads == 2
