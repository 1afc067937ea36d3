"""All that is wrong with a configuration is told at once: unknown keys, wrong values, and rules that are not kept."""

from __future__ import annotations

import enum
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ray.config.base import Section, rule
from trl_ray.config.load import build
from trl_ray.config.runs.config_registry import CONFIGS
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
from trl_ray.config.sections import RuntimeConfig
from trl_ray.errors import ConfigError


def told(config: type[Section], **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(config, values)
    return str(caught.value).split("\n")


def begins(lines: list[str]) -> list[str]:
    """What each line is about."""
    return sorted(line.partition(" ")[0].strip("':") for line in lines)


class Pair(Section):
    """Two options and two rules."""

    a: int = 0
    b: int = 0

    @rule
    def _check_a(self) -> None:
        if self.a > 3:
            raise ValueError(f"a must be at most 3, got {self.a}.")

    @rule
    def _check_b(self) -> None:
        if self.b > 3:
            raise ValueError(f"b must be at most 3, got {self.b}.")


class Relaxed(Pair):
    """Without the first."""

    c: Pair = Pair()

    @rule
    def _check_a(self) -> None:
        return

    @rule
    def _check_c(self) -> None:
        if self.b < 0:
            raise ValueError(f"b must be at least 0, got {self.b}.")


def test_all_rules_of_a_section_are_asked() -> None:
    assert told(Pair, a=4, b=5) == ["a must be at most 3, got 4.", "b must be at most 3, got 5."]


def test_a_rule_that_a_class_writes_anew_is_that_of_the_class() -> None:
    assert Relaxed(a=9).a == 9
    assert told(Relaxed, a=9, b=4) == ["b must be at most 3, got 4."]


def test_rules_of_sections_are_told_beside_those_of_the_whole() -> None:
    assert told(Relaxed, b=-1, c={"a": 4, "b": 4}) == [
        "c: a must be at most 3, got 4.",
        "c: b must be at most 3, got 4.",
        "b must be at least 0, got -1.",
    ]


def test_keys_values_and_contradictions_come_in_one_message() -> None:
    lines = told(
        GRPOConfig,
        learning_rat=1e-5,
        seed=-1,
        load_in_4bit=True,
        generation_batch_size=12,
        optim="lion",
        runtime={"kind": "local", "num_learners": 2, "num_cpu": 3},
        rollout={"num_workers": 0},
        vllm_server_host="far",
    )
    assert begins(lines) == [
        "generation_batch_size", "learning_rat", "optim", "rollout.num_workers", "runtime.num_cpu",
        "runtime.num_learners", "seed", "use_peft", "vllm_server_host",
    ]  # fmt: skip


def test_what_the_default_of_a_wrong_option_contradicts_is_not_told() -> None:
    # With max_staleness=4, which was meant, there is no contradiction.
    assert begins(told(AsyncGRPOConfig, max_staleness="4", max_look_ahead=2)) == ["max_staleness"]
    # A section that is wrong itself says nothing of the whole.
    lines = told(AsyncGRPOConfig, runtime={"num_learners": "2"}, rollout={"num_workers": 2}, min_tokens=9999)
    assert begins(lines) == ["min_tokens", "runtime.num_learners"]


def test_objects_of_python_are_told_of_as_well() -> None:
    lines = told(GRPOConfig, runtime=RuntimeConfig(kind="local", num_learners=2), seed=-1, load_in_8bit=True)
    assert begins(lines) == ["runtime.num_learners", "seed", "use_peft"]


def _values(annotation: Any) -> st.SearchStrategy[Any] | None:
    if get_origin(annotation) is Annotated:
        return _values(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return st.sampled_from([each.value for each in annotation])
    if annotation in (bool, int, float):
        return {bool: st.booleans(), int: st.integers(0, 5), float: st.sampled_from([0.0, 0.5, 1.0, 3.0])}[annotation]
    parts = [found for each in get_args(annotation) if (found := _values(each)) is not None]
    return st.one_of(parts) if parts and get_origin(annotation) not in (dict, list, tuple) else None


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25)
@given(data=st.data())
def test_no_rule_stumbles_over_what_another_would_have_refused(name: str, data: st.DataObject) -> None:
    fields = {key: _values(field.annotation) for key, field in CONFIGS[name].model_fields.items() if key != "pipeline"}
    chosen = st.fixed_dictionaries({}, optional={key: each for key, each in fields.items() if each is not None})
    try:
        build(CONFIGS[name], data.draw(chosen))
    except ConfigError as error:
        lines = str(error).split("\n")
        assert len(lines) == len(set(lines))
