"""Files are read lazily, from any row on, and what is damaged is named by line, byte or row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_ray.data.sources.dataset_files import FILE_TYPES, read_file
from trl_ray.errors import DataError

ROWS = [{"prompt": f"q{i}", "answer": str(i)} for i in range(25)]


def as_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    path.write_text("\r\n".join(lines) + "\r\n\r\n", encoding="utf-8-sig")


def as_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map("\t".join, (rows[0], *(row.values() for row in rows)))), encoding="utf-8")


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)


def as_arrow_file(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=4)


def as_arrow_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, max_chunksize=4)


WRITERS: list[tuple[str, Callable[[Path, list[dict[str, Any]]], None]]] = [
    ("a.json", as_json),
    ("a.jsonl", as_jsonl),
    ("a.ndjson", as_jsonl),
    ("a.csv", as_csv),
    ("a.tsv", as_tsv),
    ("a.parquet", as_parquet),
    ("a.arrow", as_arrow_file),
    ("a.arrow", as_arrow_stream),
]
EVERY_FILE = pytest.mark.parametrize(("name", "write"), WRITERS)


@EVERY_FILE
def test_rows_can_be_read_from_any_row_on(
    name: str, write: Callable[[Path, list[dict[str, Any]]], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, ROWS)
    for start in (0, 1, 3, 4, 11, 24, 25, 30):
        assert list(read_file(path, start)) == ROWS[start:]


LINES = b'{"a": "x"}\n{"a": "y"}\n'


def words(value: object) -> str:
    """Names of cases: what is packed differs from second to second, and processes must agree on them."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.jsonl", b'\xef\xbb\xbf [{"a": "x"},\n {"a": "y"}]'),
        ("a.csv", b"a;b\nx;1,5\ny;2\n"),
        ("a.csv", b"a\tb\r\nx\t1\r\ny\t2\r\n"),
        ("a.csv", b"a;b,c\nx,1\ny,2\n"),
        ("a.csv", b"a,b\nx," + b"long" * 50_000 + b"\ny,2\n"),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.bz2", bz2.compress(b'[{"a": "x"}, {"a": "y"}]')),
        ("a.csv.xz", lzma.compress(b"a\nx\ny\n")),
    ],
    ids=words,
)
def test_rows_are_read_however_the_file_is_called_cut_or_packed(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    rows = [row.get("a", row.get("a;b")) for row in read_file(tmp_path / name)]
    assert rows == ["x", "y"]
    assert list(read_file(tmp_path / name, 1)) == list(read_file(tmp_path / name))[1:]


def test_a_file_packed_with_zstandard_is_read(tmp_path: Path) -> None:
    import pyarrow

    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True))
    assert list(read_file(tmp_path / "a.jsonl.zst", 1)) == [{"a": "y"}]


def test_every_type_of_file_is_tested() -> None:
    assert {f".{name.partition('.')[2]}" for name, _ in WRITERS} == set(FILE_TYPES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "x\xff"}', r"line 2 has 0xff at byte 8 of the line, invalid start byte"),
        ("a.json", b'[{"a": 1},\n{"a": "\xc3"}]', r"line 2 has 0xc3 at byte 7 of the line, invalid continuation"),
        ("a.csv", b"a,b\n1,\xe9\n", r"line 2 has 0xe9 at byte 2 of the line"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', r"Row 1 of .* must be an object with columns, got \[2\]"),
        ("a.json", b'[{"a": 1}, 7]', r"Row 1 of .* must be an object with columns, got int 7"),
        ("a.csv", b"a,b\n1,2\n\n3\n", r"Row 1 of .* \(line 4\) must have 2 fields, .* got 1: the field 'b' is missing"),
        ("a.csv", b"a,b\n1,2,3\n", r"Row 0 of .* must have 2 fields, .*\(a, b\), got 3: '3' belongs to no column"),
        ("a.csv", b'a,b\n1,"2\n', r"must be a comma-separated table, line 2 is broken: unexpected end of data"),
        ("a.csv", b"a,a\n1,2\n", r"must name every column once, got 'a' more than once"),
        ("a.parquet", b"", r"must be a whole parquet file, it has no byte"),
        ("a.parquet", b"PAR1 but cut off", r"must be a whole parquet file, reading stopped before row 0"),
        ("a.arrow", b"", r"must be a whole arrow file, it has no byte"),
        ("a.arrow", b"ARROW1 but cut off", r"must be a whole arrow file, reading stopped before row 0"),
        ("a.arrow", b"neither nor", r"must be a whole arrow file, reading stopped before row 0"),
        ("a.jsonl", b'{"a": 1, "b": {"c": 1, "c": 2}}', r"must name every column of a row once, line 1 has 'c' twice"),
        ("a.json", b'[{"a": 1, "a": 2}]', r"must name every column of a row once, got 'a' twice"),
        (
            "a.json",
            b'{"data": [{"a": 1}]}',
            r"must be a JSON list of objects, got a dict. Write the list that it holds as 'data' alone",
        ),
        ("a.jsonl.gz", b"no gzip", r"must be readable: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-20], r"must be readable: Compressed file ended before"),
        ("a.jsonl.zst", b"neither", r"must be readable: .*ZSTD"),
        ("a.txt", b"", r"must end in \.json, \.jsonl, .* got '.*a\.txt'.* dataset_name=text .* data_files=.*a\.txt"),
        ("a.txt.gz", b"", r"must end in \.json, \.jsonl, .* got '.*a\.txt\.gz'"),
    ],
    ids=words,
)
def test_a_damaged_file_is_told_with_the_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_file(tmp_path / name))


def test_a_parquet_file_that_is_damaged_inside_names_the_row_that_was_not_reached(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    as_parquet(path, [{"prompt": f"q{i}" * 50} for i in range(25)])
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 200] = b"\xff" * 200
    path.write_bytes(bytes(content))
    rows = []
    with pytest.raises(DataError, match=r"must be a whole parquet file, reading stopped before row \d+") as caught:
        for row in read_file(path):
            rows.append(row)
    assert f"before row {len(rows)}:" in str(caught.value)


def test_an_arrow_stream_that_is_cut_off_names_the_row_that_was_not_reached(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    as_arrow_stream(path, ROWS)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"must be a whole arrow file, reading stopped before row 2[0-4]"):
        list(read_file(path))


def test_text_of_a_parquet_file_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    broken = pyarrow.array([b"fine", b"\xff"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"prompt": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"must hold UTF-8 text, one of the rows from 0 on does not: invalid start"):
        list(read_file(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("value", "said"), [("[" * 99999, "nested too deeply"), ("1" * 5000, "too many digits")])
def test_json_that_cannot_be_held_names_its_line(value: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"a": {value}}}\n', encoding="utf-8")
    with pytest.raises(DataError, match=f"line 2 is broken at column 1: .*{said}"):
        list(read_file(path))


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nbroken\n{"a": 2}\n', encoding="utf-8")
    assert next(read_file(path)) == {"a": 1}
    assert list(read_file(path, 2)) == [{"a": 2}]
    with pytest.raises(DataError, match="line 2 is broken at column 1"):
        list(read_file(path))
