import json

import pytest

from trl_ray.config.sections import DataConfig
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.errors import ConfigError, DataError

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]


def rows_of(name, **options):
    return load_rows(DataConfig(dataset_name=str(name), **options), seed=1)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_every_file_type_gives_the_same_rows(tmp_path):
    import datasets

    write(tmp_path / "a.json", json.dumps(ROWS))
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n")
    write(tmp_path / "a.csv", "prompt,answer\na,1\nb,2\n")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "a.arrow")
    for suffix in ("json", "jsonl", "csv", "parquet", "arrow"):
        found = rows_of(tmp_path / f"a.{suffix}")
        assert (list(found.rows), found.columns) == (ROWS, ("prompt", "answer")), suffix


def test_a_saved_folder_and_python_objects_give_their_split(tmp_path):
    import datasets

    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    splits.save_to_disk(str(tmp_path / "saved"))
    assert len(rows_of(tmp_path / "saved", dataset_train_split="test").rows) == 1
    for given in (splits, splits["train"], ROWS):
        assert list(load_rows(DataConfig(), seed=1, dataset=given).rows) == ROWS
    with pytest.raises(DataError, match=r"split 'valid', it has \['test', 'train'\]"):
        load_rows(DataConfig(dataset_train_split="valid"), seed=1, dataset=splits)


