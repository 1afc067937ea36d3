"""A stream of prompts: read as it is asked for, in an order that depends on its place alone, and from any place on."""

import itertools
import json
import threading
import tracemalloc
from typing import ClassVar

import datasets
import pytest

from trl_ray.config.example_options import StreamConfig
from trl_ray.config.sections import PromptConfig
from trl_ray.data.prompts.prompt_making import PromptRules
from trl_ray.data.prompts.prompt_source import load_prompts
from trl_ray.data.prompts.prompt_stream import TOLD_ONCE, open_prompts
from trl_ray.errors import DataError


class Letters:
    """One token per character; conversations are written as ``<role>content``."""

    chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [[ord(c) for c in t] for t in text]}


class Rows:
    """Rows 0, 1, ... of which it is known how many were read; without a number there is no end."""

    def __init__(self, count=None, bad=(), **columns):
        self.count, self.bad, self.columns, self.read = count, set(bad), columns, 0

    def __iter__(self):
        for number in itertools.count() if self.count is None else range(self.count):
            self.read += 1
            yield {"prompt": 7 if number in self.bad else f"row {number}", **self.columns}


def opened(rows, *, window=4, seed=0, check=lambda source: None, limit=None, evaluation=False, **options):
    return open_prompts(
        PromptRules(config=PromptConfig(**options), tokenizer=Letters(), max_prompt_tokens=limit),
        StreamConfig(dataset_streaming=True, stream_window=window),
        seed=seed,
        dataset=rows,
        check=check,
        evaluation=evaluation,
    )


def numbers(prompts):
    return [int(prompt.text.removeprefix("row ")) for prompt in prompts]


