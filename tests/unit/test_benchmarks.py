"""The GRPO benchmark: rewards that leave every group something to learn, and no ratio where one side skips work."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("async_grpo_vs_trl", ROOT / "benchmarks" / "async_grpo_vs_trl.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    # Its dataclasses look their annotations up there.
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


script: Any = load_script()

# Seconds for ten steps of 100 tokens. With nothing to learn trl_ray's step takes half as long, TRL's as long as ever.
SECONDS = {"trl": 60.0, "async-grpo": 20.0, "grpo": 50.0}

SETTINGS = script.Settings(
    system="trl",
    model="/models/tiny",
    dtype="float32",
    steps=2,
    warmup=1,
    micro_batch=32,
    max_tokens=16,
    learning_rate=1e-8,
    gradient_checkpointing=False,
    reward="varied",
    reward_sleep_s=0.0,
    reward_workers=1,
    max_staleness=2,
    learner_threads=1,
    rollout_threads=1,
    engine="vllm",
)


class Machine:
    """Stands for the child processes: what was asked of them, and measurements made up from it."""

    def __init__(self, *, zero_std: dict[str, float]) -> None:
        self.zero_std, self.head_start = zero_std, 0.0
        self.asked: list[tuple[str, str, float]] = []

    def run_child(self, settings: Any) -> Any:
        self.asked.append((settings.system, settings.reward, settings.reward_sleep_s))
        fraction = self.zero_std[settings.reward]
        skips = settings.system != "trl" and fraction > 0.5
        shares = {"other_share": 0.01, "wait_share": 0.3, "publish_share": 0.02, "head_start": self.head_start}
        return script.Measurement(
            steps=10,
            seconds=SECONDS[settings.system] / (2 if skips else 1),
            tokens=1000,
            completions=640,
            reward=0.5,
            zero_std_fraction=fraction,
            start_s=1.0,
            **({} if settings.system == "trl" else shares),
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(zero_std={"varied": 0.0, "arithmetic": 1.0})
    monkeypatch.setattr(script, "run_child", machine.run_child)
    monkeypatch.setattr(script, "resolve_model", lambda name, folder: f"/models/{name}")
    monkeypatch.setattr(script.os, "getloadavg", lambda: (0.25, 0.0, 0.0))
    return machine


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def figures(lines: list[str]) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def test_the_varied_reward_is_a_hash_of_the_text_and_of_nothing_else() -> None:
    score = script.make_reward("varied", 0.0)
    expected = int(hashlib.sha256(b"3 + 4 is 7").hexdigest()[:6], 16) / 2**24
    assert score(completions=[said("3 + 4 is 7")], answer=["7"], prompts=["a"]) == [expected]
    assert score(completions=["3 + 4 is 7"], answer=[None], step=3) == [expected]


def test_unlike_texts_of_a_group_have_unlike_rewards_and_equal_ones_have_equal_rewards() -> None:
    score = script.make_reward("varied", 0.0)
    for group in range(50):
        texts = [f"It is {group + sample}." for sample in range(script.GROUP_SIZE)]
        rewards = score(completions=[said(text) for text in texts], answer=["7"] * len(texts))
        assert len(set(rewards)) == script.GROUP_SIZE
        assert all(0 <= reward < 1 for reward in rewards)
    assert len(set(score(completions=[said("7")] * 8, answer=["7"] * 8))) == 1


def test_the_arithmetic_reward_has_nothing_to_tell_of_an_untrained_models_words() -> None:
    score = script.make_reward("arithmetic", 0.0)
    assert score(completions=[said("The answer"), said("7"), said("is it")], answer=["7"] * 3) == [0.0, 1.0, 0.0]


def test_a_slow_reward_pauses_once_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(script.time, "sleep", pauses.append)
    script.make_reward("varied", 0.0)(completions=["a", "b"], answer=["7", "7"])
    assert pauses == []
    script.make_reward("varied", 1.5)(completions=["a", "b"], answer=["7", "7"])
    assert pauses == [1.5]


def test_all_modes_run_with_varied_rewards_but_for_the_skip_and_the_ratio_comes_last(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--mode", "all", "--reward-sleep", "2"])
    lines = printed(capsys)
    found = figures(lines)
    assert machine.asked == [
        ("async-grpo", "varied", 0.0),  # orchestration
        ("async-grpo", "varied", 0.0),  # skip
        ("async-grpo", "arithmetic", 0.0),
        ("async-grpo", "varied", 2.0),  # async-vs-sync
        ("grpo", "varied", 2.0),
        ("trl", "varied", 0.0),  # trl
        ("async-grpo", "varied", 0.0),
    ]
    assert lines[-1] == "ratio: 3.000"  # 60 s by 20 s
    assert (found["async_vs_sync_ratio"], found["orchestration_share"]) == ("2.500", "0.030")
    assert found["skip_gain"] == "2.000"  # 20 s by 10 s
    assert found["skip_no_signal_zero_std_fraction"] == "1.000"
    varied = ("orchestration", "skip_signal", "async", "sync", "trl", "trl_ray")
    assert [found[f"{name}_zero_std_fraction"] for name in varied] == ["0.000"] * 6
    assert not any(line.startswith("WARNING") for line in lines)


def test_the_skip_mode_has_a_gain_and_no_ratio(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--mode", "skip"])
    lines = printed(capsys)
    assert lines[-1] == "skip_gain: 2.000"
    assert "ratio" not in figures(lines)
    assert [reward for _, reward, _ in machine.asked] == ["varied", "arithmetic"]


@pytest.mark.parametrize("mode", ["trl", "async-vs-sync"])
def test_equal_rewards_are_warned_of_twice_and_give_no_ratio(
    mode: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--mode", mode, "--reward", "arithmetic"])
    lines = printed(capsys)
    found = figures(lines)
    ours = {"trl": "trl_ray", "async-vs-sync": "async"}[mode]
    name = {"trl": "ratio", "async-vs-sync": "async_vs_sync_ratio"}[mode]
    assert "ratio" not in found
    assert name not in found
    assert found[f"{name}_not_comparable"] == {"trl": "6.000", "async-vs-sync": "2.500"}[mode]
    assert found[f"{ours}_zero_std_fraction"] == "1.000"
    assert sum(line.startswith(f"WARNING: {ours}: all rewards are equal in 100% of the groups") for line in lines) == 2


@pytest.mark.parametrize(("fraction", "name"), [(0.1, "ratio"), (0.11, "ratio_not_comparable")])
def test_a_tenth_of_groups_may_have_equal_rewards(
    fraction: float, name: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.zero_std["varied"] = fraction
    script.main(["--mode", "trl"])
    assert printed(capsys)[-1] == f"{name}: 3.000"


def test_a_model_that_earns_the_arithmetic_reward_cannot_tell_the_whole_gain_of_the_skip(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.zero_std["arithmetic"] = 0.6
    script.main(["--mode", "skip"])
    assert "WARNING: skip_no_signal: all rewards are equal in only 60% of the groups" in "\n".join(printed(capsys))


def lines_of_metrics(ready: list[int]) -> list[dict[str, float]]:
    return [{"queue/ready": float(groups)} for groups in ready]


def test_a_head_start_is_what_the_measured_steps_take_from_the_groups_that_lay_ready() -> None:
    # One step of warm-up, then two measured of 8 groups each; of 12 ready groups 4 are left.
    settings = dataclasses.replace(SETTINGS, warmup=1, steps=2)
    assert script.head_start(lines_of_metrics([12, 9, 4, 0]), settings) == 8 / 16
    assert script.head_start(lines_of_metrics([4, 0, 12, 0]), settings) == 0.0


@pytest.mark.parametrize(("share", "warnings"), [(0.1, 0), (0.25, 2)])
def test_a_head_start_of_more_than_a_tenth_is_warned_of(
    share: float, warnings: int, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.head_start = share
    script.main(["--mode", "orchestration"])
    lines = printed(capsys)
    assert figures(lines)["orchestration_head_start"] == f"{share:.3f}"
    assert sum("WARNING: orchestration: 25% of the groups were generated before" in line for line in lines) == warnings


def test_what_could_flatter_is_printed_and_a_busy_machine_or_more_threads_are_warned_of(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = iter([3.0, 2.6])
    monkeypatch.setattr(script.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    script.main(["--mode", "trl", "--model", "tiny", "--dtype", "bfloat16", "--learner-threads", "2"])
    text = "\n".join(lines := printed(capsys))
    found = figures(lines)
    assert (found["model"], found["dtype"], found["reward"]) == ("tiny", "bfloat16", "varied")
    assert (found["load_average_start"], found["load_average_end"]) == ("3.00", "2.60")
    assert (found["trl_threads"], found["trl_ray_threads"]) == ("2", "2 learner + 1 rollout")
    assert "WARNING: trl_ray has 3 threads and TRL 2" in text
    assert "WARNING: the machine is busy (load average 3.0" in text
    assert "WARNING: the machine got busy (load average 2.6" in text


def test_the_benchmarks_own_load_at_the_end_is_no_warning(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = iter([0.5, 2.5])
    monkeypatch.setattr(script.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    script.main(["--mode", "trl"])
    assert "WARNING" not in capsys.readouterr().out


def test_a_childs_settings_and_measurement_travel_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    measurement = script.Measurement(
        steps=2, seconds=4.0, tokens=8.0, completions=128, reward=0.5, zero_std_fraction=0.125, start_s=1.0
    )
    monkeypatch.setattr(script, "measure_trl", lambda settings: asked.append(settings) or measurement)
    script.main(["--child", json.dumps(dataclasses.asdict(SETTINGS))])
    assert asked == [SETTINGS]
    assert script.Measurement(**json.loads(printed(capsys)[-1].removeprefix(script.MARK))) == measurement
