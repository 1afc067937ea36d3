"""What a run resolves before anything starts: lengths, steps, the weight check and its tolerance."""

import json
import shutil

import numpy as np
import pytest

from objectives import prepare
from tiny_architectures import build_tiny_architecture
from tiny_models import MAX_POSITIONS, build_tiny_model
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
from trl_ray.errors import ConfigError, DataError, ModelError
from trl_ray.pipelines.rollouts.preparation import PROMPTS, Inputs
from trl_ray.rewards.scoring import TrainingCourse

ROWS = [{"prompt": f"count to {number}: "} for number in range(1, 11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def score(completions, **columns):
    return [0.0 for _ in completions]


def prepared(model, *, rows=ROWS, inputs=None, kind=GRPOConfig, **changes):
    options = {
        "model_name_or_path": model,
        "num_generations": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "max_steps": 3,
        **changes,
    }
    given = {"train_dataset": rows, "reward_funcs": [score], **(inputs or {})}
    return prepare(kind(**options), Inputs(**given))


def test_sequences_are_as_long_as_the_model_allows_unless_the_run_says_less(model):
    assert prepared(model).max_model_len == MAX_POSITIONS == 512
    assert prepared(model, rollout={"max_model_len": 100}).max_model_len == 100
    assert prepared(model, rollout={"max_model_len": MAX_POSITIONS}).max_model_len == MAX_POSITIONS


def test_sequences_longer_than_the_model_are_refused(model):
    with pytest.raises(ConfigError, match="512 positions, got 513"):
        prepared(model, rollout={"max_model_len": MAX_POSITIONS + 1})


def test_rope_that_depends_on_length_keeps_sequences_to_the_context_where_nothing_is_scaled(model):
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    changes = {"model_init_kwargs": {"rope_scaling": scaled}}
    assert prepared(model, **changes).max_model_len == MAX_POSITIONS - 1
    assert prepared(model, rollout={"max_model_len": 100}, **changes).max_model_len == 100
    with pytest.raises(ConfigError, match=r"rollout\.max_model_len must be at most 511 with this model.*got 512"):
        prepared(model, rollout={"max_model_len": MAX_POSITIONS}, **changes)


def test_a_model_that_does_not_say_how_long_it_is_must_be_told(model, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ray.pipelines.rollouts.preparation.max_positions", lambda model: None)
    with pytest.raises(ConfigError, match=r"rollout\.max_model_len must be set"):
        prepared(model)
    assert prepared(model, rollout={"max_model_len": 4096}).max_model_len == 4096


def test_a_completion_must_leave_room_for_at_least_one_token_of_prompt(model):
    assert prepared(model, rows=[{"prompt": "x"}], max_completion_length=511).max_model_len == 512
    with pytest.raises(ConfigError, match=r"max_completion_length.*got 512"):
        prepared(model, rows=[{"prompt": "x"}], max_completion_length=512)


def test_a_prompt_may_fill_what_the_completion_leaves_and_no_more(model):
    # The tokenizer makes one token of a byte.
    limits = {"rollout": {"max_model_len": 40}, "max_completion_length": 16}
    assert prepared(model, rows=[{"prompt": "x" * 24}], **limits).prompts.longest == 24
    with pytest.raises(DataError, match="24 tokens"):
        prepared(model, rows=[{"prompt": "x" * 25}], **limits)
    whole = prepared(model, rows=[{"prompt": "x" * 20}], **limits).prompts
    cut = prepared(model, rows=[{"prompt": "y" * 5 + "x" * 20}], max_prompt_length=20, **limits).prompts
    assert cut.longest == 20 and cut.prompt(0).token_ids.tolist() == whole.prompt(0).token_ids.tolist()
    assert any("5 of 25 (20.0%) tokens" in note and "max_prompt_length" in note for note in cut.notes)


def test_steps_are_given_or_follow_from_the_epochs(model):
    assert prepared(model, max_steps=7).total_steps == 7
    # 10 rows, 4 groups a step: 2.5 steps an epoch, of which TRL's default is 3.
    assert prepared(model, max_steps=-1).total_steps == 8
    assert prepared(model, max_steps=-1, num_train_epochs=1.0).total_steps == 3
    assert prepared(model, max_steps=-1, num_train_epochs=2.0).total_steps == 5
    assert prepared(model, max_steps=-1, num_train_epochs=0.01).total_steps == 1
    with pytest.raises(ConfigError, match="max_steps"):
        prepared(model, max_steps=0)


def test_the_weight_check_is_the_first_prompts_cut_or_repeated_and_the_same_every_time(model):
    ids = prepared(model, rows=[{"prompt": "abcdefghijklmnopqrstuvwxyz"}, {"prompt": "0123456789"}]).weight_check_ids
    assert (len(ids), ids.dtype) == (32, np.int32)
    plan = prepared(model, rows=[{"prompt": "abc"}, {"prompt": "12"}])
    first = [*plan.prompts.prompt(0).token_ids, *plan.prompts.prompt(1).token_ids]
    assert list(plan.weight_check_ids) == (first * 7)[:32]
    assert np.array_equal(prepared(model).weight_check_ids, prepared(model).weight_check_ids)


def test_the_first_weight_check_has_a_text_of_several_blocks_and_one_beyond_the_context_of_scaled_rope(model, tmp_path):
    assert [len(ids) for ids in prepared(model).first_check_ids] == [160]
    limits = {"rollout": {"max_model_len": 100}, "max_completion_length": 16}
    assert [len(ids) for ids in prepared(model, **limits).first_check_ids] == [100]
    scaled = tmp_path / "scaled"
    shutil.copytree(model, scaled)
    config = json.loads((scaled / "config.json").read_text())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    (scaled / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert [len(ids) for ids in prepared(str(scaled)).first_check_ids] == [160, 320]


def test_the_agreement_rule_is_tight_only_where_both_sides_compute_in_float32(model):
    def ceiling(**changes):
        plan = prepared(model, **changes)
        rule = plan.arguments(journal="j", checkpoint=None, resume_from=None, incarnation="i").rollout["agreement"]
        return rule.ceiling

    assert ceiling() == 1e-3
    assert ceiling(rollout={"dtype": "float32"}) == 1e-3
    assert ceiling(rollout={"dtype": "bfloat16"}) == 0.2
    assert ceiling(dtype="bfloat16") == 0.2
    assert ceiling(bf16=True) == 0.2
    assert ceiling(rollout={"canary_tolerance": 0.5}) == 0.5


def test_reward_functions_of_the_caller_need_as_many_weights(model):
    with pytest.raises(ConfigError, match="2 weights for 1 functions"):
        prepared(model, reward_weights=[1.0, 2.0])


def test_evaluation_needs_prompts_of_its_own_and_takes_as_many_as_asked(model):
    with pytest.raises(ConfigError, match="eval_steps=2 needs held-out prompts"):
        prepared(model, eval_steps=2)
    held_out = {"eval_dataset": ROWS[:5]}
    made = prepared(model, eval_steps=2, eval_num_prompts=3, inputs=held_out)
    assert [prompt.text for prompt in made.eval_sets[""]] == [row["prompt"] for row in ROWS[:3]]
    assert prepared(model, inputs=held_out).eval_sets == {}
    named = {"eval_dataset": {"near": ROWS[:2], "far": ROWS[2:5]}}
    made = prepared(model, eval_steps=2, eval_num_prompts=2, inputs=named)
    assert {name: [prompt.text for prompt in found] for name, found in made.eval_sets.items()} == {
        "near": [row["prompt"] for row in ROWS[:2]],
        "far": [row["prompt"] for row in ROWS[2:4]],
    }
    with pytest.raises(ConfigError, match="at least one set"):
        prepared(model, eval_steps=2, inputs={"eval_dataset": {}})


ANSWERED = [{"prompt": f"q{number}", "answer": f"so\\n#### {number}"} for number in range(4)]


def test_reward_columns_are_checked_in_all_rows_before_anything_starts(model):
    numbers = {"inputs": {"reward_funcs": ["last_number"]}}
    assert prepared(model, rows=ANSWERED, **numbers).notes == ()
    rows = [*ANSWERED[:2], {"prompt": "r", "answer": "Paris"}, {"prompt": "s", "answer": "Rome"}]
    with pytest.raises(DataError) as caught:
        prepared(model, rows=rows, **numbers)
    assert "2 of 4 rows cannot be used. 2 rows (2, 3): Row 2 of the given list, field 'answer' must be a whole" in str(
        caught.value
    )
    dropped = prepared(model, rows=rows, on_bad_row="drop", **numbers)
    assert [dropped.prompts.prompt(ordinal).text for ordinal in range(2)] in (["q0", "q1"], ["q1", "q0"])
    assert (len(dropped.prompts), dropped.describe()["rows left out"]) == (2, 2)
    assert dropped.notes[0].startswith("2 rows (2, 3): Row 2 of the given list, field 'answer'")
    with pytest.raises(DataError, match="field 'answer' must be a whole number"):
        prepared(model, rows=ANSWERED, eval_steps=1, inputs={**numbers["inputs"], "eval_dataset": rows})


def test_values_that_rewards_miss_are_counted_and_given_as_none(model):
    made = prepared(
        model,
        rows=[*ANSWERED, {"prompt": "r"}, {"prompt": "s", "answer": None}],
        inputs={"reward_funcs": ["last_number"]},
    )
    assert made.notes == (
        "2 of 6 prompts of the given list have no 'answer': the reward function last_number is given None there.",
    )
    assert all("answer" in made.prompts.prompt(ordinal).columns for ordinal in range(6))


def test_the_queue_learns_how_far_generation_may_run_ahead(model):
    made = prepared(model, kind=AsyncGRPOConfig, max_staleness=2, max_look_ahead=3, zero_variance_groups="drop")
    arguments = made.arguments(journal="j", checkpoint=None, resume_from=4, incarnation="job-1")
    queue = arguments.queue
    assert (queue["groups_per_step"], queue["max_staleness"], queue["max_look_ahead"]) == (4, 2, 3)
    assert (queue["drop_zero_variance"], queue["adaptive_slots"]) == (True, True)
    assert (queue["resume_from_step"], queue["resume_version"], queue["incarnation"]) == (4, 4, "job-1")
    synchronous = prepared(model).arguments(journal="j", checkpoint=None, resume_from=None, incarnation="job-1").queue
    assert (synchronous["max_staleness"], synchronous["max_look_ahead"], synchronous["adaptive_slots"]) == (0, 1, False)


def test_the_plan_in_numbers(model):
    plan = prepared(model, kind=AsyncGRPOConfig, max_staleness=2).describe()
    assert json.loads(json.dumps(plan)) == {
        "optimizer steps": 3,
        "updates per step": 1,
        "learner ranks": 1,
        "learner computes in": "float32 (bf16 is the default where runtime.learner_num_gpus is above 0)",
        "engines compute in": "float32",
        "prompt groups per step": 4,
        "completions per step": 8,
        "training prompts": 10,
        "staleness bound (steps)": 2,
        "admission slots": 12,
        "tokens per sequence": 512,
        "reward functions": "score",
    }


def test_a_run_of_functions_given_in_python_says_how_to_resume_it(model):
    with pytest.raises(ConfigError, match=r"python:judge.*from_run"):
        prepared(model, reward_funcs=["python:judge"], inputs={"reward_funcs": None})


def test_a_run_goes_on_with_the_rows_that_it_began_with_and_no_others(model, tmp_path):
    def plan(rows):
        return prepared(model, rows=rows, inputs={"reward_funcs": [score]})

    rows = [{"prompt": f"count to {number}: ", "answer": str(number)} for number in range(1, 11)]
    begun = plan(rows)
    (tmp_path / PROMPTS).write_text(json.dumps(begun.prompts_state()))
    plan(rows).check_prompts(str(tmp_path))
    begun.check_prompts(None)
    begun.check_prompts(str(tmp_path / "of an older release"))
    for other, told in (
        (rows[:9], "9 now, with other rows and prompts and columns"),
        (rows[::-1], "10 now, with other prompts and columns"),
        ([*rows[:9], {"prompt": "count to 99: ", "answer": "10"}], "10 now, with other prompts"),
        ([{**row, "answer": "0"} for row in rows], "10 now, with other columns"),
    ):
        with pytest.raises(DataError, match=rf"go on with the rows that it began with.*10 rows then and {told}\."):
            plan(other).check_prompts(str(tmp_path))


def test_reward_workers_know_how_long_the_run_is_and_who_asks_for_special_tokens(model):
    def arguments(*functions, **changes):
        made = prepared(model, inputs={"reward_funcs": list(functions)}, **changes)
        return made.arguments(journal="j", checkpoint=None, resume_from=None, incarnation="i")

    plain = arguments(score, max_steps=-1, num_train_epochs=2.0)
    # 10 rows, 4 groups a step
    assert plain.reward["course"] == TrainingCourse(max_steps=5, steps_per_epoch=2.5)
    assert plain.rollout["scores_raw_texts"] is False
    assert arguments(score, "think_format").rollout["scores_raw_texts"] is True


def test_a_loss_of_routers_needs_a_mixture_of_experts_and_is_refused_before_the_start(model):
    assert prepared(model, router_aux_loss_coef=0.0).config.router_aux_loss_coef == 0
    with pytest.raises(ModelError, match="router_aux_loss_coef must be left out for a qwen2"):
        prepared(model, router_aux_loss_coef=0.01)


def test_a_model_whose_sampler_would_be_another_policy_is_refused_and_an_unproved_one_told(model, tmp_path):
    path = build_tiny_architecture(tmp_path / "phimoe", "phimoe")
    with pytest.raises(ModelError, match="by lot in training"):
        prepared(path)
    assert not [note for note in prepared(model).notes if "not proved" in note]
