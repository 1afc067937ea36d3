"""Tokens made in memory, by one process, by several, or at an earlier start are the same, and so is what is told."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import (
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedRunConfig,
)
from trl_ray.data.examples import row_tokenisation, token_cache
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, load_examples
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.row_tokenisation import RowTokeniser
from trl_ray.data.sources import row_sequences, stored_rows
from trl_ray.data.sources.formatting import formatted_rows
from trl_ray.errors import DataError, InputError, ResourceError
from trl_ray.types import Example, TrainingSample

TOKENIZER = build_tokenizer()  # a token per byte
SUPERVISED = ExampleTask.SUPERVISED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and rows that are many where there are more than two."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    monkeypatch.setattr(row_tokenisation, "BATCH_ROWS", 3)
    monkeypatch.setattr(token_cache, "SMALL_ROWS", 2)
    return folder / "trl_ray" / "tokens"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call has tokenised, in this process."""
    found: list[int] = []
    batch = RowTokeniser.batch

    def counted(self: RowTokeniser, rows: Any, places: Sequence[int]) -> pa.Table:
        found.append(len(places))
        return batch(self, rows, places)

    monkeypatch.setattr(RowTokeniser, "batch", counted)
    return found


def texts(count: int = 8) -> list[dict[str, Any]]:
    return [{"text": "ab" * (i + 1)} for i in range(count)]


def load(rows: Any, config: SupervisedRunConfig | None = None, task: ExampleTask = SUPERVISED) -> ExampleSet:
    return load_examples(config or SFTConfig(), TOKENIZER, task=task, dataset=rows)


def flat(sample: TrainingSample) -> tuple[Any, ...]:
    label = sample.label
    told = None if label is None else (label.desirable, label.margin, label.length, str(label.steps))
    ids = (sample.prompt_ids, sample.completion_ids, sample.loss_mask)
    return (sample.group_id, told, *((array.tolist(), array.dtype, array.flags.writeable) for array in ids))


def trained(found: ExampleSet) -> list[tuple[Any, ...]]:
    """All that is trained, in its order."""

    def of(example: Example) -> tuple[Any, ...]:
        other = None if example.mismatched is None else flat(example.mismatched)
        return example.row, example.num_rows, other, *map(flat, example.samples)

    return [of(example) for example in found.examples]


