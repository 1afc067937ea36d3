"""Runs whose prompts are a stream: every pipeline reads one, and a killed run goes on with the very next row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset

from runs import assert_balanced, async_grpo, comparable, distill, events, grpo, ledger, lines, sdpo, values
from tiny_models import build_tiny_model
from trl_ray.config.load import build
from trl_ray.config.runs.grpo_config import RLOOConfig
from trl_ray.errors import ConfigError, DataError
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.pipelines.distill import DistillPipeline
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.rloo import RLOOPipeline
from trl_ray.pipelines.run.recording import Recorder
from trl_ray.pipelines.sdpo import SDPOPipeline

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def endless(bad: tuple[int, ...] = ()) -> IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            yield {"prompt": " " if number in bad else f"count to {number}: "}

    return IterableDataset.from_generator(rows)


def trained(run: Path) -> list[int]:
    """The numbers of the rows of all steps, one for each group."""
    tables = [pq.read_table(path).to_pylist() for path in sorted((run / "completions").glob("step-*"))]
    groups = {row["group_id"]: int(row["prompt"].split()[-1][:-1]) for table in tables for row in table}
    assert sum(map(len, tables)) == 4 * len(groups)
    return list(groups.values())


@pytest.fixture
def dies_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ends a run outright behind the line of a step."""
    original = Recorder.step

    def set_up(last: int) -> None:
        def step(self: Recorder, number: int, **kwargs: Any) -> None:
            original(self, number, **kwargs)
            if number == last:
                monkeypatch.setattr(Recorder, "step", original)
                raise KeyboardInterrupt

        monkeypatch.setattr(Recorder, "step", step)

    return set_up


def test_a_stream_that_is_killed_between_checkpoints_goes_on_as_if_it_had_not_been(
    model: str, tmp_path: Path, dies_after: Any
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = {"max_steps": 6, "save_steps": 2, "stream_window": 5}
    GRPOPipeline(args=grpo(model, straight, **options), train_dataset=endless()).train()
    dies_after(3)
    with pytest.raises(KeyboardInterrupt):
        GRPOPipeline(args=grpo(model, broken, **options), train_dataset=endless()).train()
    GRPOPipeline.from_run(broken, train_dataset=endless()).train()
    assert comparable(straight) == comparable(broken)
    assert trained(straight) == trained(broken) and len(set(trained(broken))) == 24
    assert sorted(trained(broken))[:20] == list(range(20)) and trained(broken)[:5] != list(range(5))
    assert_balanced(broken, trained=24)
    other = endless().map(lambda row: {"prompt": f"{row['prompt']}!"})
    with pytest.raises(DataError, match=r"go on with the rows that it began with.*the first 5 prompts of the stream"):
        GRPOPipeline.from_run(broken, changes=["max_steps=7"], train_dataset=other).train()


def test_ahead_of_training_no_prompt_is_lost_and_none_trained_twice(
    model: str, tmp_path: Path, dies_after: Any
) -> None:
    run, file = tmp_path / "run", tmp_path / "rows.jsonl"
    rows = [{"prompt": f"count to {number}: "} for number in range(22)]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = {"max_steps": 8, "save_steps": 2, "stream_window": 7, "max_staleness": 2, "dataset_streaming": True}
    dies_after(5)
    with pytest.raises(KeyboardInterrupt):
        AsyncGRPOPipeline(args=async_grpo(model, run, dataset_name=str(file), **options)).train()
    AsyncGRPOPipeline.from_run(run).train()
    assert_balanced(run, trained=32)
    assert ledger(run)["dropped"].keys() <= {"end_of_run"} and ledger(run)["issued"] == 32
    # 22 rows once; then from the start, a window of 7 and 3 of the next one.
    numbers = trained(run)
    assert sorted(numbers[:22]) == list(range(22)) and sorted(numbers[22:29]) == list(range(7))
    assert set(numbers[29:]) < set(range(7, 14)) and len(numbers) == 32


def test_what_was_read_before_a_bad_row_is_trained_and_kept(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"max_steps": 4, "stream_window": 4}
    told = r"Row 9 of .* must not be empty.*2 steps were trained before it and are kept.*trl-ray resume"
    with pytest.raises(DataError, match=told):
        GRPOPipeline(args=grpo(model, run, **options), train_dataset=endless(bad=(9,))).train()
    assert len(lines(run / "metrics.jsonl")) == 2 and events(run, "run_failed")
    GRPOPipeline.from_run(run, changes=["on_bad_row=drop"], train_dataset=endless(bad=(9,))).train()
    assert sorted(trained(run))[:14] == [*range(9), *range(10, 15)]
    assert ledger(run)["dropped"] == {"bad_row": 1} and ledger(run)["issued"] == 17
    assert any("1 row (9)" in event["detail"]["detail"] for event in events(run, "warning"))


@pytest.mark.long
def test_every_pipeline_reads_streams_and_evaluates_on_the_first_rows_of_one(model: str, tmp_path: Path) -> None:
    streams = {"train_dataset": endless(), "eval_dataset": endless()}
    options = {"max_steps": 1, "stream_window": 8, "eval_steps": 1, "eval_num_prompts": 3}
    for name, pipeline, config in (
        ("rloo", RLOOPipeline, build(RLOOConfig, values(model, tmp_path / "rloo", **options))),
        ("sdpo", SDPOPipeline, sdpo(model, tmp_path / "sdpo", max_prompt_length=8, **options)),
        ("distill", DistillPipeline, distill(model, model, tmp_path / "distill", **options)),
    ):
        output = pipeline(args=config, **streams).train()
        assert output.steps == 1 and output.ledger.trained == config.groups_per_step
        assert [event["detail"]["prompts"] for event in events(tmp_path / name, "evaluated")][-1] == 3
    # A token a byte: of "count to 3: " four are cut off.
    (line,) = lines(tmp_path / "sdpo" / "metrics.jsonl")
    assert (line["prompt/truncated_fraction"], line["prompt/truncated_tokens"]) == (1.0, 4.0)


def test_a_stream_needs_its_steps_counted_before_anything_starts(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Set dataset_streaming=true and max_steps"):
        GRPOPipeline(args=grpo(model, tmp_path / "run", max_steps=-1), train_dataset=endless()).train()
    with pytest.raises(ConfigError, match="max_steps must be at least 1 with dataset_streaming=true"):
        grpo(model, tmp_path / "run", max_steps=-1, dataset_streaming=True)
    assert not (tmp_path / "run").exists()
