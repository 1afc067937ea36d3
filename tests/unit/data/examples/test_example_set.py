"""Rows become the examples of each task, all at once or window by window, and what is left out is told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from trl_ray.data.chat.training_templates import template_source
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, StreamedExample, load_examples, stream_examples
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.errors import ConfigError, DataError, ModelError
from trl_ray.types import Example, TrainingSample

TOKENIZER = build_tokenizer()  # a token per byte
PAIRS = [{"prompt": f"q{i}", "chosen": f"good{i}", "rejected": f"b{i}"} for i in range(4)]
END = "<|im_end|>"


def load(
    config: SupervisedRunConfig, task: ExampleTask, rows: Any, *, tokenizer: Any = TOKENIZER, evaluation: bool = False
) -> ExampleSet:
    return load_examples(config, tokenizer, task=task, dataset=rows, evaluation=evaluation)


def texts(sample: TrainingSample) -> tuple[str, str]:
    return str(TOKENIZER.decode(sample.prompt_ids)), str(TOKENIZER.decode(sample.completion_ids))


def trained(sample: TrainingSample) -> str:
    return str(TOKENIZER.decode(sample.completion_ids[sample.loss_mask]))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_a_text_and_an_answer_to_learn_are_one_sample_each() -> None:
    rows = [{"text": "ab"}, {"text": "cde"}]
    found = load(SFTConfig(), ExampleTask.SUPERVISED, rows)
    assert [texts(example.samples[0]) for example in found.examples] == [("a", f"b{END}"), ("c", f"de{END}")]
    assert [(example.row, example.num_rows) for example in found.examples] == [(0, 1), (1, 1)]
    assert [example.samples[0].group_id for example in found.examples] == [0, 1]
    assert (found.num_rows, len(found), found.report()) == (2, 2, ())


def test_the_text_column_and_the_way_of_writing_can_be_told() -> None:
    config = SFTConfig(dataset_text_field="body")
    assert texts(load(config, ExampleTask.SUPERVISED, [{"body": "ab"}]).examples[0].samples[0]) == ("a", f"b{END}")
    chatml = [{"text": f"<|im_start|>user\nq{END}\n<|im_start|>assistant\na{END}\n"}]
    (read,) = load(SFTConfig(assistant_only_loss=True), ExampleTask.SUPERVISED, chatml).examples
    assert trained(read.samples[0]) == f"a{END}\n"
    plain = SFTConfig(dataset_text_format="plain")
    assert texts(load(plain, ExampleTask.SUPERVISED, chatml).examples[0].samples[0])[0] == "<|im_start|>"
    with pytest.raises(ConfigError, match=r"dataset_text_format must be one of .*Did you mean chatml"):
        load(SFTConfig(dataset_text_format="chatmll"), ExampleTask.SUPERVISED, chatml)


def test_the_training_template_is_taken_where_the_tokenizers_own_has_no_markers() -> None:
    rows = [{"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}]
    assert "generation" not in TOKENIZER.chat_template.replace("add_generation_prompt", "")
    (example,) = load(SFTConfig(assistant_only_loss=True), ExampleTask.SUPERVISED, rows).examples
    assert trained(example.samples[0]) == f"a{END}\nb{END}\n"


def pieces(examples: tuple[Example, ...]) -> list[list[str]]:
    return [["".join(texts(sample)) for sample in example.samples] for example in examples]


ROWS = [{"text": "abcd"}, {"text": "e"}, {"text": "fg"}]  # 5, 2 and 3 tokens


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        ("bfd", [["abcd"], ["e" + END], ["fg" + END]]),
        ("bfd_split", [["abcd"], ["fg" + END], ["e" + END]]),
        ("wrapped", [["abcd"], ["e" + END], ["g" + END]]),  # abcd | .e.f | g.
    ],
)
def test_packed_rows_hold_pieces_as_samples_of_their_own(strategy: str, rows: list[list[str]]) -> None:
    found = load(
        SFTConfig(packing=True, packing_strategy=strategy, max_length=4), ExampleTask.SUPERVISED, ROWS
    )  # `abcd` ends beyond a row: cut off, or a piece of one token, in which nothing has a context
    assert sorted(pieces(found.examples)) == sorted(rows)
    assert found.cut_rows == ((0,) if strategy == "bfd" else ())


def test_pieces_that_share_a_row_keep_apart_and_count_as_rows() -> None:
    found = load(SFTConfig(packing=True, max_length=8), ExampleTask.SUPERVISED, ROWS)
    assert pieces(found.examples) == [["abcd" + END, "fg" + END], ["e" + END]]
    assert [(example.row, example.num_rows) for example in found.examples] == [(0, 2), (1, 1)]
    groups = [sample.group_id for example in found.examples for sample in example.samples]
    assert len(set(groups)) == 3
    assert all(len(sample.prompt_ids) == 1 for example in found.examples for sample in example.samples)


def test_a_piece_without_a_target_is_left_out_and_so_is_a_row_of_such_pieces() -> None:
    rows = [{"prompt": "abcdefg", "completion": "h"}, {"prompt": "ij", "completion": "k"}]
    config = SFTConfig(packing=True, packing_strategy="wrapped", max_length=4)
    found = load(config, ExampleTask.SUPERVISED, rows)
    # abcd | efgh | .ijk | . : the end token of the first row begins a row, that of the second is one.
    assert pieces(found.examples) == [["efgh"], ["ijk"]]
    lone = load(SFTConfig(packing=True, packing_strategy="wrapped", max_length=8), ExampleTask.SUPERVISED, rows[:1])
    assert pieces(lone.examples) == [["abcdefgh"]]
    short = [{"prompt": "abcd", "completion": "<|endoftext|>" + END}]
    config = SFTConfig(packing=True, packing_strategy="wrapped", max_length=2, dataset_text_format="plain")
    assert pieces(load(config, ExampleTask.SUPERVISED, short).examples) == [["<|endoftext|>" + END]]


def test_held_out_examples_are_packed_only_where_that_is_asked_for() -> None:
    rows = {"train": ROWS, "test": ROWS}
    for own, packs in ((None, True), (False, False), (True, True)):
        config = SFTConfig(packing=True, eval_packing=own, max_length=16, dataset_test_split="test")
        found = load(config, ExampleTask.SUPERVISED, rows, evaluation=True)
        assert len(found) == (1 if packs else 3)


def test_a_pair_is_chosen_and_rejected_with_one_prompt() -> None:
    found = load(DPOConfig(), ExampleTask.PAIRS, PAIRS[:2])
    second = found.examples[1]
    assert [texts(sample) for sample in second.samples] == [("q1", f"good1{END}"), ("q1", f"b1{END}")]
    assert [sample.group_id for sample in second.samples] == [1, 1]
    assert all(sample.loss_mask.all() and sample.label is None for sample in second.samples)


def test_with_likelihood_the_prompt_is_a_third_sample_if_it_has_a_token_to_train() -> None:
    rows = [*PAIRS[:1], {**PAIRS[0], "prompt": "q"}]
    two, one = load(ORPOConfig(), ExampleTask.LIKELIHOOD_PAIRS, rows).examples
    assert [texts(sample) for sample in two.samples] == [("q0", f"good0{END}"), ("q0", f"b0{END}"), ("q", "0")]
    assert two.samples[2].loss_mask.tolist() == [True]
    assert len(one.samples) == 2


def test_the_end_of_a_pair_is_kept_on_each_side_for_itself() -> None:
    config = DPOConfig(max_length=4, truncation_mode="keep_end")
    (example,) = load(config, ExampleTask.PAIRS, [{"prompt": "pqr", "chosen": "abcd", "rejected": "e"}]).examples
    chosen, rejected = example.samples
    assert (texts(chosen), texts(rejected)) == (("b", f"cd{END}"), ("qr", f"e{END}"))
    assert chosen.label is not None and chosen.label.length == 4  # `b` counts, though nothing predicts it


def test_pairs_without_room_for_an_answer_are_left_out_and_told() -> None:
    rows = [PAIRS[0], {**PAIRS[1], "prompt": "long"}, {**PAIRS[2], "prompt": "xyz"}]
    found = load(DPOConfig(max_length=4), ExampleTask.PAIRS, rows)
    assert [example.row for example in found.examples] == [0, 2]
    assert found.untrained == {1: Untrained.TRUNCATED}
    assert found.report() == (
        "1 of 3 rows of the given list have none within max_length and are left out (row 1): raise max_length.",
        "2 of 3 rows of the given list are longer than max_length and cut (rows 0, 2).",
        # q0 good0 end, q0 b0 end, xyz good2 end, xyz b2 end: 8 + 5 + 9 + 6, of each 4 are kept.
        "12 of 28 (42.9%) tokens of the given list are beyond max_length and cut off.",
    )


def test_a_prompt_that_merges_with_its_answer_is_told() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template_source("chatml").replace("assistant\\n' -", "assistant\\n#' -")
    rows = [{"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    for config, task in ((DPOConfig(), ExampleTask.PAIRS), (KTOConfig(), ExampleTask.UNPAIRED)):
        found = load(config, task, rows, tokenizer=tokenizer)
        assert found.diverging_rows == (0,)
        assert "have a prompt that is tokenised differently" in found.report()[0]


def test_a_rated_answer_has_its_label_and_the_answer_before_it_as_mismatched_one() -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i == 1} for i in range(3)]
    plain = load(KTOConfig(), ExampleTask.UNPAIRED, rows)
    ring = load(KTOConfig(), ExampleTask.UNPAIRED_WITH_KL, rows)
    for found in (plain, ring):
        labels = [example.samples[0].label for example in found.examples]
        assert [label is not None and label.desirable for label in labels] == [False, True, False]
    assert all(example.mismatched is None for example in plain.examples)
    assert [texts(example.mismatched) for example in ring.examples if example.mismatched] == [
        ("q0", f"a2{END}"),
        ("q1", f"a0{END}"),
        ("q2", f"a1{END}"),
    ]


def test_a_pair_is_two_rated_answers_and_no_prompt_gets_an_answer_of_its_own_as_mismatched_one() -> None:
    found = load(KTOConfig(), ExampleTask.UNPAIRED_WITH_KL, PAIRS[:2])
    got = [
        (example.row, *texts(example.samples[0]), texts(example.mismatched)[1])
        for example in found.examples
        if example.mismatched is not None
    ]
    assert got == [
        (0, "q0", f"good0{END}", f"b1{END}"),
        (0, "q0", f"b0{END}", f"good1{END}"),
        (1, "q1", f"good1{END}", f"good0{END}"),
        (1, "q1", f"b1{END}", f"b0{END}"),
    ]
    assert len({example.samples[0].group_id for example in found.examples}) == 4


def test_a_row_alone_has_no_partner_for_the_kl() -> None:
    found = load(KTOConfig(), ExampleTask.UNPAIRED_WITH_KL, PAIRS[:1])
    assert found.untrained == {0: Untrained.NO_PARTNER}
    with pytest.raises(DataError, match=r"At least one row .*1 of 1 rows .* have no other row whose completion"):
        found.require_examples()


def test_a_scored_pair_shares_its_beginning_and_ends_with_a_token_to_read_before() -> None:
    rows = [{"prompt": "q", "chosen": "abc", "rejected": "abd", "margin": 2}]
    (example,) = load(RewardModelConfig(), ExampleTask.REWARD_PAIRS, rows).examples
    assert [texts(sample) for sample in example.samples] == [("qab", f"c{END}{END}"), ("qab", f"d{END}{END}")]
    for sample in example.samples:
        assert sample.loss_mask.tolist() == [False, False, True]
        assert sample.label is not None and sample.label.margin == 2.0
    (short,) = load(RewardModelConfig(), ExampleTask.REWARD_PAIRS, [{"chosen": "ab", "rejected": "abc"}]).examples
    assert [texts(sample)[0] for sample in short.samples] == ["ab", "ab"]
    (other,) = load(
        RewardModelConfig(), ExampleTask.REWARD_PAIRS, [{"prompt": "ü", "chosen": "a", "rejected": "b"}]
    ).examples
    assert other.samples[0].label is None


def test_what_is_scored_is_never_cut() -> None:
    exact = load(RewardModelConfig(max_length=8), ExampleTask.REWARD_PAIRS, PAIRS[:1])  # q0good0 and the end: 8 tokens
    assert len(exact) == 1
    found = load(RewardModelConfig(max_length=5), ExampleTask.REWARD_PAIRS, PAIRS)
    assert set(found.untrained.values()) == {Untrained.TOO_LONG}
    with pytest.raises(DataError, match=r"4 of 4 rows .* longer than max_length and left out \(rows 0, 1, 2, 3\)"):
        found.require_examples()


@pytest.mark.parametrize("margin", ["much", None, float("nan"), True])
def test_a_margin_that_is_no_number_is_refused(margin: object) -> None:
    rows = [{**PAIRS[0], "margin": 1.0}, {**PAIRS[1], "margin": margin}]
    with pytest.raises(DataError, match=r"row 1 of the given list, field 'margin', must be a finite number"):
        load(RewardModelConfig(), ExampleTask.REWARD_PAIRS, rows)


def test_only_training_looks_at_last_steps_alone() -> None:
    rows = [{"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}]
    config = PRMConfig(train_on_last_step_only=True, dataset_test_split="test")
    for evaluation, steps in ((False, [False]), (True, [True, False])):
        found = load(config, ExampleTask.STEPS, {"train": rows, "test": rows}, evaluation=evaluation)
        label = found.examples[0].samples[0].label
        assert label is not None and label.steps is not None and label.steps.tolist() == steps


@pytest.mark.parametrize("task", ExampleTask)
def test_examples_do_not_depend_on_how_rows_are_batched(task: ExampleTask, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"prompt": f"p{i}", "completion": "x" * (i + 1)} for i in range(7)]
    steps = [{"prompt": f"p{i}", "completions": ["a"] * (i + 1), "labels": [i % 2] * (i + 1)} for i in range(7)]
    kinds: dict[ExampleTask, tuple[SupervisedRunConfig, Any]] = {
        ExampleTask.SUPERVISED: (SFTConfig(), answers),
        ExampleTask.STEPS: (PRMConfig(), steps),
    }
    more = [{"prompt": f"q{i}", "chosen": f"good{i}", "rejected": f"b{i}"} for i in range(7)]
    config, rows = kinds.get(task, (DPOConfig(), more))
    at_once = load(config, task, rows)
    monkeypatch.setattr("trl_ray.data.examples.row_tokenisation.BATCH_ROWS", 2)
    in_batches = load(config, task, rows)
    assert len(at_once) == len(in_batches) >= 7
    for one, other in zip(at_once.examples, in_batches.examples, strict=True):
        for a, b in zip(one.samples, other.samples, strict=True):
            assert (texts(a), a.loss_mask.tolist(), a.group_id) == (texts(b), b.loss_mask.tolist(), b.group_id)


def stream(
    rows: Any, *, start: int = 0, seed: int = 7, task: ExampleTask = ExampleTask.PAIRS, **options: Any
) -> list[StreamedExample]:
    kind = SFTConfig if task is ExampleTask.SUPERVISED else DPOConfig
    config = kind(**{"dataset_streaming": True, "max_steps": 1, "stream_window": 4, **options})
    return list(stream_examples(config, TOKENIZER, task=task, dataset=rows, start_window=start, seed=seed))


MANY = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(10)]


def test_a_stream_gives_every_row_once_window_by_window() -> None:
    found = stream(MANY)
    assert [(item.window, item.place) for item in found] == [(w, p) for w in range(2) for p in range(4)] + [
        (2, 0),
        (2, 1),
    ]
    rows = [item.example.row for item in found]
    assert [sorted(rows[:4]), sorted(rows[4:8]), sorted(rows[8:])] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert rows != sorted(rows)
    assert [item.next_row for item in found] == list(range(1, 11))
    assert [item.example.row for item in stream(MANY, shuffle_dataset=False)] == list(range(10))
    assert rows != [item.example.row for item in stream(MANY, seed=8)]


def test_every_window_has_an_order_of_its_own() -> None:
    rows = [item.example.row for item in stream([MANY[0]] * 16, stream_window=8)]
    assert [row - 8 for row in rows[8:]] != rows[:8]


def test_a_resumed_stream_goes_on_as_the_first_would_have() -> None:
    whole, rest = stream(MANY), stream(MANY, start=1)
    assert [(item.window, item.place, item.example.row, item.next_row) for item in whole[4:]] == [
        (item.window, item.place, item.example.row, item.next_row) for item in rest
    ]
    assert stream(MANY, start=3) == []


def test_rows_are_read_when_their_window_is_asked_for() -> None:
    import datasets

    read: list[int] = []

    def rows() -> Any:
        for i in itertools.count():
            read.append(i)
            yield {"prompt": f"q{i}", "chosen": "a", "rejected": "b"}

    endless = datasets.IterableDataset.from_generator(rows)
    config = DPOConfig(dataset_streaming=True, max_steps=1, stream_window=4)
    examples = stream_examples(config, TOKENIZER, task=ExampleTask.PAIRS, dataset=endless, seed=0)
    first = [next(examples).example.row for _ in range(4)]
    assert sorted(first) == [0, 1, 2, 3]
    assert max(read) <= 4
    resumed = stream_examples(config, TOKENIZER, task=ExampleTask.PAIRS, dataset=endless, start_window=2, seed=0)
    assert sorted(next(resumed).example.row for _ in range(4)) == [8, 9, 10, 11]


def test_packed_windows_never_share_a_row_or_a_group() -> None:
    rows = [{"text": "x" * (1 + i % 5)} for i in range(10)]
    found = stream(rows, task=ExampleTask.SUPERVISED, packing=True, max_length=12)
    groups = [sample.group_id for item in found for sample in item.example.samples]
    assert len(groups) == len(set(groups)) == 10
    ends = [item.next_row for item in found if item.place == max(o.place for o in found if o.window == item.window)]
    assert ends == [4, 8, 10]


def test_what_a_stream_leaves_out_is_counted_by_reason() -> None:
    rows = [{**row, "prompt": "far too long"} if i in (1, 5) else row for i, row in enumerate(MANY)]
    found = stream(rows, max_length=8)
    assert [dict(item.untrained) for item in (found[0], found[3], found[-1])] == [
        {Untrained.TRUNCATED: 1},
        {Untrained.TRUNCATED: 2},
        {Untrained.TRUNCATED: 2},
    ]
    assert found[2].next_row == 4  # the window's last example ends it


def test_what_a_stream_loses_is_what_a_dataset_of_its_rows_loses() -> None:
    rows = [{"prompt": "p" * (i + 1), "chosen": "abc", "rejected": "abd"} for i in range(7)]
    whole = load(DPOConfig(max_length=7), ExampleTask.PAIRS, rows)
    streamed = stream(rows, max_length=7)[-1].losses
    assert whole.tokens.cut and whole.equal_rows
    assert streamed == whole.counts()
    texts_of = [{"text": "x" * (1 + i)} for i in range(8)]
    options: dict[str, Any] = {"packing": True, "packing_strategy": "wrapped", "max_length": 6}
    packed = stream(texts_of, task=ExampleTask.SUPERVISED, **options)
    windows = [load(SFTConfig(**options), ExampleTask.SUPERVISED, part) for part in (texts_of[:4], texts_of[4:])]
    assert sum(found.tokens.unpacked for found in windows) > 0
    assert packed[-1].losses == {name: sum(found.counts()[name] for found in windows) for name in packed[0].losses}


def test_a_stream_says_of_each_kind_of_loss_once_what_a_dataset_says(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "p" * 9, "completion": "c"}, {"prompt": "p", "completion": "c" * 12}] * 4
    stream(rows, task=ExampleTask.SUPERVISED, max_length=8, stream_window=2)
    assert len(caplog.records) == 2
    first = load(SFTConfig(max_length=8), ExampleTask.SUPERVISED, rows[:2])
    for record, sentence in zip(caplog.records, first.report(), strict=False):
        assert record.message.startswith(sentence.replace("list", "list"))
        assert record.message.endswith("Later rows of the stream of which this holds are not told.")
    caplog.clear()
    config = SFTConfig(dataset_streaming=True, max_steps=1, stream_window=2, max_length=8)
    told = {"cut", "truncated"}
    list(stream_examples(config, TOKENIZER, task=ExampleTask.SUPERVISED, dataset=rows, seed=0, told=told))
    assert not caplog.records


def test_a_bad_row_in_the_middle_of_a_stream_is_named_by_its_number_in_the_stream() -> None:
    rows = [*MANY[:6], {**MANY[6], "rejected": None}]
    with pytest.raises(DataError, match=r"Row 6 of the given list, field 'rejected' must be given, got None"):
        stream(rows)
    with pytest.raises(DataError, match=r"Row 6 of the given list, field 'rejected' must be given, got None"):
        stream(rows, start=1)


def test_streams_that_cannot_be_read_twice_or_at_all_are_refused_at_once() -> None:
    with pytest.raises(DataError, match="must be one that can be read again from its start"):
        stream(iter(MANY))
    with pytest.raises(DataError, match="must have at least one row"):
        stream([])
    with pytest.raises(DataError, match=r"fraction and share must be left out with dataset_streaming=true.*b\.jsonl"):
        stream(None, datasets=[{"path": "a.jsonl"}, {"path": "b.jsonl", "share": 0.5}])


def test_a_mixture_of_streams_is_that_of_the_same_datasets_and_names_its_bad_rows(tmp_path: Path) -> None:
    def entry(name: str, table: Sequence[Any], **options: Any) -> dict[str, Any]:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, table)))
        return {"path": str(tmp_path / f"{name}.jsonl"), **options}

    mixed = [entry("a", MANY, weight=3.0), entry("b", [{**row, "chosen": "fine"} for row in MANY[:4]], weight=1.0)]
    options = {"datasets": mixed, "shuffle_dataset": False, "mixture_stopping": "all_exhausted"}
    whole = load_examples(DPOConfig(seed=3, **options), TOKENIZER, task=ExampleTask.PAIRS).examples
    streamed = list(
        stream_examples(
            DPOConfig(seed=3, dataset_streaming=True, max_steps=1, stream_window=4, **options),
            TOKENIZER,
            task=ExampleTask.PAIRS,
            seed=7,
        )
    )
    assert len(whole) > 10
    told = [[sample.completion_ids.tolist() for sample in each.samples] for each in whole]
    assert told == [[sample.completion_ids.tolist() for sample in item.example.samples] for item in streamed]
    entry("b", [MANY[0], {**MANY[1], "rejected": None}])
    with pytest.raises(DataError, match=r"Row 1 of .*b\.jsonl, field 'rejected'"):
        stream(None, **options)


def test_generated_tasks_and_files_are_streamed(tmp_path: Any) -> None:
    import json

    pytest.importorskip("reasoning_gym")
    config = {"dataset_name": "reasoning_gym/chain_sum", "dataset_kwargs": {"size": 6, "form": "preferences"}}
    assert len(stream(None, **config)) == 6
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, MANY)), encoding="utf-8")
    assert sorted(item.example.row for item in stream(None, start=1, dataset_name=str(path))) == list(range(4, 10))


def write(tmp_path: Any, name: str, rows: list[dict[str, Any]]) -> str:
    import json

    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_the_sources_of_a_mixture_are_read_each_in_its_own_format(tmp_path: Any) -> None:
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    sources = [
        {"path": write(tmp_path, "texts.jsonl", [{"text": "ab"}, {"text": "cd"}])},
        {"path": write(tmp_path, "share.jsonl", [shared, shared])},
    ]
    config = SFTConfig(datasets=sources, mixture_stopping="all_exhausted_without_replacement")
    found = load_examples(config, TOKENIZER, task=ExampleTask.SUPERVISED)
    assert [example.row for example in found.examples] == [0, 1, 2, 3]
    whole = sorted("".join(texts(example.samples[0])) for example in found.examples)
    assert whole == [f"<|im_start|>user\nq{END}\n<|im_start|>assistant\na{END}\n"] * 2 + ["ab" + END, "cd" + END]
    again = load_examples(config, TOKENIZER, task=ExampleTask.SUPERVISED)
    assert np.array_equal(
        np.concatenate([example.samples[0].completion_ids for example in found.examples]),
        np.concatenate([example.samples[0].completion_ids for example in again.examples]),
    )


def test_datasets_without_shares_are_trained_whole_one_after_the_other(tmp_path: Any) -> None:
    many, few = ([{"text": f"{letter}{i:02}"} for i in range(count)] for letter, count in (("m", 32), ("f", 4)))
    sources = [{"path": write(tmp_path, "m.jsonl", many)}, {"path": write(tmp_path, "f.jsonl", few)}]
    found = load_examples(SFTConfig(datasets=sources), TOKENIZER, task=ExampleTask.SUPERVISED)
    assert ["".join(texts(example.samples[0])) for example in found.examples] == [
        row["text"] + END for row in [*many, *few]
    ]
    assert (found.num_rows, len(found.untrained), found.report()) == (36, 0, ())
    weighed = SFTConfig(datasets=[{**sources[0], "weight": 1.0}, sources[1]])
    (sentence,) = load_examples(weighed, TOKENIZER, task=ExampleTask.SUPERVISED).report()
    assert "of 32 rows of" in sentence
    assert "are in no place of the mixture (weight" in sentence


def test_a_pair_among_rated_answers_gets_no_answer_of_its_own_as_mismatched_one(tmp_path: Any) -> None:
    sources = [
        {"path": write(tmp_path, "rated.jsonl", [{"prompt": "p", "completion": "x", "label": True}])},
        {"path": write(tmp_path, "pairs.jsonl", PAIRS[:1])},
    ]
    config = KTOConfig(datasets=sources, mixture_stopping="all_exhausted_without_replacement")
    found = load_examples(config, TOKENIZER, task=ExampleTask.UNPAIRED_WITH_KL)
    assert len(found) == 3
    for example in found.examples:
        assert example.mismatched is not None
        own = "x" if texts(example.samples[0])[0] == "p" else "good0 b0"
        assert texts(example.mismatched)[1].removesuffix(END) not in own.split()


def test_a_bad_row_of_a_mixture_is_named_by_its_number_in_its_own_source(tmp_path: Any) -> None:
    good, bad = ({"prompt": "q", "chosen": "a", "rejected": r} for r in ("b", None))
    sources = [
        {"path": write(tmp_path, "one.jsonl", [good] * 3)},
        {"path": write(tmp_path, "two.jsonl", [good, bad])},
    ]
    config = DPOConfig(datasets=sources, mixture_stopping="all_exhausted")
    with pytest.raises(DataError, match=r"Row 1 of .*two.jsonl, field 'rejected' must be given, got None"):
        load_examples(config, TOKENIZER, task=ExampleTask.PAIRS)


def test_a_conversation_without_a_template_is_refused() -> None:
    bare = build_tokenizer()
    bare.chat_template = None
    rows = [{"messages": [user("q"), assistant("a")]}]
    for only in (False, True):
        with pytest.raises(ModelError, match="The tokenizer must have a chat template"):
            load(SFTConfig(assistant_only_loss=only), ExampleTask.SUPERVISED, rows, tokenizer=bare)