def told(found: ExampleSet) -> tuple[Any, ...]:
    """All that a user hears of the rows."""
    return found.report(), found.losses(), dict(found.untrained), found.num_rows, found.num_tokens, found.tokens


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>a" * 3}]
PAIRS = [{"prompt": "q" * i, "chosen": "good" * i, "rejected": "b" if i % 4 else "good" * i} for i in range(1, 10)]
RATED = [{"prompt": "q" * i, "completion": "a" * i, "label": i % 2 == 0} for i in range(1, 10)]
STEPS = [{"prompt": "q", "completions": ["a", "b"] * i, "labels": [True, False] * i} for i in range(1, 10)]
KINDS: dict[str, tuple[ExampleTask, SupervisedRunConfig, list[dict[str, Any]]]] = {
    "texts": (SUPERVISED, SFTConfig(max_length=9), texts()),
    "packed": (SUPERVISED, SFTConfig(packing=True, packing_strategy="wrapped", max_length=8), texts()),
    "talk": (SUPERVISED, SFTConfig(assistant_only_loss=True), [{"messages": TALK}] * 7),
    "bad": (SUPERVISED, SFTConfig(on_bad_row="drop"), [*texts(5), {"text": 1}, {"text": "cd", "history": "x"}]),
    "pairs": (ExampleTask.PAIRS, DPOConfig(max_length=12), PAIRS),
    "likelihood": (ExampleTask.LIKELIHOOD_PAIRS, ORPOConfig(), PAIRS),
    "rated": (ExampleTask.UNPAIRED_WITH_KL, KTOConfig(max_length=12), RATED),
    "rated pairs": (ExampleTask.UNPAIRED_WITH_KL, KTOConfig(max_length=12), PAIRS),
    "scored": (ExampleTask.REWARD_PAIRS, RewardModelConfig(max_length=20), [{**row, "margin": 0.5} for row in PAIRS]),
    "steps": (ExampleTask.STEPS, PRMConfig(max_length=9), STEPS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_processes_memory_or_an_earlier_start(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, config, rows = KINDS[kind]
    one = load(rows, config, task)
    again = load(rows, config, task)
    assert (one.kept_in or "").startswith("kept in ")
    assert (again.kept_in or "").startswith("taken from ")
    monkeypatch.setattr(token_cache, "SMALL_ROWS", 1000)
    in_memory = load(rows, config, task)
    assert in_memory.kept_in is None
    assert trained(in_memory), "there is something to compare"
    for other in (one, again):
        assert (trained(other), told(other)) == (trained(in_memory), told(in_memory))


@pytest.mark.parametrize("kind", ["packed", "bad", "rated pairs"])
def test_two_processes_make_what_one_makes(kind: str, cache: Path, calls: list[int]) -> None:
    task, config, rows = KINDS[kind]
    both = load(rows, config.replace(dataset_num_proc=2), task)
    assert not calls, "other processes tokenised"
    assert len(list(next(cache.iterdir()).glob("*.arrow"))) == 2
    again = load(rows, config, task)  # how many there were makes no difference to what is kept
    assert (again.kept_in or "").startswith("taken from ")
    assert not calls
    (entry,) = cache.iterdir()
    (entry / "manifest.json").unlink()
    one = load(rows, config, task)
    assert calls
    for other in (both, again):
        assert (trained(other), told(other)) == (trained(one), told(one))


def test_a_second_start_tokenises_nothing(calls: list[int]) -> None:
    load(texts(7))
    assert calls == [3, 3, 1]
    load(texts(7))
    assert calls == [3, 3, 1]


def test_few_rows_are_kept_nowhere(cache: Path, calls: list[int]) -> None:
    assert load(texts(2)).kept_in is None
    assert load(texts(2), SFTConfig(dataset_num_proc=64)).kept_in is None  # fewer rows than processes
    assert calls == [2, 2]
    assert not cache.exists()


def keys(cache: Path) -> int:
    return len(list(cache.iterdir()))


def test_rows_options_template_and_tokenizer_each_change_the_key(cache: Path) -> None:
    load(texts(3))
    changed = texts(3)
    changed[1]["text"] += "!"
    load(changed)
    assert keys(cache) == 2
    load([*texts(3), *texts(1)])
    assert keys(cache) == 3
    load(texts(3)[::-1])
    assert keys(cache) == 4
    for number, options in enumerate(
        [{"max_length": 5}, {"max_length": 5, "truncation_mode": "keep_end"}, {"chat_template_kwargs": {"a": 1}},
         {"dataset_text_format": "plain"}, {"completion_only_loss": False}, {"column_mapping": {"text": "prompt"}}],
        start=5,
    ):  # fmt: skip
        rows = [{**row, "completion": "c"} for row in texts(3)] if "column_mapping" in options else texts(3)
        load(rows, SFTConfig(**options))
        assert keys(cache) == number, options
    for number, change in enumerate(["template", "token", "merges"], start=11):
        tokenizer = build_tokenizer()
        if change == "template":
            tokenizer.chat_template += " "
        elif change == "token":
            tokenizer.add_tokens(["ab"])
        else:
            tokenizer.backend_tokenizer.post_processor = None
            tokenizer.eos_token = "<|endoftext|>"
        load_examples(SFTConfig(), tokenizer, task=SUPERVISED, dataset=texts(3))
        assert keys(cache) == number, change
    load(texts(3))
    load_examples(SFTConfig(), build_tokenizer(), task=SUPERVISED, dataset=texts(3))
    assert keys(cache) == 13, "the same again is the same"


def test_what_is_done_with_tokens_later_does_not_change_the_key(cache: Path) -> None:
    load(texts(3), SFTConfig(max_length=5))
    packed = load(texts(3), SFTConfig(max_length=5, packing=True, learning_rate=1e-6, seed=7))
    assert keys(cache) == 1
    assert (packed.kept_in or "").startswith("taken from ")


def test_another_task_has_another_key(cache: Path) -> None:
    load(PAIRS, DPOConfig(), ExampleTask.PAIRS)
    load(PAIRS, DPOConfig(), ExampleTask.LIKELIHOOD_PAIRS)
    load(PAIRS, DPOConfig(), ExampleTask.REWARD_PAIRS)
    assert keys(cache) == 3


def test_other_code_or_libraries_have_other_keys(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(texts(3))
    monkeypatch.setattr(token_cache, "code_key", lambda: "another release")
    load(texts(3))
    assert keys(cache) == 2


def _put(file: Path, content: bytes) -> None:
    """Another file under the same name: who has mapped the one before still reads it."""
    file.unlink()
    file.write_bytes(content)


def _cut_short(entry: Path) -> None:
    (file,) = entry.glob("*.arrow")
    _put(file, file.read_bytes()[:-8])


def _of_other_rows(entry: Path) -> None:
    (file,) = entry.glob("*.arrow")
    load(texts(3))
    other = next(folder for folder in entry.parent.iterdir() if folder != entry)
    content = next(other.glob("*.arrow")).read_bytes()
    _put(file, content)
    (entry / "manifest.json").write_text(json.dumps({"parts": [{"name": file.name, "bytes": len(content)}]}))


def _no_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def _half_a_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text('{"parts": [')


def _no_file(entry: Path) -> None:
    next(entry.glob("*.arrow")).unlink()


@pytest.mark.parametrize("damage", [_cut_short, _of_other_rows, _no_manifest, _half_a_manifest, _no_file])
def test_what_is_not_whole_is_not_used_but_made_anew(damage: Any, cache: Path, calls: list[int]) -> None:
    before = load(texts(4))
    (entry,) = cache.iterdir()
    expected = trained(before)
    damage(entry)
    calls.clear()
    after = load(texts(4))
    assert sum(calls) == 4
    assert trained(after) == expected
    assert trained(before) == expected, "what is mapped already stays as it is"
    calls.clear()
    assert trained(load(texts(4))) == expected
    assert not calls


def test_what_breaks_off_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def breaks(self: RowTokeniser, rows: Any, places: Sequence[int]) -> pa.Table:
        seen.append(len(places))
        if len(seen) > 1:
            raise KeyboardInterrupt
        return token_cache.SCHEMA.empty_table()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RowTokeniser, "batch", breaks)
        load(texts(9))
    assert len(seen) == 2
    assert list(cache.iterdir()) == []
    assert len(load(texts(9))) == 9


def test_bad_rows_stop_every_start_with_the_same_words(calls: list[int]) -> None:
    rows = [*texts(4), {"text": 5}, {"text": ["x"]}, {"text": ""}]
    messages = []
    for processes in (2, None, None):
        with pytest.raises(DataError) as caught:
            load(rows, SFTConfig(dataset_num_proc=processes))
        messages.append(str(caught.value))
    assert messages == messages[:1] * 3
    assert "Row 4" in messages[0]
    assert "rows cannot be used" in messages[0]
    assert not calls, "the others found it kept"
    dropped = load(rows, SFTConfig(on_bad_row="drop"))  # what becomes of bad rows is no question of tokens
    assert not calls
    assert [row for row, why in dropped.untrained.items() if why is Untrained.BAD_ROW] == [4, 5]


def test_an_error_of_another_process_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read to its end is no bad row; nothing is kept of it."""
    monkeypatch.setattr(stored_rows, "LARGE_BYTES", 0)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in texts(9)))
    config = SFTConfig(dataset_name=str(path), on_bad_row="drop")
    load(None, config)
    changed = path.read_text().splitlines()
    # The note of the file's shape is found by its content: give it another one, of which the note is a lie.
    shape = stored_rows._shape
    monkeypatch.setattr(stored_rows, "_shape", lambda _: shape(tmp_path / "whole.jsonl"))
    (tmp_path / "whole.jsonl").write_text("\n".join(changed))
    path.write_text("\n".join([*changed[:4], "{broken", *changed[5:]]))
    messages = []
    for processes in (2, None):
        with pytest.raises(DataError) as caught:
            load(None, config.replace(dataset_num_proc=processes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "line 5 is broken" in messages[0]


def test_a_process_that_dies_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    parent = os.getpid()

    def dies(self: RowTokeniser, rows: Any, places: Sequence[int]) -> pa.Table:
        assert os.getpid() != parent
        os._exit(9)

    monkeypatch.setattr(RowTokeniser, "batch", dies)
    with pytest.raises(ResourceError, match=r"All 2 processes that tokenise rows must live .* Lower dataset_num_proc"):
        load(texts(9), SFTConfig(dataset_num_proc=2))


def test_a_folder_that_cannot_be_written_is_said_and_no_hindrance(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = trained(load(texts(4)))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file"))
    found = load(texts(4), SFTConfig(dataset_num_proc=2))
    assert trained(found) == expected
    assert found.kept_in is None
    (note,) = found.notes
    assert "could not be kept in" in note
    assert "HF_DATASETS_CACHE" in note


def test_a_full_disk_is_said_and_the_tokens_are_made_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    expected = trained(load(texts(4)))
    monkeypatch.setattr(datasets.Dataset, "map", full)
    found = load(texts(5)[:4] + texts(1))
    assert trained(found)[:4] == expected
    assert "No space left on device" in found.notes[0]


def test_the_librarys_switch_against_caching_is_heeded(cache: Path, calls: list[int]) -> None:
    datasets.disable_caching()
    try:
        assert [load(texts(4)).kept_in, load(texts(4)).kept_in] == [None, None]
    finally:
        datasets.enable_caching()
    assert sum(calls) == 8
    assert not cache.exists()


def test_rows_and_tokenizers_without_a_lasting_form_are_made_anew(cache: Path, calls: list[int]) -> None:
    rows = [{**row, "made": lambda: 1} for row in texts(4)]
    assert [load(rows).kept_in, load(rows).kept_in] == [None, None]
    assert sum(calls) == 8
    assert len(load(rows, SFTConfig(dataset_num_proc=2))) == 4  # nothing of them is pickled
    assert sum(calls) == 8

    class Own:
        def __init__(self) -> None:
            self.open = (item for item in ())

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return TOKENIZER(*args, **options)

    own: Any = Own()
    found = load_examples(SFTConfig(dataset_num_proc=2), own, task=SUPERVISED, dataset=texts(4))
    assert (found.kept_in, trained(found)) == (None, trained(load(texts(4))))


def test_the_environment_is_afterwards_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    before = os.environ
    load(texts(4), SFTConfig(dataset_num_proc=2))
    assert os.environ is before
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    load(texts(5), SFTConfig(dataset_num_proc=2))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_the_tokens_of_a_dataset_of_the_librarys_are_found_by_its_fingerprint(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_rows, "LARGE_ROWS", 2)
    given = datasets.Dataset.from_list(texts(5))
    expected = trained(load(texts(5)))
    calls.clear()
    assert trained(load(given)) == expected
    assert trained(load(datasets.Dataset.from_list(texts(5)))) == expected
    assert sum(calls) == 5
    assert len(load(given.select(range(4)))) == 4
    assert sum(calls) == 9
    with_function = given.with_transform(lambda rows: {"text": [text + "!" for text in rows["text"]]})
    assert [load(with_function).kept_in, load(with_function).kept_in] == [None, None]


def test_an_error_for_the_whole_dataset_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that cannot tell characters apart is found out by whichever process is first."""
    slow = build_tokenizer()

    class Slow(type(slow)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            if options.get("return_offsets_mapping"):
                raise NotImplementedError
            return super().__call__(*args, **options)

    monkeypatch.setattr(slow, "__class__", Slow)
    muted = [{**TALK[0], "weight": 0}, TALK[1]]
    messages = []
    for processes in (None, 2):
        with pytest.raises(InputError) as caught:
            config = SFTConfig(dataset_num_proc=processes)
            load_examples(config, slow, task=SUPERVISED, dataset=[{"messages": muted}] * 7)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "not a fast tokenizer" in messages[0]


def test_rows_are_told_apart_by_what_they_hold_and_not_by_which_objects_they_are() -> None:
    shared = "x" * 3
    same = [{"a": shared, "b": shared}, {"a": "xx" + "x"[:1], "b": str(b"xxx", "ascii")}]
    assert row_sequences.content_key(same[:1]) == row_sequences.content_key(same[1:])
    assert row_sequences.content_key(same) != row_sequences.content_key(same[:1])
    assert row_sequences.content_key([{"a": [1, 2]}]) != row_sequences.content_key([{"a": [1], "b": 2}])
    assert row_sequences.content_key([{"a": object}]) == row_sequences.content_key([{"a": object}])
    assert row_sequences.content_key([{"a": lambda: 1}]) is None


def test_who_comes_second_with_the_same_tokens_uses_its_own(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(made: Path, path: Path) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(token_cache, "put_folder", taken)
    found = load(texts(4))
    assert (len(found), sum(calls), found.kept_in) == (4, 4, None)
    assert "Directory not empty" in found.notes[0]


def test_who_is_second_while_it_renames_says_nothing_false(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(made: Path, path: Path) -> None:
        shutil.copytree(made, path)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(token_cache, "put_folder", taken)
    found = load(texts(4))
    assert (len(found), sum(calls), found.notes) == (4, 4, ())
    assert "kept in" in str(found.kept_in)


def test_who_is_second_leaves_the_folder_of_the_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(texts(4))
    (entry,) = cache.iterdir()
    before = {path.name: path.stat().st_ino for path in entry.iterdir()}
    known = token_cache._open
    asked: list[Path] = []

    def late(place: Path, total: int) -> pa.Table | None:  # the first is not there yet when the second looks for it
        asked.append(place)
        return None if len(asked) == 1 else known(place, total)

    monkeypatch.setattr(token_cache, "_open", late)
    second = load(texts(4))
    assert (asked, second.notes) == ([entry, entry], ())
    assert {path.name: path.stat().st_ino for path in entry.iterdir()} == before


def test_what_a_killed_run_left_goes_away_after_a_day(cache: Path) -> None:
    for name, age in ((".old", 90_000), (".new", 80_000)):
        (cache / name).mkdir(parents=True)
        (cache / name / "tokens.arrow").touch()
        os.utime(cache / name, (time.time() - age,) * 2)
    load(texts(4))
    assert not (cache / ".old").exists()
    assert (cache / ".new").exists()


def test_texts_of_a_function_are_told_apart_by_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "LARGE_ROWS", 2)
    given = datasets.Dataset.from_list([{"a": n} for n in range(4)])
    module = types.ModuleType("prompts_of_a_user")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    trained_ids = []
    for source in ("x", "y"):  # edited between two runs; datasets' own hash of it is that of its name
        exec(f"def make(row):\n    return '{source}' * 2", module.__dict__)
        found = load(formatted_rows(given, module.make, column="text"))
        trained_ids.append([row.samples[0].completion_ids.tolist() for row in found.examples])
    assert trained_ids[0] != trained_ids[1]