def test_each_pass_gives_every_row_once_window_by_window_in_an_order_of_its_own():
    found = numbers(opened(Rows(10)).take(0, 20))
    assert [sorted(found[begin:end]) for begin, end in ((0, 4), (4, 8), (8, 10))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert sorted(found[10:]) == list(range(10)) and found[:10] != found[10:]
    assert found == numbers(opened(Rows(10)).take(0, 20))
    assert found != numbers(opened(Rows(10), seed=1).take(0, 20))
    assert numbers(opened(Rows(10), shuffle_dataset=False).take(0, 12)) == [*range(10), 0, 1]


def test_prompts_are_named_by_pass_and_row_and_are_those_of_a_dataset_of_the_same_rows():
    rows = [{"prompt": [{"role": "user", "content": f"row {number}"}], "answer": number} for number in range(6)]
    config = PromptConfig(system_prompt="be brief", shuffle_dataset=False)
    whole = load_prompts(config, Letters(), seed=0, max_prompt_tokens=None, dataset=rows)
    given = datasets.IterableDataset.from_generator(lambda: iter(rows))
    stream = opened(given, system_prompt="be brief", shuffle_dataset=False)
    for one, other in zip(whole.take(0, 13), stream.take(0, 13), strict=True):
        assert (one.prompt_id, one.messages, one.columns) == (other.prompt_id, other.messages, other.columns)
        assert one.token_ids.tolist() == other.token_ids.tolist()
    assert stream.take(13, 1)[0].prompt_id == "2:1"


# The ledger may have issued more than the checkpoint knows of, never less.
@pytest.mark.parametrize(
    ("kept", "first"), [(kept, first) for first in (0, 3, 4, 9, 10, 17) for kept in (0, 2, 4, 9) if kept <= first]
)
def test_from_a_checkpoint_on_follow_exactly_the_prompts_that_were_not_issued(first, kept):
    whole = [prompt.prompt_id for prompt in opened(Rows(10)).take(0, 30)]
    before = opened(Rows(10))
    for ordinal in range(kept + 1):
        before.take(ordinal, 1)
    state = json.loads(json.dumps(before.state_dict()))
    after = opened(Rows(10))
    after.load_state_dict(state)
    assert [prompt.prompt_id for prompt in after.take(first, 30 - first)] == whole[first:]


@pytest.mark.parametrize("resumes", [True, False], ids=["from a checkpoint", "without one"])
def test_a_thread_that_a_session_left_behind_changes_nothing_for_the_next_one(resumes):
    class Slow(Rows):
        def __iter__(self):
            for number, row in enumerate(super().__iter__()):
                if number == 9 and threading.current_thread() is late:
                    reads.set()
                    assert may_go_on.wait(10)
                yield row

    reads, may_go_on, left = threading.Event(), threading.Event(), []
    late = threading.Thread(target=lambda: left.extend(stream.take(8, 30)))
    whole = [prompt.prompt_id for prompt in opened(Rows(10)).take(0, 30)]
    stream = opened(Slow(10))
    stream.take(0, 4)
    state = stream.state_dict()
    stream.take(4, 4)
    late.start()
    assert reads.wait(10)
    if resumes:
        stream.load_state_dict(state)
    begin = 4 if resumes else 8
    found = [prompt.prompt_id for prompt in stream.take(begin, 3)]
    state = stream.state_dict()
    may_go_on.set()
    late.join()
    assert len(left) == 30 and stream.state_dict() == state
    found += [prompt.prompt_id for count in range(3, 20) for prompt in stream.take(begin + count, 1)]
    assert found == whole[begin : begin + 20]


def test_windows_that_are_read_and_not_issued_are_read_again():
    stream = opened(Rows(), window=2)
    stream.take(0, 9)
    again = opened(Rows(), window=2)
    again.load_state_dict(stream.state_dict())
    assert again.take(0, 9)[3].prompt_id == opened(Rows(), window=2).take(0, 9)[3].prompt_id
    assert numbers(stream.take(0, 9)) == numbers(again.take(0, 9))


def test_only_the_rows_of_a_window_are_read_ahead_and_held():
    rows = Rows()
    stream = opened(rows, window=4)
    assert rows.read == 5  # one further says whether the stream ends here
    stream.take(0, 4)
    assert rows.read == 5
    stream.take(4, 1)
    assert rows.read == 9


def test_memory_does_not_grow_with_the_stream():
    stream = opened(Rows(**{"text": "x" * 1000}), window=10)
    stream.take(0, 100)
    tracemalloc.start()
    for first in range(100, 3000, 20):
        stream.take(first, 20)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 200_000  # 2900 rows are 3 MB


def test_another_stream_is_noticed_by_its_first_rows_and_by_those_at_the_place():
    begun = opened(Rows(40))
    begun.take(0, 4)
    begun.take(9, 2)
    state = begun.state_dict()
    assert state["place"]["window"] == 2

    def resumed(rows, **options):
        opened(rows, **options).load_state_dict(state)

    class Changed(Rows):
        def __iter__(self):
            for number, row in enumerate(super().__iter__()):
                yield {"prompt": "changed"} if number in self.at else row

    def changed(*at):
        rows = Changed(40)
        rows.at = at
        return rows

    resumed(changed(5, 30))  # nobody looks there
    with pytest.raises(DataError, match="the first 4 prompts of the stream are not those"):
        resumed(changed(2))
    with pytest.raises(DataError, match="from row 8 on are other ones"):
        resumed(changed(9))
    with pytest.raises(DataError, match="no row 8 where it had one before"):
        resumed(Rows(8))
    with pytest.raises(DataError, match="the first 4 prompts"):
        resumed(Rows(40, answer=1))
    dataset = load_prompts(PromptConfig(), Letters(), seed=0, max_prompt_tokens=None, dataset=list(Rows(4)))
    with pytest.raises(DataError, match="a stream then and a dataset now"):
        dataset.load_state_dict(state)
    with pytest.raises(DataError, match="a dataset then and a stream now"):
        opened(Rows(4)).load_state_dict(dataset.state_dict())


def test_a_bad_row_is_told_by_its_number_when_it_is_read_and_nothing_is_passed_over():
    rows = Rows(bad=[9])
    stream = opened(rows, shuffle_dataset=False)
    assert numbers(stream.take(0, 8)) == list(range(8))
    for _ in range(2):
        with pytest.raises(DataError, match=r"Row 9 of the given Rows.*got int 7"):
            stream.take(8, 4)
    rows.bad.clear()
    assert numbers(stream.take(8, 4)) == [8, 9, 10, 11]
    with pytest.raises(DataError, match="Row 1 of the given Rows"):
        opened(Rows(bad=[1]))


def test_bad_rows_are_dropped_counted_and_told_once():
    stream = opened(Rows(12, bad=[1, 5, 6]), on_bad_row="drop", shuffle_dataset=False)
    assert stream.num_left_out == 1 and len(stream.notes) == 1 and stream.notes[0].endswith(TOLD_ONCE)
    found = stream.take(0, 9)
    assert numbers(found) == [0, 2, 3, 4, 7, 8, 9, 10, 11]
    assert [prompt.prompt_id for prompt in found][:3] == ["0:0", "0:2", "0:3"]
    assert stream.num_left_out == 3 and stream.news() == ()
    assert stream.take(9, 1)[0].prompt_id == "1:0" and stream.num_left_out == 4
    again = opened(Rows(12, bad=[1, 5, 6]), on_bad_row="drop", shuffle_dataset=False)
    again.load_state_dict(stream.state_dict())
    assert again.num_left_out == 4
    late = opened(Rows(bad=[5]), on_bad_row="drop")
    late.take(0, 6)
    (told,) = late.news()
    assert told.startswith("1 row (5): Row 5 of the given Rows") and late.news() == ()
    with pytest.raises(DataError, match=r"Row 4 of|cannot be used"):
        opened(Rows(bad=[4, 5, 6, 7])).take(0, 6)


def test_a_later_window_of_bad_rows_alone_is_counted_and_passed_over_where_they_are_dropped():
    def bad_ones():
        return opened(Rows(14, bad=[*range(4, 8), 9, 12, 13]), on_bad_row="drop", shuffle_dataset=False)

    stream = bad_ones()
    assert numbers(stream.take(0, 4)) == [0, 1, 2, 3] and stream.num_left_out == 0
    found = stream.take(4, 5)
    assert [prompt.prompt_id for prompt in found] == ["0:8", "0:10", "0:11", "1:0", "1:1"]
    assert stream.num_left_out == 7 and stream.epochs_after(14) == 2.0  # 7 prompts are a pass
    (told,) = stream.news()
    assert told.startswith("4 rows (4, 5, 6, 7): Row 4 of the given Rows")
    assert numbers(stream.take(5, 4)) == [10, 11, 0, 1]
    assert numbers(bad_ones().first(99)) == [0, 1, 2, 3, 8, 10, 11]


@pytest.mark.parametrize("issued", [0, 3, 4, 5, 6, 7, 11])
def test_a_run_goes_on_from_a_checkpoint_beside_a_window_of_bad_rows_as_if_it_had_not_ended(issued):
    def bad_ones():
        return opened(Rows(14, bad=[*range(4, 8), 9, 12, 13]), on_bad_row="drop")

    whole = [prompt.prompt_id for prompt in bad_ones().take(0, 30)]
    before = bad_ones()
    for ordinal in range(issued + 1):
        before.take(ordinal, 1)
    after = bad_ones()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.num_left_out == before.num_left_out
    assert [prompt.prompt_id for prompt in after.take(issued, 30 - issued)] == whole[issued:]


def test_a_later_window_may_be_all_too_long_for_the_model():
    rows = [{"prompt": text} for text in ("a", "b", "far too long", "too long as well", "c")]
    stream = opened(rows, window=2, limit=5, on_bad_row="drop", shuffle_dataset=False)
    assert [prompt.text for prompt in stream.take(0, 4)] == ["a", "b", "c", "a"] and stream.num_left_out == 2


def test_a_first_window_of_bad_rows_alone_is_refused_in_every_pass():
    with pytest.raises(DataError, match="Row 0 of"):
        opened(Rows(8, bad=range(4)), on_bad_row="drop")
    rows = Rows(8)
    stream = opened(rows, on_bad_row="drop")
    stream.take(0, 8)
    rows.bad = set(range(8))
    with pytest.raises(DataError, match="Row 0 of"):
        stream.take(8, 1)


def test_every_window_is_checked_as_a_dataset_is():
    def check(source):
        if any(prompt.text == "row 6" for prompt in source.take(0, len(source))):
            raise DataError("row 6 is not wanted")

    stream = opened(Rows(), check=check)
    stream.take(0, 4)
    with pytest.raises(DataError, match="not wanted"):
        stream.take(4, 1)
    with pytest.raises(DataError, match="must have at most"):
        opened(Rows(), limit=5, window=20)
    mixed = [{"prompt": "a"}] * 4 + [{"prompt": [{"role": "user", "content": "b"}]}]
    with pytest.raises(DataError, match="Row 4"):
        opened(mixed).take(0, 5)


def test_passes_are_counted_once_the_first_one_is_complete():
    stream = opened(Rows(8))
    stream.take(0, 4)
    assert stream.epochs_after(4) == 0.0
    stream.take(4, 1)  # the window that ends the stream, one row further is none
    assert [stream.epochs_after(count) for count in (7, 8, 15, 16)] == [0.0, 1.0, 1.0, 2.0]


def test_a_stream_must_have_rows_and_be_readable_again():
    with pytest.raises(DataError, match="at least one row"):
        opened(Rows(0))

    class Once:
        def __init__(self):
            self.rows = iter([{"prompt": "a"}, {"prompt": "b"}])

        def __iter__(self):
            return self.rows

    stream = opened(Once())
    stream.take(0, 2)
    with pytest.raises(DataError, match="must give the same rows whenever it is read"):
        stream.take(2, 1)
    with pytest.raises(DataError, match="used up by reading"):
        opened(row for row in Rows(3))


def test_of_a_held_out_stream_the_first_prompts_are_taken_in_its_order_and_no_more_read():
    rows = Rows(bad=[2])
    assert numbers(opened(rows, evaluation=True, on_bad_row="drop").first(5)) == [0, 1, 3, 4, 5]
    assert rows.read == 9
    assert numbers(opened(Rows(3), evaluation=True).first(5)) == [0, 1, 2]


def test_a_file_is_read_as_a_stream_and_its_broken_line_is_told(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"row {number}", "prompt": number}) for number in range(8)]
    file.write_text("\n".join([*lines, "{broken"]))
    mapping = {"question": "prompt", "prompt": "answer"}
    stream = opened(None, dataset_name=str(file), column_mapping=mapping, shuffle_dataset=False)
    assert [prompt.columns for prompt in stream.take(0, 2)] == [{"answer": 0}, {"answer": 1}]
    with pytest.raises(DataError, match="line 9 is broken"):
        stream.take(2, 3)


def test_a_mixture_of_streams_is_that_of_the_same_datasets_each_read_in_its_own_way(tmp_path):
    talks = [
        {"conversations": [{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": "ho"}]} for n in range(9)
    ]
    asked = [{"prompt": [{"role": "user", "content": f"row {n}"}], "answer": n} for n in range(30)]
    mixed = []
    for name, rows, weight in (("talks", talks, 1.0), ("asked", asked, 2.0)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        mixed.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    options = {"datasets": mixed, "shuffle_dataset": False}
    whole = load_prompts(PromptConfig(**options), Letters(), seed=4, max_prompt_tokens=None)
    stream = opened(None, seed=4, **options)
    count = len(whole)
    assert [prompt.messages for prompt in stream.take(0, count)] == [prompt.messages for prompt in whole.take(0, count)]
    assert stream.take(count, 1)[0].prompt_id == "1:0"
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, [*talks[:3], {"conversations": []}])))
    with pytest.raises(DataError, match=r"Row 3 of .*talks\.jsonl"):
        opened(None, seed=4, **options).take(0, 60)
