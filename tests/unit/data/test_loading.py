import json

import pytest

from trl_ray.config.sections import DataConfig
from trl_ray.data.loading import load_rows
from trl_ray.errors import DataError

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
    for suffix in ("json", "jsonl", "csv", "parquet"):
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
        ("a.json", '{"a": 1}\n{"a": 2}', "rename the file"),
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
    with pytest.raises(DataError, match=r"must be UTF-8 text: invalid start byte"):
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
