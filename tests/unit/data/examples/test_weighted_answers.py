"""Messages of weight 0 in pairs and rated answers are read and not learnt; where an answer is scored, refused."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import DPOConfig, KTOConfig, ORPOConfig, RewardModelConfig
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, load_examples
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.errors import DataError
from trl_ray.types import TrainingSample

TOKENIZER = build_tokenizer()  # a token per byte; ChatML
END = "<|im_end|>\n"


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = says("user", "q")
TWICE = [says("assistant", "no", weight=0), says("user", "sure?"), says("assistant", "yes", weight=1)]
ROW = {"prompt": [ASKED], "chosen": TWICE, "rejected": [says("assistant", "bad")]}


def load(row: dict[str, Any], task: ExampleTask, config: Any, *more: dict[str, Any]) -> ExampleSet:
    return load_examples(config, TOKENIZER, task=task, dataset=[row, *more])


def trained(sample: TrainingSample) -> str:
    return str(TOKENIZER.decode(sample.completion_ids[sample.loss_mask].tolist()))


def whole(sample: TrainingSample) -> str:
    return str(TOKENIZER.decode([*sample.prompt_ids.tolist(), *sample.completion_ids.tolist()]))


# What ends a turn belongs to it; who speaks next does not.
AFTER = f"<|im_start|>user\nsure?{END}<|im_start|>assistant\nyes{END}"


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}])
def test_of_a_pair_an_answer_of_weight_0_is_read_and_not_learnt(key: dict[str, Any]) -> None:
    chosen = [says("assistant", "no", **key), *TWICE[1:]]
    (example,) = load({**ROW, "chosen": chosen}, ExampleTask.PAIRS, DPOConfig()).examples
    better, worse = example.samples
    assert whole(better) == f"<|im_start|>user\nq{END}<|im_start|>assistant\nno{END}{AFTER}"
    assert (trained(better), trained(worse)) == (AFTER, f"bad{END}")


def test_pairs_that_share_their_prompt_in_their_answers_do_the_same() -> None:
    row = {"chosen": [ASKED, *TWICE], "rejected": [ASKED, *ROW["rejected"]]}
    (example,) = load(row, ExampleTask.PAIRS, DPOConfig()).examples
    assert [trained(sample) for sample in example.samples] == [AFTER, f"bad{END}"]


def test_a_weight_of_1_changes_nothing() -> None:
    heard = [{key: value for key, value in message.items() if key != "weight"} for message in TWICE]
    (plain,) = load({**ROW, "chosen": heard}, ExampleTask.PAIRS, DPOConfig()).examples
    (one,) = load({**ROW, "chosen": [*heard[:2], TWICE[2]]}, ExampleTask.PAIRS, DPOConfig()).examples
    assert trained(one.samples[0]) == trained(plain.samples[0]) == f"no{END}{AFTER}"


def test_a_pair_of_which_one_answer_is_not_to_be_learnt_at_all_has_nothing_to_train() -> None:
    found = load({**ROW, "rejected": [says("assistant", "bad", weight=0)]}, ExampleTask.PAIRS, DPOConfig(), ROW)
    assert dict(found.untrained) == {0: Untrained.NO_TARGET} and len(found.examples) == 1


def test_the_likelihood_of_a_prompt_leaves_out_what_has_the_weight_0() -> None:
    row = {
        "prompt": [ASKED, says("assistant", "hm", weight=0), says("user", "r")],
        "chosen": [says("assistant", "a")],
        "rejected": [says("assistant", "b")],
    }
    (example,) = load(row, ExampleTask.LIKELIHOOD_PAIRS, ORPOConfig()).examples
    prompt = example.samples[2]
    after = f"<|im_start|>user\nr{END}<|im_start|>assistant\n"
    assert whole(prompt) == f"<|im_start|>user\nq{END}<|im_start|>assistant\nhm{END}{after}"
    assert trained(prompt) == f"user\nq{END}<|im_start|>assistant\n{after}"


def test_of_a_rated_answer_and_of_a_foreign_one_the_same_is_learnt() -> None:
    rated = {"prompt": [ASKED], "completion": TWICE, "label": True}
    other = {"prompt": [says("user", "o")], "completion": [says("assistant", "p")], "label": False}
    first, second = load(rated, ExampleTask.UNPAIRED_WITH_KL, KTOConfig(), other).examples
    assert trained(first.samples[0]) == AFTER
    assert second.mismatched is not None and trained(second.mismatched) == AFTER
    assert whole(second.mismatched).startswith(f"<|im_start|>user\no{END}<|im_start|>assistant\nno{END}")


def test_a_weight_that_is_none_is_named() -> None:
    with pytest.raises(DataError, match=r"field 'weight', must be 0 or 1"):
        load({**ROW, "chosen": [says("assistant", "a", weight=0.5)]}, ExampleTask.PAIRS, DPOConfig())


def test_a_reward_model_scores_an_answer_as_a_whole() -> None:
    with pytest.raises(DataError, match=r"field 'chosen', message 0 of the answer, must not have the weight 0.*Remove"):
        load(ROW, ExampleTask.REWARD_PAIRS, RewardModelConfig())
    heard = {**ROW, "chosen": TWICE[2:]}
    assert len(load(heard, ExampleTask.REWARD_PAIRS, RewardModelConfig()).examples) == 1
    before = {**heard, "prompt": [ASKED, TWICE[0], says("user", "r")]}
    assert len(load(before, ExampleTask.REWARD_PAIRS, RewardModelConfig()).examples) == 1
