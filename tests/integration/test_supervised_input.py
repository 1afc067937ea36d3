"""Whatever is wrong with a dataset to train on, or with the options of its pipeline, ends before anything starts.

config.yaml, rows --trl_ray.cli.main.main--> exit code 2, one message with row and field; the folder as it was
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import dataset_runs
from refusals import assert_one_message, refuse
from runs import assert_balanced, command, events, wait_for_steps
from tiny_models import MAX_POSITIONS, build_tiny_model

pytestmark = pytest.mark.integration
Table = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One mistake: what differs from a good configuration, and what the message must say."""

    name: str
    pipeline: str = "sft"
    says: Sequence[str]
    rows: Table | bytes | None = None
    """The dataset; bytes are the file as it is."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the YAML file; `{tmp}` stands for its folder."""
    arguments: Sequence[str] = ()
    file: str = "data.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def with_row(pipeline: str, **changes: Any) -> list[dict[str, Any]]:
    """Good rows, but one in the middle has these values; ... leaves a column out."""
    table = dataset_runs.rows(pipeline, 8)
    changed = {**table[5], **changes}
    table[5] = {key: value for key, value in changed.items() if value is not ...}
    return table


def renamed(pipeline: str, **names: str) -> list[dict[str, Any]]:
    """Good rows with columns of other names."""
    return [{names.get(key, key): value for key, value in row.items()} for row in dataset_runs.rows(pipeline, 4)]


def turns(*roles: str) -> list[dict[str, str]]:
    """A conversation in which every role says something."""
    return [{"role": role, "content": f"{role} speaks"} for role in roles]


def chats(*bad: str) -> list[dict[str, Any]]:
    """Good conversations, then one whose roles are these."""
    return [*({"messages": turns("user", "assistant")} for _ in range(5)), {"messages": turns(*bad)}]