def test_a_broken_line_of_jsonl_is_named_by_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n')
    with pytest.raises(DataError, match=r"line 3 is broken at column 15.*got '\{\"prompt\": \"b\"'"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "at least one row"),
        ("a.json", "[]", "at least one row"),
        ("a.json", '{"a": 1}', "must be a JSON list of objects, got a dict"),
        ("a.json", "[1]", "Row 0 .* must be an object with columns, got int"),
        ("a.csv", "prompt,answer\n", "at least one row"),
        ("a.csv", 'prompt\n"a', "must be a comma-separated table"),
        ("a.parquet", "PAR1 but cut off", "must be a whole parquet file"),
        ("a.txt", "hello", "must end in .json"),
    ],
)
def test_an_unusable_file_says_why(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        rows_of(write(tmp_path / name, content))


def test_bytes_that_are_no_text_are_located(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"must be UTF-8 text: line 1 has 0xff at byte 12 of the line, invalid start"):
        rows_of(tmp_path / "a.jsonl")


def test_a_missing_file_offers_the_one_beside_it(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file. Did you mean '.*/train.jsonl'"):
        rows_of(tmp_path / "trian.jsonl")


def test_a_hub_name_out_of_reach_is_one_clear_error(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'nobody/nothing': no such file or hub dataset"):
        rows_of("nobody/nothing")


def test_the_split_test_is_held_out_where_none_is_named(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {split: Dataset.from_list([{"prompt": split}]) for split in ("train", "test", "other")}
    DatasetDict(rows).save_to_disk(tmp_path / "both")
    config = DataConfig(dataset_name=str(tmp_path / "both"))
    assert [row["prompt"] for row in load_rows(config, seed=1, evaluation=True).rows] == ["test"]
    named = config.replace(dataset_test_split="other")
    assert [row["prompt"] for row in load_rows(named, seed=1, evaluation=True).rows] == ["other"]
    several = DataConfig(datasets=[{"path": str(tmp_path / "both")}, {"path": str(tmp_path / "both")}])
    assert [row["prompt"] for row in load_rows(several, seed=1, evaluation=True).rows] == ["test", "test"]
    DatasetDict(train=rows["train"]).save_to_disk(tmp_path / "one")
    with pytest.raises(
        DataError, match=r"must have the split 'test', it has \['train'\]. Set test_split_size, or name"
    ):
        load_rows(DataConfig(dataset_name=str(tmp_path / "one")), seed=1, evaluation=True)


def test_a_wrong_split_of_a_file_evaluation_without_a_split_and_no_dataset_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}')
    with pytest.raises(DataError, match="only the split 'train', got 'test'"):
        rows_of(path, dataset_train_split="test")
    with pytest.raises(DataError, match="Set dataset_test_split"):
        load_rows(DataConfig(dataset_name=str(path)), seed=1, evaluation=True)
    with pytest.raises(DataError, match="set dataset_name"):
        load_rows(DataConfig(), seed=1)
    with pytest.raises(DataError, match="dataset_kwargs are options of a generated task"):
        rows_of(path, dataset_kwargs={"size": 3})


def test_a_stream_and_a_string_are_no_datasets():
    with pytest.raises(DataError, match=r"must have a length.*is a stream"):
        load_rows(DataConfig(), seed=1, dataset=iter(ROWS))
    with pytest.raises(DataError, match=r"must be a name, a datasets\.Dataset or a list of dicts, got int"):
        load_rows(DataConfig(), seed=1, dataset=3)


def mixture(tmp_path, *sources, **options):
    for name, rows in (("one", ROWS), ("two", [{"prompt": f"x{i}"} for i in range(4)])):
        write(tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
    given = [{**source, "path": str(tmp_path / source["path"])} for source in sources]
    return DataConfig(**{"datasets": given, "mixture_stopping": "all_exhausted_without_replacement", **options})


def test_a_mixture_draws_all_rows_and_names_each_by_its_place_in_its_source(tmp_path):
    config = mixture(tmp_path, {"path": "one.jsonl"}, {"path": "two.jsonl", "weight": 3.0})
    found = load_rows(config, seed=3)
    assert sorted(row["prompt"] for row in found.rows) == ["a", "b", "x0", "x1", "x2", "x3"]
    for index, row in enumerate(found.rows):
        origin = found.origin(index)
        assert found.where(index) == f"Row {origin.number} of {origin.name}"
        source = next(source for source in found.sources if source.name == origin.name)
        assert source.rows[origin.number] == row
    assert found.columns == ("prompt", "answer")
    orders = {tuple(row["prompt"] for row in load_rows(config, seed=seed).rows) for seed in range(5)}
    assert len(orders) > 1
    assert [row["prompt"] for row in load_rows(config, seed=3).rows] == [row["prompt"] for row in found.rows]


def test_a_mixture_keeps_the_columns_that_are_named(tmp_path):
    found = load_rows(mixture(tmp_path, {"path": "one.jsonl", "columns": ["prompt"]}, {"path": "two.jsonl"}), seed=0)
    assert all(set(row) == {"prompt"} for row in found.rows)
    with pytest.raises(DataError, match=r"must have the column 'anser', .* Did you mean 'answer'"):
        load_rows(mixture(tmp_path, {"path": "one.jsonl", "columns": ["anser"]}), seed=0)


def test_a_dataset_may_be_in_a_mixture_twice(tmp_path):
    found = load_rows(mixture(tmp_path, {"path": "one.jsonl"}, {"path": "one.jsonl"}), seed=0)
    assert len(found.rows) == 4
    assert len({source.name for source in found.sources}) == 2


def test_a_mixture_is_held_out_by_a_split_of_its_own(tmp_path):
    config = mixture(tmp_path, {"path": "one.jsonl", "split": "train"})
    with pytest.raises(DataError, match="Evaluation needs held-out rows"):
        load_rows(config, seed=0, evaluation=True)
    with pytest.raises(DataError, match="dataset_name must be left out where datasets are named"):
        load_rows(mixture(tmp_path, {"path": "one.jsonl"}, dataset_name="x"), seed=0)


def test_prompts_come_from_mixtures_too(tmp_path):
    from trl_ray.config.sections import PromptConfig
    from trl_ray.data.prompts.prompt_source import load_prompts

    class Letters:
        chat_template = None

        def __call__(self, texts, *, add_special_tokens):
            return {"input_ids": [list(map(ord, text)) for text in texts]}

    given = mixture(tmp_path, {"path": "one.jsonl"}, {"path": "two.jsonl"}).model_dump()
    source = load_prompts(PromptConfig(**given), Letters(), seed=0, max_prompt_tokens=None)
    assert sorted(source.prompt(i).text for i in range(6)) == ["a", "b", "x0", "x1", "x2", "x3"]
    with pytest.raises(DataError, match=r"Row 0 of .*two.jsonl must have at most 1 tokens"):
        load_prompts(PromptConfig(**given), Letters(), seed=0, max_prompt_tokens=1)
    with pytest.raises(DataError, match=r"two.jsonl must have the prompt column 'answer'"):
        load_prompts(PromptConfig(**given, dataset_prompt_column="answer"), Letters(), seed=0, max_prompt_tokens=None)


def joined(tmp_path, *sources, **options):
    """A file of 2 rows, another of 4, as TRL's `datasets` names them."""
    return mixture(tmp_path, *sources, mixture_stopping=None, **options)


def shown(rows):
    return [row["prompt"] for row in rows.rows]


def test_datasets_are_joined_whole_one_after_the_other_unless_shares_are_asked_for(tmp_path):
    found = load_rows(joined(tmp_path, {"path": "one.jsonl"}, {"path": "two.jsonl"}), seed=3)
    assert shown(found) == ["a", "b", "x0", "x1", "x2", "x3"]
    assert found.notes == ()
    assert found.where(2) == f"Row 0 of {tmp_path}/two.jsonl"


def test_fractions_are_shares_of_the_mixture_and_what_they_leave_is_counted(tmp_path):
    config = joined(tmp_path, {"path": "one.jsonl", "fraction": 1}, {"path": "two.jsonl", "fraction": 1})
    found = load_rows(config, seed=3)
    assert shown(found) == ["a", "b", "x0", "x1"]  # 2 rows of each: more of the second would repeat the first
    assert found.notes == (f"2 of 4 rows of {tmp_path}/two.jsonl are in no place of the mixture (fraction).",)
    with pytest.raises(DataError, match=r"fraction of .*one.jsonl must leave at least one of its rows, 0.01 leaves"):
        uneven = joined(tmp_path, {"path": "one.jsonl", "fraction": 0.01}, {"path": "two.jsonl", "fraction": 0.99})
        load_rows(uneven, seed=3)


def test_a_fraction_for_some_datasets_alone_and_one_beside_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="fraction must be set for all datasets or for none, got it for 1 of 2"):
        DataConfig(datasets=[{"path": "a", "fraction": 0.5}, {"path": "b"}])
    with pytest.raises(ConfigError, match="fraction and weight"):
        DataConfig(datasets=[{"path": "a", "fraction": 0.5, "weight": 2.0}])


def test_rows_that_weights_never_draw_are_counted(tmp_path):
    config = joined(tmp_path, {"path": "one.jsonl", "weight": 9.0}, {"path": "two.jsonl", "weight": 1.0})
    found = load_rows(config, seed=3)
    lost = 6 - len(set(shown(found)))
    assert lost >= 3  # the first has 2 rows, and nine times the weight: it ends first
    said = [int(note.split()[0]) for note in found.notes]
    assert sum(said) == lost
    assert "all_exhausted_without_replacement takes every row once" in found.notes[0]


@pytest.mark.parametrize(("size", "held"), [(0.25, 2), (3, 3), (3.0, 3)])
def test_a_part_of_the_training_rows_is_held_out_and_is_not_trained(tmp_path, size, held):
    config = joined(tmp_path, {"path": "one.jsonl"}, {"path": "two.jsonl"}, test_split_size=size)
    train, test = (load_rows(config, seed=5, evaluation=evaluation) for evaluation in (False, True))
    assert (len(train.rows), len(test.rows)) == (6 - held, held)
    assert sorted([*shown(train), *shown(test)]) == ["a", "b", "x0", "x1", "x2", "x3"]
    assert shown(load_rows(config, seed=5, evaluation=True)) == shown(test)
    assert len({tuple(shown(load_rows(config, seed=seed, evaluation=True))) for seed in range(9)}) > 1
    for rows in (train, test):
        for index, row in enumerate(rows.rows):
            origin = rows.origin(index)
            assert next(part for part in rows.sources if part.name == origin.name).rows[origin.number] == row


def test_a_single_file_is_split_too_and_a_split_without_training_rows_is_refused(tmp_path):
    name = str(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"prompt": f"x{i}"}) for i in range(10))))
    config = DataConfig(dataset_name=name, test_split_size=0.2)
    train, test = (load_rows(config, seed=5, evaluation=evaluation) for evaluation in (False, True))
    assert (len(train.rows), len(test.rows)) == (8, 2)
    assert test.where(0) == f"Row {int(shown(test)[0][1:])} of {name}"
    with pytest.raises(DataError, match="test_split_size must leave rows to train on, got 10 with 10 rows"):
        load_rows(DataConfig(dataset_name=name, test_split_size=10), seed=5)
    with pytest.raises(DataError, match="test_split_size must be left out where rows are passed as an object"):
        load_rows(config, seed=5, dataset=ROWS)
    with pytest.raises(ConfigError, match="dataset_test_split must be left out with test_split_size"):
        DataConfig(dataset_name=name, test_split_size=10, dataset_test_split="test")
    with pytest.raises(ConfigError, match=r"test_split_size must be below 1 or a whole number of rows, got 1\.5"):
        DataConfig(dataset_name=name, test_split_size=1.5)


def test_a_builder_reads_the_files_that_are_named(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, ROWS)))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    found = load_rows(DataConfig(datasets=[{"path": "json", "data_files": files}]), seed=1)
    assert shown(found) == ["a", "b", "a", "b"]
    split = DataConfig(datasets=[{"path": "json", "data_files": {"train": files[0], "test": files}}])
    assert len(load_rows(split, seed=1).rows) == 2
    held_out = split.model_copy(update={"dataset_test_split": "test"})
    assert len(load_rows(held_out, seed=1, evaluation=True).rows) == 4
    alone = DataConfig(dataset_name="json", data_files=files)
    assert shown(load_rows(alone, seed=1)) == ["a", "b", "a", "b"]
    with pytest.raises(ConfigError, match="dataset_name must be set with data_files"):
        DataConfig(data_files=files)
    named = DataConfig(datasets=[{"path": str(tmp_path), "data_files": "two.jsonl"}])
    assert len(load_rows(named, seed=1).rows) == 2
