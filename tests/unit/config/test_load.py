"""YAML and overrides: what is read, what is refused, and that the message helps."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ray.config.load import apply_overrides, build, dump_yaml, load_config, parse_yaml, read_yaml
from trl_ray.config.losses.policy_options import LossType
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig
from trl_ray.config.sections import EngineChoice, RuntimeConfig
from trl_ray.errors import ConfigError, InputError


def refusal(**values: Any) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        build(AsyncGRPOConfig, values)
    return str(caught.value)


def yaml_refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, source="job.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "guess"),
    [("learning_rat", "learning_rate"), ("num_generation", "num_generations"), ("max_stalenes", "max_staleness")],
)
def test_an_unknown_key_names_the_nearest(key: str, guess: str) -> None:
    assert refusal(**{key: 1}) == f"{key!r} is not an option here. Did you mean {guess!r}?"


def test_an_unknown_key_of_a_section_is_given_with_its_dotted_name_and_the_nearest_of_that_section() -> None:
    assert refusal(runtime={"kin": "ray"}) == "'runtime.kin' is not an option here. Did you mean 'kind'?"


def test_an_unknown_key_like_no_other_lists_what_there_is() -> None:
    message = refusal(reward={"qqq": 1})
    assert "Known keys: " in message
    assert "timeout_s" in message


def test_all_unknown_keys_are_told_at_once() -> None:
    assert len(refusal(learning_rat=1, num_generation=1).splitlines()) == 2


def test_all_wrong_values_are_told_at_once() -> None:
    lines = refusal(seed=-1, temperature=0.0, rollout={"num_workers": 0}).splitlines()
    assert sorted(line.split(" ")[0] for line in lines) == ["rollout.num_workers", "seed", "temperature"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": "8"}, "max_steps must be a valid integer, got '8'."),
        ({"max_steps": 8.0}, "max_steps must be a valid integer, got 8.0."),
        ({"max_staleness": True}, "max_staleness must be a valid integer, got True."),
        ({"bf16": "true"}, "bf16 must be a valid boolean, got 'true'."),
        ({"bf16": 1}, "bf16 must be a valid boolean, got 1."),
        ({"learning_rate": "1e-5"}, "learning_rate must be a valid number, got '1e-5'."),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan."),
        ({"beta": float("inf")}, "beta must be a finite number, got inf."),
        ({"reward_funcs": "arithmetic"}, "reward_funcs must be a valid list, got 'arithmetic'."),
        (
            {"loss_type": "ppo"},
            "loss_type must be 'grpo', 'dapo', 'dr_grpo', 'bnpo', 'cispo', 'sapo', 'luspo' or 'vespo', got 'ppo'.",
        ),
        (
            {"report_to": ["comet_ml"]},
            "report_to.0 must be one of wandb, tensorboard, mlflow, trackio, all, got 'comet_ml'.",
        ),
        ({"runtime": {"num_cpus": "4"}}, "runtime.num_cpus must be a valid integer, got '4'."),
        ({"rollout": {"dtype": "float16"}}, "rollout.dtype must be 'float32', 'bfloat16' or 'auto', got 'float16'."),
        (
            {"runtime": {"placement_strategy": "pack"}},
            "runtime.placement_strategy must be one of PACK, SPREAD, STRICT_PACK, STRICT_SPREAD, got 'pack'.",
        ),
    ],
)
def test_types_are_strict_and_the_message_names_option_rule_and_value(values: dict[str, Any], message: str) -> None:
    assert refusal(**values) == message


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"num_generations": 1}, "greater than or equal to 2"),
        ({"learning_rate": 0.0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"epsilon": -0.1}, "greater than or equal to 0"),
        ({"max_staleness": -1}, "greater than or equal to 0"),
        ({"max_steps": -2}, "greater than or equal to -1"),
        ({"reward": {"timeout_s": 0.0}}, "greater than 0"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], rule: str) -> None:
    assert f"must be {rule}, got" in refusal(**values)


def test_an_integer_stands_for_a_number_and_a_string_for_an_enum() -> None:
    config = build(AsyncGRPOConfig, {"beta": 1, "loss_type": "dr_grpo", "rollout": {"engine": "vllm"}})
    assert (config.beta, config.loss_type, config.rollout.engine) == (1.0, LossType.DR_GRPO, EngineChoice.VLLM)


def test_a_section_built_directly_raises_the_same_error() -> None:
    with pytest.raises(ConfigError, match=r"^'kin' is not an option here\. Did you mean 'kind'\?$"):
        RuntimeConfig(kin="ray")


def test_config_errors_are_input_errors_and_value_errors() -> None:
    assert issubclass(ConfigError, InputError)
    assert issubclass(ConfigError, ValueError)


def test_a_configuration_cannot_be_changed_in_place_but_copied_with_changes() -> None:
    config = AsyncGRPOConfig()
    with pytest.raises(Exception, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    assert config.replace(seed=1).seed == 1
    with pytest.raises(ConfigError, match="seed must be"):
        config.replace(seed=-1)


def test_a_configuration_survives_pickling() -> None:
    config = build(AsyncGRPOConfig, {"seed": 3, "rollout": {"num_workers": 2}})
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("text", "number"), [("1e-5", 1e-5), ("-2e3", -2000.0), (".5", 0.5), ("1.5e-6", 1.5e-6), ("3", 3), ("+1E2", 100.0)]
)
def test_numbers_are_read_as_they_look(text: str, number: float) -> None:
    value = parse_yaml(f"a: {text}", source="job.yaml")["a"]
    assert value == number
    assert type(value) is type(number)


@pytest.mark.parametrize("text", ["'1e-5'", "v1e5", "1e", "e5", "1-5"])
def test_what_only_resembles_a_number_stays_text(text: str) -> None:
    assert parse_yaml(f"a: {text}", source="job.yaml")["a"] == text.strip("'")


def test_a_key_that_stands_twice_is_refused_with_its_line() -> None:
    assert yaml_refusal("seed: 1\nseed: 2\n") == "job.yaml, line 2: key 'seed' stands twice; remove one."
    assert "line 4" in yaml_refusal("seed: 1\nrollout:\n  engine: vllm\n  engine: auto\n")


def test_yaml_merge_keys_are_no_duplicates() -> None:
    text = "base: &base {a: 1}\nchild: {<<: *base, b: 2}\n"
    assert parse_yaml(text, source="job.yaml")["child"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "text",
    ["a: [", "\ta: 1", "{" * 5000, "a: !!python/object/apply:os.system [ls]", "? [1, 2]\n: 3", "a: b: c"],
    ids=["open", "tab", "deep", "python", "list key", "two colons"],
)
def test_text_that_is_not_plain_yaml_is_refused(text: str) -> None:
    assert yaml_refusal(text).startswith("job.yaml must be YAML: ")


def test_files_that_cannot_be_a_configuration_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    for name, rule in [
        ("absent.yaml", "is not there"),
        (".", "is a folder"),
        ("latin.yaml", "must be UTF-8"),
        ("list.yaml", "holds a list"),
        ("large.yaml", "must be at most"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            read_yaml(tmp_path / name)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(AsyncGRPOConfig, tmp_path / "empty.yaml") == AsyncGRPOConfig()


def test_overrides_reach_into_sections_and_the_last_one_wins(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("seed: 1\nrollout: {engine: vllm, num_workers: 2}\n")
    config = load_config(
        AsyncGRPOConfig,
        tmp_path / "job.yaml",
        ["seed=2", "rollout.num_workers=3", "--learning_rate=2e-5", "seed=4", "stop=[a, b]", "reward.timeout_s=5"],
    )
    assert (config.seed, config.learning_rate, config.stop) == (4, 2e-5, ["a", "b"])
    assert (config.rollout.engine, config.rollout.num_workers) == (EngineChoice.VLLM, 3)
    assert config.reward.timeout_s == 5.0


def test_an_override_can_give_an_option_back_its_none() -> None:
    assert apply_overrides({"epsilon_high": 0.3}, ["epsilon_high=null"]) == {"epsilon_high": None}


def test_an_override_may_hold_equals_signs() -> None:
    assert apply_overrides({}, ["system_prompt=a=b"]) == {"system_prompt": "a=b"}


def test_overrides_leave_the_values_they_are_applied_to_alone() -> None:
    values = {"rollout": {"num_workers": 1}}
    apply_overrides(values, ["rollout.num_workers=2"])
    assert values == {"rollout": {"num_workers": 1}}


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", ".a=1", "a.=1", "--=1"])
def test_an_override_without_key_or_equals_sign_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="must read key=value"):
        apply_overrides({}, [override])


def test_an_override_cannot_descend_into_a_value() -> None:
    with pytest.raises(ConfigError, match="seed holds 1, not a section"):
        apply_overrides({"seed": 1}, ["seed.x=2"])


# Line breaks of every standard, what YAML marks things with, what looks like another type, characters beyond 16 bits.
_PIECES = [
    *"\x85\u2028\u2029\ufeff\r\n\t \x00\x0b\x0c\x1c\x7f\xa0\ufffe\U0001f600\U0010ffffaé'\"\\:#-?|>&%@{],",
    *[
        "1e5",
        "+1E2",
        ".5",
        "1_0",
        "0x1f",
        "0o7",
        "12:30",
        "2001-01-01",
        "null",
        "~",
        "no",
        "=",
        "<<",
        "!!str",
        "---",
        "...",
    ],
]


@pytest.mark.parametrize("end", ["", "x"], ids=ascii)
@pytest.mark.parametrize("start", _PIECES, ids=ascii)
def test_every_text_is_read_as_it_was_written(start: str, end: str) -> None:
    texts = [f"{start}{middle}{end}" for middle in ("", *_PIECES)]
    config = build(AsyncGRPOConfig, {"stop": texts, "dataset_kwargs": {text: text for text in texts}})
    assert build(AsyncGRPOConfig, parse_yaml(dump_yaml(config), source="resolved")) == config


def test_half_a_character_is_refused_and_two_halves_are_one() -> None:
    assert parse_yaml('a: "\\ud83d\\ude00"', source="job.yaml") == {"a": "\U0001f600"}
    message = yaml_refusal('a: 1\nb: "x\\ud83d"')
    assert message.startswith("job.yaml, line 2: a text must hold whole characters, got 'x\\ud83d'")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_config(AsyncGRPOConfig, tmp_path / "marked.yaml").seed == 3


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**31),
            "learning_rate": st.floats(1e-12, 1.0),
            "system_prompt": st.none() | st.text(st.characters(exclude_categories=["Cs"])),
            "stop": st.lists(st.text("ab\n: #'\"-", max_size=5)),
            # cispo has no default for its cap.
            "loss_type": st.sampled_from([*LossType]).map(str).filter(lambda kind: kind != "cispo"),
            "old_logprobs": st.sampled_from(["policy", "sampler"]),
            "max_staleness": st.integers(0, 9),
            "rollout": st.fixed_dictionaries({}, optional={"max_model_len": st.none() | st.integers(1, 9)}),
            "dataset_kwargs": st.dictionaries(st.text("abc", min_size=1), st.booleans() | st.floats(-1e30, 1e30)),
        },
    )
)
def test_the_resolved_configuration_loads_again_to_the_same(values: dict[str, Any]) -> None:
    config = build(AsyncGRPOConfig, values)
    assert build(AsyncGRPOConfig, parse_yaml(dump_yaml(config), source="resolved")) == config