def parquet(*, cut: int) -> bytes:
    """A parquet file without its last bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(dataset_runs.rows("sft", 8)), sink)
    return sink.getvalue().to_pybytes()[:-cut]


CALCULATOR = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "One."}}},
    },
}
GOOD_LINE = json.dumps(dataset_runs.rows("sft", 1)[0]).encode() + b"\n"
LONG = "x" * 200
ROW = ["Row 5 ", "data.jsonl"]
CASES = [
    # Columns
    Case(name="a column misnamed", rows=renamed("sft", completion="completoin"), says=["'completoin'", "'completion'"]),
    Case(name="a column missing", pipeline="dpo", rows=renamed("dpo", rejected="worse"), says=["'rejected'", "worse"]),
    Case(name="no column known", rows=[{"a": "b"}], says=["prompt, completion", "Its columns are a"]),
    Case(name="no label", pipeline="kto", rows=renamed("kto", label="rating"), says=["'label'"]),
    Case(name="no steps", pipeline="prm", rows=renamed("prm", completions="completion"), says=["completions"]),
    Case(name="a row without the column", rows=with_row("sft", completion=...), says=[*ROW, "completion"]),
    # Datasets of another pipeline
    Case(
        name="preferences to learn as texts",
        rows=dataset_runs.rows("dpo", 4),
        says=["language_modeling", "prompt_completion", "its columns make it preference"],
    ),
    Case(
        name="prompts to prefer",
        pipeline="dpo",
        rows=[{"prompt": "count: "}],
        says=["preference", "prompt_only", "chosen"],
    ),
    Case(name="answers to prefer", pipeline="dpo", rows=dataset_runs.rows("sft", 4), says=["preference", "completion"]),
    Case(name="texts to rate", pipeline="reward", rows=[{"text": "a b c"}], says=["preference", "language_modeling"]),
    Case(name="pairs to rate in steps", pipeline="prm", rows=dataset_runs.rows("dpo", 4), says=["stepwise", "labels"]),
    Case(name="steps to prefer", pipeline="kto", rows=dataset_runs.rows("prm", 4), says=["unpaired", "stepwise"]),
    # Values
    Case(name="None", rows=with_row("sft", completion=None), says=[*ROW, "'completion'", "None"]),
    Case(
        name="several bad rows",
        rows=[*dataset_runs.rows("sft", 5), *({"prompt": text, "completion": None} for text in ("a", "b"))],
        says=["2 of 7 rows cannot be used", "2 rows (5, 6)", *ROW, "'completion'", "on_bad_row=drop"],
    ),
    Case(name="a number for a text", rows=with_row("sft", completion=7), says=[*ROW, "'completion'", "7"]),
    Case(name="no choice", pipeline="dpo", rows=with_row("dpo", chosen=None), says=[*ROW, "'chosen'", "None"]),
    Case(
        name="nothing to prefer",
        pipeline="dpo",
        rows=[{"prompt": "a", "chosen": "one", "rejected": "one"}] * 2,
        says=["At least one row", "prefer nothing", "(rows 0, 1)"],
    ),
    Case(
        name="nothing to rank",
        pipeline="reward",
        rows=[{"prompt": "a", "chosen": "one", "rejected": "one"}] * 2,
        says=["At least one row", "prefer nothing", "(rows 0, 1)"],
    ),
    Case(name="a label that is none", pipeline="kto", rows=with_row("kto", label="good"), says=[*ROW, "'label'"]),
    Case(
        name="a margin that is none", pipeline="reward", rows=with_row("reward", margin="wide"), says=["ow 5", "margin"]
    ),
    Case(
        name="labels of another number",
        pipeline="prm",
        rows=with_row("prm", labels=[True, False]),
        says=[*ROW, "'labels'", "2 labels for 3"],
    ),
    Case(name="no step", pipeline="prm", rows=with_row("prm", completions=[], labels=[]), says=[*ROW, "'completions'"]),
    Case(
        name="a step without words",
        pipeline="prm",
        rows=with_row("prm", completions=["one", " ", "three"]),
        says=[*ROW, "'completions'", "step 1"],
    ),
    Case(name="half a character", rows=with_row("sft", completion="\ud800"), says=[*ROW, "'completion'", "Unicode"]),
    # Conversations
    Case(
        name="messages that a table cut off",
        rows=[*chats("user", "assistant"), {"messages": '[{"role": "user", "content": "q"}, {"ro'}],
        says=["Row 6 ", "'messages'", "cannot be read", "column 37"],
    ),
    Case(
        name="images",
        rows=[{"messages": turns("user", "assistant"), "images": ["x.png"]}] * 2,
        says=["Row 0 ", "'images'", "column_mapping={images: null}"],
    ),
    Case(name="an unknown role", rows=chats("usr", "assistant"), says=[*ROW, "'usr'", "'user'"]),
    Case(
        name="texts and conversations",
        rows=[*chats("user", "assistant"), {"messages": "hi"}],
        says=["Row 6 ", "messages"],
    ),
    Case(
        name="an answer by the user",
        pipeline="dpo",
        rows=[{"prompt": turns("user"), "chosen": turns("user"), "rejected": turns("assistant")}],
        says=["Row 0 ", "'chosen'", "assistant"],
    ),
    Case(
        name="tools that the template cannot show",
        rows=[{"messages": turns("user", "assistant"), "tools": [CALCULATOR]}],
        says=["ow 0 ", "tool", "template"],
    ),
    Case(
        name="tools beside texts",
        rows=[{"prompt": "a", "completion": "b", "tools": [CALCULATOR]}],
        says=["Row 0 ", "'tools'"],
    ),
    # Nothing left to train
    Case(
        name="everything cut away",
        rows=[{"prompt": LONG, "completion": "one"}] * 3,
        says=["At least one row", "none within max_length", "rows 0, 1, 2", "raise max_length"],
    ),
    Case(
        name="every pair cut away",
        pipeline="dpo",
        rows=[{"prompt": LONG, "chosen": "one", "rejected": "two"}] * 2,
        says=["At least one row", "rows 0, 1", "raise max_length"],
    ),
    Case(
        name="every pair too long",
        pipeline="reward",
        rows=[{"prompt": LONG, "chosen": "one", "rejected": "two"}] * 2,
        says=["At least one row", "rows 0, 1", "raise max_length"],
    ),
    Case(
        name="nothing of the assistant",
        rows=[{"messages": turns("user")}] * 3,
        changes={"assistant_only_loss": True},
        says=["At least one row", "no token to train", "rows 0, 1, 2"],
    ),
    Case(
        name="assistant's turns of a text",
        rows=dataset_runs.rows("sft", 4),
        changes={"assistant_only_loss": True},
        says=["assistant_only_loss", "ow 0 "],
    ),
    Case(name="a single answer for the KL", pipeline="kto", rows=dataset_runs.rows("kto", 1), says=["KL", "add rows"]),
    # Files
    Case(name="bytes that are no text", rows=GOOD_LINE + b'{"prompt": "\xff"}\n', says=["UTF-8", "line 2", "0xff"]),
    Case(name="a line that is no JSON", rows=GOOD_LINE + b"{]\n", says=["line 2", "JSON"]),
    Case(
        name="a parquet file without its end", file="data.parquet", rows=parquet(cut=20), says=["data.parquet", "whole"]
    ),
    Case(name="a parquet file that is none", file="data.parquet", rows=b"PAR1", says=["data.parquet", "whole"]),
    Case(name="no row", rows=[], says=["at least one row"]),
    # Options
    Case(name="an unknown key", changes={"packin": True}, says=["packin", "'packing'"]),
    Case(name="another pipeline's key", pipeline="kto", changes={"packing": True}, says=["packing"]),
    Case(name="a file of another pipeline", changes={"pipeline": "dpo"}, says=["trl-ray dpo"]),
    Case(
        name="longer than the model",
        changes={"max_length": MAX_POSITIONS + 1},
        says=["max_length", f"{MAX_POSITIONS} positions", str(MAX_POSITIONS + 1)],
    ),
    Case(name="nothing held out", changes={"eval_steps": 2}, says=["eval", "dataset_test_split"]),
    Case(name="a split that a file has not", changes={"eval_steps": 2, "dataset_test_split": "test"}, says=["'test'"]),
    Case(
        name="patience without evaluation",
        changes={"early_stopping_patience": 2},
        says=["eval_steps", "early_stopping_patience=2"],
    ),
    Case(name="packing without length", changes={"packing": True, "max_length": None}, says=["max_length", "packing"]),
    Case(name="a strategy for nothing", changes={"packing_strategy": "wrapped"}, says=["packing", "wrapped"]),
    Case(name="smoothed twice", arguments=["loss_type=dft", "label_smoothing_factor=0.1"], says=["dft", "0.1"]),
    Case(
        name="a stream without end", arguments=["dataset_streaming=true", "max_steps=-1"], says=["max_steps", "stream"]
    ),
    Case(name="no steps", arguments=["max_steps=0"], says=["max_steps"]),
    Case(
        name="an unknown loss", pipeline="dpo", changes={"loss_type": "sigmod"}, says=["loss_type", "sigmod", "sigmoid"]
    ),
    Case(name="one loss twice", pipeline="dpo", changes={"loss_type": ["ipo", "ipo"]}, says=["loss_type", "once"]),
    Case(
        name="a weight too many",
        pipeline="dpo",
        changes={"loss_type": ["ipo", "sft"], "loss_weights": [1.0]},
        says=["loss_weights", "1 for 2"],
    ),
    Case(
        name="a reference that moves, but is written down",
        pipeline="dpo",
        arguments=["sync_ref_model=true", "precompute_ref_log_probs=true"],
        says=["sync_ref_model", "precompute_ref_log_probs"],
    ),
    Case(
        name="a reference that moves under an adapter",
        pipeline="dpo",
        arguments=["sync_ref_model=true", "use_peft=true"],
        says=["sync_ref_model", "use_peft"],
    ),
    Case(
        name="a stream that is asked before training",
        pipeline="dpo",
        arguments=["dataset_streaming=true", "precompute_ref_log_probs=true"],
        says=["precompute_ref_log_probs", "dataset_streaming"],
    ),
    Case(
        name="smoothing for nothing",
        pipeline="dpo",
        arguments=["label_smoothing=0.1"],
        says=["label_smoothing", "robust"],
    ),
    Case(
        name="a divergence that does not cancel",
        pipeline="dpo",
        changes={"loss_type": "nca_pair", "f_divergence_type": "js_divergence"},
        says=["f_divergence_type", "nca_pair"],
    ),
    Case(
        name="an update too small for a KL",
        pipeline="kto",
        changes={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        says=["at least 2", "per_device_train_batch_size"],
    ),
    Case(
        name="a rating of nothing",
        pipeline="kto",
        arguments=["desirable_weight=0", "undesirable_weight=0"],
        says=["weight"],
    ),
    Case(name="smoothed hinges", pipeline="cpo", arguments=["loss_type=hinge", "label_smoothing=0.1"], says=["hinge"]),
    Case(name="a separator that is none", pipeline="prm", changes={"step_separator": ""}, says=["step_separator"]),
    Case(
        name="a cache that cannot be",
        pipeline="dpo",
        changes={"precompute_ref_log_probs": True, "ref_log_probs_cache_dir": "{tmp}/data.jsonl"},
        says=["ref_log_probs_cache_dir", "data.jsonl"],
    ),
    # Mixtures and streams
    Case(
        name="a mixture of what does not mix",
        changes={"dataset_name": None, "datasets": [{"path": "{tmp}/data.jsonl"}, {"path": "{tmp}/pairs.jsonl"}]},
        says=["pairs.jsonl", "preference"],
    ),
    Case(
        name="a stream of pairs to learn",
        rows=dataset_runs.rows("dpo", 4),
        arguments=["dataset_streaming=true"],
        says=["its columns make it preference"],
    ),
    Case(
        name="a stream with a bad row at its start",
        rows=with_row("sft", completion=None),
        arguments=["dataset_streaming=true"],
        says=[*ROW, "'completion'"],
    ),
    Case(name="a stream of nothing", rows=[], arguments=["dataset_streaming=true"], says=["at least one row"]),
    Case(
        name="a stream cut away",
        rows=[{"prompt": LONG, "completion": "one"}] * 3,
        arguments=["dataset_streaming=true"],
        says=["at least one example", "max_length"],
    ),
]


def write_config(folder: Path, model: str, case: Case) -> Path:
    """A configuration that would run, made wrong as the case says."""
    data, table = folder / case.file, dataset_runs.rows(case.pipeline, 8) if case.rows is None else case.rows
    if isinstance(table, bytes):
        data.write_bytes(table)
    else:
        dataset_runs.write_rows(data, table)
    dataset_runs.write_rows(folder / "pairs.jsonl", dataset_runs.rows("dpo", 4))
    values = dataset_runs.values(model, folder / "run", max_steps=1, dataset_name=str(data))
    text = yaml.safe_dump({**values, **case.changes}).replace("{tmp}", str(folder))
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_wrong_data_and_options_are_refused_before_anything_starts(
    case: Case, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, model, case)
    refuse([case.pipeline, "--config", str(config), *case.arguments], case.says, folder=tmp_path, capsys=capsys)


def test_a_bad_row_in_the_middle_of_a_stream_ends_the_command_with_its_number_and_a_checkpoint(
    model: str, tmp_path: Path
) -> None:
    table = dataset_runs.rows("sft", 40)
    table[33]["completion"] = None
    changes = {"dataset_streaming": True, "stream_window": 10, "max_steps": 30, "gradient_accumulation_steps": 1}
    config = write_config(tmp_path, model, Case(name="stream", rows=table, changes=changes, says=[]))
    process = command("sft", "--config", str(config))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    message = output[output.index("trl-ray: ") :]
    run = tmp_path / "run"
    assert_one_message(message, ["Row 33 ", "'completion'", "7 steps", f"trl-ray resume {run}"])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-7"]
    assert_balanced(run, trained=28)
    dataset_runs.write_rows(tmp_path / "data.jsonl", dataset_runs.rows("sft", 40))
    process = command("resume", str(run))
    wait_for_steps(run, 30, process)
    assert process.wait(timeout=60) == 0
    assert [event["detail"]["step"] for event in events(run, "run_resumed")] == [7]
    assert_balanced(run, trained=120)
