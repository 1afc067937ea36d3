"""The options of `sdpo` and `distill` are TRL's, with TRL's defaults, or say what stands in their place."""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("trl")

from transformers import TrainingArguments

from trl_ray.config.base import Section
from trl_ray.config.counterparts import COUNTERPARTS, counterpart
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.errors import ConfigError

pytestmark = pytest.mark.parity

# TRL's configurations and where they are; loaded by the tests, because TRL loads vLLM with them.
THEIRS = {
    "SDPOConfig": "trl.experimental.sdpo",
    "DistillationConfig": "trl",
    "IWOPDConfig": "trl.experimental.iw_opd",
    "GRPOConfig": "trl",
}

# Options of TRL's whose default here is another one, and why.
RUN_DIRECTORY = {
    "output_dir": "a run without a folder of its own goes to runs/run",
    "logging_steps": "every step is told; the console is the only place that it thins out",
    "save_steps": "a lost learner goes on from the last checkpoint",
}
SAME_IN_OTHER_WORDS = {
    "eval_steps": "0 is never, as eval_strategy=no is",
    "report_to": "the empty list is none",
    "min_p": "0 keeps all tokens, as None does",
    "chat_template_kwargs": "the empty mapping is None",
    "model_init_kwargs": "the empty mapping is None",
    "lr_scheduler_kwargs": "the empty mapping is None",
    "generation_kwargs": "the empty mapping is None",
}
FORMAT = {"bf16": "None is true in TRL; float32 is what two machines agree on, so bfloat16 is asked for"}
DIFFERENT: Mapping[str, Mapping[str, str]] = {
    "SDPOConfig": {**RUN_DIRECTORY, **SAME_IN_OTHER_WORDS, **FORMAT},
    "DistillationConfig": {
        **RUN_DIRECTORY,
        **SAME_IN_OTHER_WORDS,
        **FORMAT,
        "disable_dropout": "what a teacher says is compared with the student that wrote, which had no dropout",
        "log_completions": "completions go to a file, not to the console",
        "num_completions_to_print": "0 prints none; None prints all in TRL",
    },
    "IWOPDConfig": {
        **RUN_DIRECTORY,
        "eval_steps": SAME_IN_OTHER_WORDS["eval_steps"],
        "report_to": SAME_IN_OTHER_WORDS["report_to"],
        "model_init_kwargs": SAME_IN_OTHER_WORDS["model_init_kwargs"],
        "lr_scheduler_kwargs": SAME_IN_OTHER_WORDS["lr_scheduler_kwargs"],
        **FORMAT,
        "log_completions": "completions go to a file, not to the console",
        "num_completions_to_print": "0 prints none; None prints all in TRL",
        "distillation_objective": "its own trainer in TRL, an option here, where the divergence comes first",
        "loss_top_k": "the width of the support that loss_support names; TRL's 1 is loss_support=realised",
        "top_p": "samples are drawn from the whole distribution, which ratios are taken of",
    },
}
OURS: Mapping[str, type[Section]] = {
    "SDPOConfig": SDPOConfig,
    "DistillationConfig": DistillConfig,
    "IWOPDConfig": DistillConfig,
}


def defaults_of(theirs: str) -> dict[str, Any]:
    """Of one of TRL's, as it is declared."""
    return declared(getattr(importlib.import_module(THEIRS[theirs]), theirs))


def declared(config: type[Any]) -> dict[str, Any]:
    """Of a dataclass."""
    return {
        each.name: each.default if each.default is not dataclasses.MISSING else each.default_factory()  # type: ignore[misc]
        for each in dataclasses.fields(config)
    }


def own_defaults(config: type[Section]) -> dict[str, Any]:
    """Of one of our configurations."""
    defaults = {name: each.get_default(call_default_factory=True) for name, each in config.model_fields.items()}
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in defaults.items()}


@pytest.mark.parametrize("theirs", OURS)
def test_shared_options_have_trls_default_but_for_those_that_are_listed_with_a_reason(theirs: str) -> None:
    expected, own = defaults_of(theirs), own_defaults(OURS[theirs])
    different = {name for name, value in expected.items() if name in own and own[name] != value}
    assert different == set(DIFFERENT[theirs])


@pytest.mark.parametrize("theirs", THEIRS)
def test_every_option_of_trl_is_an_option_or_names_what_stands_in_its_place(theirs: str) -> None:
    own = OURS.get(theirs, GRPOConfig)
    for name in defaults_of(theirs):
        assert name in own.model_fields or counterpart(name, own.model_fields), name


@pytest.mark.parametrize("theirs", OURS)
def test_an_option_of_trl_that_is_none_here_is_answered_with_one_message_of_what_to_do(theirs: str) -> None:
    own = OURS[theirs]
    for name in defaults_of(theirs).keys() - own.model_fields.keys():
        with pytest.raises(ConfigError) as caught:
            own(**{name: None})
        message = str(caught.value)
        assert message.startswith(f"{name!r} is not an option here. ") and "\n" not in message
        assert "Did you mean" not in message, message


def test_no_counterpart_stands_for_an_option_that_nobody_has() -> None:
    known = {*declared(TrainingArguments), *(name for theirs in THEIRS for name in defaults_of(theirs))}
    elsewhere = {
        "torch_dtype",  # of ModelConfig before transformers 5
        "warmup_ratio", "logging_dir",  # of TrainingArguments before transformers 5
        "feedback_column",  # of the example script of SDPO
    }  # fmt: skip
    assert set(COUNTERPARTS) - known <= elsewhere
