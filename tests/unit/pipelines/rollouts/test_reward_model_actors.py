"""Reward models of a run: told apart from functions, found fit or refused, shown in the plan."""

import pytest

from objectives import prepare
from tiny_models import build_tiny_model, build_tokenizer
from tiny_reward_models import build_reward_model
from trl_ray.algorithms.policy.group_samples import RewardRules
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
from trl_ray.errors import ConfigError, ModelError
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.rollouts.preparation import Inputs
from trl_ray.pipelines.rollouts.reward_model_actors import names_model, separate_reward_models

ROWS = [{"prompt": f"count to {number}: "} for number in range(1, 5)]
CHATS = [{"prompt": [{"role": "user", "content": "Why?"}]}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a reward model, and one whose tokenizer has no chat template."""
    base = tmp_path_factory.mktemp("models")
    silent = build_tokenizer()
    silent.chat_template = None
    return {
        "policy": build_tiny_model(base / "policy"),
        "judge": build_reward_model(base / "judge"),
        "silent": build_reward_model(base / "silent", tokenizer=silent),
        "prm": build_reward_model(base / "prm", labels=2),
    }


def score(completions, **columns):
    return [0.0 for _ in completions]


def args(folders, *, kind=GRPOConfig, **changes):
    options = {
        "model_name_or_path": folders["policy"],
        "num_generations": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "max_steps": 3,
        **changes,
    }
    return kind(**options)


def prepared(folders, *, rows=ROWS, **changes):
    return prepare(args(folders, **changes), Inputs(train_dataset=rows))


def test_folders_of_models_among_the_functions_become_reward_models_with_their_weights(folders):
    given = [score, folders["judge"], "arithmetic"]
    separated = separate_reward_models(given, args(folders, reward_weights=[1.0, 5.0, 2.0]))
    assert separated.functions == separated.given == [score, "arithmetic"]
    assert separated.changes["reward_weights"] == [1.0, 2.0]
    [model] = separated.changes["reward_models"]
    assert (model.model_name_or_path, model.weight) == (folders["judge"], 5.0)


def test_a_pipeline_takes_a_folder_where_trl_takes_a_model_and_writes_it_into_its_configuration(folders):
    pipeline = GRPOPipeline(
        reward_funcs=[folders["judge"], score], args=args(folders, reward_weights=[0.5, 1.0]), train_dataset=ROWS
    )
    assert pipeline.config.reward_funcs == ["python:score"] and pipeline.config.part_weights == [1.0, 0.5]
    again = GRPOPipeline(reward_funcs=[folders["judge"], score], args=pipeline.config, train_dataset=ROWS)
    assert [model.label for model in again.config.scoring_models] == ["judge"]
    assert again.config.part_weights == [1.0, 0.5]
    alone = GRPOPipeline(reward_funcs=folders["judge"], args=args(folders), train_dataset=ROWS)
    assert [spec.name for spec in alone.prepare().rewards] == []


def test_a_folder_in_the_file_is_a_reward_model_too(folders):
    pipeline = GRPOPipeline(args=args(folders, reward_funcs=["think_format", folders["prm"]]), train_dataset=ROWS)
    assert pipeline.config.reward_funcs == ["think_format"]
    assert [model.label for model in pipeline.config.scoring_models] == ["prm"]


def test_what_is_no_folder_of_a_model_stays_a_function_with_its_own_error(folders, tmp_path):
    assert separate_reward_models([str(tmp_path), "arithmetc"], args(folders)).changes == {}
    # A name on the Hub is a model's, as all strings are in TRL.
    [named] = separate_reward_models(["someone/judge"], args(folders)).changes["reward_models"]
    assert named.model_name_or_path == "someone/judge"
    with pytest.raises(ConfigError, match="Did you mean 'arithmetic'"):
        prepared(folders, reward_funcs=["arithmetc"])


def test_a_run_needs_a_function_or_a_model(folders):
    with pytest.raises(ConfigError, match="reward_funcs must name at least one function, or reward_models a model"):
        prepared(folders)
    made = prepared(folders, reward_model_name_or_path=folders["judge"])
    assert [model.options.label for model in made.reward_models] == ["judge"] and made.rewards == ()


def test_the_plan_shows_reward_models_with_their_actors_and_memory(folders):
    made = prepared(
        folders,
        reward_funcs=["think_format"],
        reward_models=[
            {"model_name_or_path": folders["judge"], "num_workers": 2, "num_cpus": 0.5},
            {"model_name_or_path": folders["prm"], "dtype": "bfloat16"},
        ],
    )
    assert made.describe()["reward models"] == "judge (sequence), prm (steps)"
    actors, memory = made.actors(), made.expected_memory()
    assert actors.keys() == memory.keys()
    assert (actors["reward_model judge"].count, actors["reward_model judge"].num_cpus) == (2, 0.5)
    # Embedding, two layers, a norm and a head of 32 are 23040 numbers; two labels have 32 weights and 2 biases more.
    process = 0.6 * (1 << 30)
    assert memory["reward_model judge"] - process == 4 * 23040
    assert memory["reward_model prm"] - process == pytest.approx(2 * (23040 + 34), abs=1)


def test_actors_join_groups_as_the_run_allows_unless_they_are_told(folders):
    models = [{"model_name_or_path": folders["judge"]}, {"model_name_or_path": folders["prm"], "join_groups": True}]

    def told(**changes):
        made = prepared(folders, reward_models=models, chat_template_kwargs={"mood": "calm"}, **changes)
        given = made.arguments(journal="j", checkpoint=None, resume_from=None, incarnation="i").reward_models
        assert all(each["template_kwargs"] == {"mood": "calm"} for each in given)
        return [each["join_groups"] for each in given]

    assert told() == [False, True]
    assert told(kind=AsyncGRPOConfig, max_staleness=1) == [True, True]


def test_normalised_objectives_are_weighed_by_the_models_weights_too(folders):
    models = [{"model_name_or_path": folders["judge"], "weight": 0.5}]
    config = args(folders, reward_funcs=["think_format"], reward_models=models)
    assert RewardRules.of(config).reward_weights == (1.0, 0.5)


def test_a_function_given_in_python_may_not_have_a_models_name(folders):
    config = args(folders, reward_models=[{"model_name_or_path": folders["judge"], "name": "score"}])
    with pytest.raises(ConfigError, match="'score' appears twice"):
        prepare(config, Inputs(train_dataset=ROWS, reward_funcs=[score]))


def test_a_reward_model_must_be_able_to_read_the_prompts(folders):
    assert prepared(folders, reward_model_name_or_path=folders["silent"]).reward_models
    with pytest.raises(ModelError, match="reward model silent: its tokenizer must have a chat template"):
        prepared(folders, rows=CHATS, reward_model_name_or_path=folders["silent"])
    with pytest.raises(ModelError, match=r"reward model policy: .*Qwen2ForCausalLM"):
        prepared(folders, reward_model_name_or_path=folders["policy"])


def test_what_a_reward_models_template_leaves_out_of_the_prompts_is_told_with_its_name(folders, tmp_path):
    forgetful = build_tokenizer()
    forgetful.chat_template = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    model = build_reward_model(tmp_path / "forgetful", tokenizer=forgetful)
    system = {"role": "system", "content": "be brief"}
    rows = [*CHATS, {"prompt": [system, *CHATS[0]["prompt"]]}]
    plan = prepared(folders, rows=rows, reward_model_name_or_path=str(model))
    (note,) = [note for note in plan.notes if "reward model" in note]
    assert note.startswith("By the chat template of reward model ") and "1 of 2 prompts" in note
    assert "(row 1); first: message 0, field 'content'." in note
    assert prepared(folders, rows=rows, reward_model_name_or_path=folders["judge"]).notes == ()


def test_a_misspelt_file_of_functions_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards").mkdir()
    assert names_model("owner/name")
    assert (
        not names_model("rewards/my.py") and not names_model("elsewhere/my.py") and not names_model("rewards/helpers")
    )
