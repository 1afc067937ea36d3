import asyncio
import functools
import threading

import pytest

from fakes import completion, prompt
from trl_ray.errors import ConfigError
from trl_ray.rewards.functions import arithmetic
from trl_ray.rewards.reward_registry import RewardSpec, load_function, make_spec, make_specs, required_columns, resolve
from trl_ray.rewards.scoring import GroupInput, score_group, weighted


def test_names_paths_files_and_callables_all_resolve(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def best(completions, **columns):\n    return [2.0] * len(completions)\n")
    bonus = 3.0
    assert resolve("arithmetic") is arithmetic
    assert resolve("trl_ray.rewards.functions:arithmetic") is arithmetic
    assert resolve(f"{file}:best")(completions=["x"]) == [2.0]
    spec = make_spec(lambda completions, **columns: [bonus] * len(completions))
    assert load_function(spec)(completions=["a", "b"]) == [3.0, 3.0]
    assert (make_spec("arithmetic").name, make_spec(f"{file}:best").name) == ("arithmetic", "best")


def test_trls_names_and_its_way_to_write_a_path_are_read_in_python_too():
    assert make_spec("think_format_reward").name == "think_format"
    assert make_spec("trl_ray.rewards.functions.arithmetic").name == "arithmetic"


def test_a_function_for_mathematics_whose_package_is_missing_is_refused_before_the_start(monkeypatch):
    def accuracy_reward(completions, **columns):
        return [1.0] * len(completions)

    accuracy_reward.__module__ = "trl.rewards.accuracy_rewards"
    for given in (accuracy_reward, "accuracy_reward", "trl.rewards.accuracy_reward"):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: None)
            with pytest.raises(ConfigError, match="accuracy_reward needs the package math-verify, which is not"):
                make_spec(given)
        assert make_spec(given).name == "accuracy_reward"


def test_a_factory_takes_literal_arguments_by_name():
    spec = make_spec("soft_overlong(max_completion_len=10, soft_punish_cache=5)")
    assert spec.name == "soft_overlong"
    assert load_function(spec)(completion_ids=[[0] * 10]) == [-1.0]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("aritmetic", "Did you mean 'arithmetic'"),
        ("zzz", "Known names: accuracy_reward, arithmetic, cosine_scaled_reward.*, exact_answer"),
        ("trl_ray.rewards.functions:aritmetic", "Did you mean trl_ray.rewards.functions:arithmetic"),
        ("no_such_package.mod:f", "No module named 'no_such_package'"),
        ("nowhere/mine.py:f", "must name a file that exists, got 'nowhere/mine.py'"),
        ("trl_ray.types:Reward", "must be a function, it is type"),
        ("soft_overlong", r"must read soft_overlong\(max_completion_len"),
        ("soft_overlong(10, 5)", "must be given as name=value"),
        ("soft_overlong(max_completion_len=__import__('os'), soft_punish_cache=1)", "must read"),
        ("arithmetic(x=1)", "Only cosine_scaled_reward, soft_overlong take"),
    ],
)
def test_a_name_that_does_not_resolve_is_explained(reference, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(reference)


def test_a_file_that_does_not_import_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("raise RuntimeError('no GPU')")
    with pytest.raises(ConfigError, match=r"RuntimeError: no GPU. Mend .*bad.py"):
        resolve(f"{tmp_path}/bad.py:f")


def test_what_cannot_travel_is_refused_at_once():
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="must be picklable"):
        make_spec(lambda completions, **columns: lock)
    with pytest.raises(ConfigError, match="must be a function or a name"):
        make_spec(3)
    with pytest.raises(ConfigError, match="neither"):
        load_function(RewardSpec(name="f"))


def test_a_function_that_asks_for_a_column_the_dataset_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"exact_answer asks for the column 'answer'.*Did you mean 'answers'"):
        make_specs(["exact_answer"], columns=["answers"])
    assert required_columns(lambda prompts, completions, solution, hint=None, **rest: []) == {"solution"}


def test_function_names_must_differ_and_one_must_be_given():
    with pytest.raises(ConfigError, match="arithmetic appears twice"):
        make_specs(["arithmetic", "trl_ray.rewards.functions:arithmetic"], columns=["answer"])
    with pytest.raises(ConfigError, match="at least one function"):
        make_specs([], columns=[])


class Judge:
    """A callable object."""

    async def __call__(self, completions, **columns):
        return [2.0] * len(completions)

    def method(self, completions, **columns):
        return [3.0] * len(completions)


def scaled(completions, by=5.0, **columns):
    return [by] * len(completions)


def test_functions_of_every_kind_have_names_of_their_own():
    given = [
        lambda completions, **columns: [0.0] * len(completions),
        lambda completions, **columns: [1.0] * len(completions),
        functools.partial(scaled, by=4.0),
        Judge(),
        Judge().method,
        scaled,
    ]
    specs = make_specs(given, columns=[])
    assert [spec.name for spec in specs] == ["<lambda>", "<lambda>_2", "scaled", "Judge", "method", "scaled_2"]
    group = GroupInput.of(prompt(0), [completion("a"), completion("b")])
    loaded = weighted([spec.name for spec in specs], [load_function(spec) for spec in specs], None)
    [first, _] = asyncio.run(score_group(loaded, group)).rewards
    assert first.parts == {
        "<lambda>": 0.0, "<lambda>_2": 1.0, "scaled": 4.0, "Judge": 2.0, "method": 3.0, "scaled_2": 5.0,
    }  # fmt: skip
    # A name of a configuration that stands there twice is a mistake.
    with pytest.raises(ConfigError, match="think_format appears twice"):
        make_specs(["think_format", "think_format"], columns=[])
