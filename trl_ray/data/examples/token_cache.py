"""Tokenises a dataset once: on several processes where that is asked for, and kept on disk for later starts.

    key: rows, readers, rules, tokenizer, code ─► a whole folder of that name ─ there ──────────────────────► mapped
                                                     not there ─► datasets.map ─► another folder ─ renamed ─► mapped
    few rows, one process ─► in memory; nothing is kept

A folder has what `datasets.map` wrote, a file for each process, and a manifest that is written last. Rows and
tokenizer go to the processes by the fork, never by pickling.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trl_ray.data.examples import row_tokenisation
from trl_ray.data.examples.example_tasks import Making
from trl_ray.data.examples.row_tokenisation import RowTokeniser
from trl_ray.data.examples.token_table import SCHEMA, RowState, TokenTable
from trl_ray.data.examples.tokenisation import tokenizer_key
from trl_ray.data.sources.data_cache import cache_folder, code_key, folder_beside, put_folder
from trl_ray.data.sources.dataset_loading import Rows
from trl_ray.data.sources.row_sequences import combined_key, content_key
from trl_ray.errors import ResourceError

SMALL_ROWS = 5000
"""So many rows are tokenised in memory by one process, and not kept."""
_MANIFEST = "manifest.json"
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_LATER = ("tokenizer", "packing", "row_length", "mismatched")
"""What a task makes of tokens, once they are there; and the tokenizer, which has a key of its own."""
_forked: dict[int, tuple[RowTokeniser, Sequence[Mapping[str, Any]]]] = {}
_tickets = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptTokens:
    """The table of a dataset's rows, and where it is."""

    table: TokenTable
    place: str | None = None
    """None: in memory, or in a file that goes away with the process."""
    notes: tuple[str, ...] = ()


def tokenised(rows: Rows, tokeniser: RowTokeniser, *, processes: int | None) -> KeptTokens:
    """The table of all rows, from an earlier start where it was made then.

    Args:
        rows: of a dataset or mixture.
        tokeniser: makes their tokens.
        processes: how many do so; None: this one alone. There are never more than there are batches.

    Raises:
        ModelError: see `RowTokeniser.table`.
        ResourceError: a process ended before its time.
    """
    total = len(rows.rows)
    work, told = _processes(processes, total)
    if total <= SMALL_ROWS and work == 1:
        return KeptTokens(table=TokenTable(tokeniser.table(rows.rows, range(total))), notes=told)
    folder = cache_folder("tokens")
    key = None if folder is None else _key(rows, tokeniser)
    place = None if folder is None or key is None else folder / key
    known = None if place is None else _open(place, total)
    if known is not None:
        return KeptTokens(table=TokenTable(known), place=f"taken from {place}", notes=told)
    return _make(rows, tokeniser, work=work, place=place, told=told)


def _processes(asked: int | None, total: int) -> tuple[int, tuple[str, ...]]:
    wanted = min(asked or 1, -(-total // row_tokenisation.BATCH_ROWS))
    if wanted < 2:
        return 1, ()
    from datasets.arrow_dataset import mp

    method = mp.get_start_method()
    if method != "fork":
        return 1, (
            f"dataset_num_proc={asked} needs processes that are forked, here they are started by {method}: rows were "
            "tokenised by one process.",
        )
    return wanted, ()


def _make(rows: Rows, tokeniser: RowTokeniser, *, work: int, place: Path | None, told: tuple[str, ...]) -> KeptTokens:
    try:
        with _folder_beside(place) as made:
            parts = _map(rows, tokeniser, made / "tokens.arrow", work=work)
            table = TokenTable(_mapped(parts))
            if place is None or (table.column("state") == RowState.BROKEN).any():
                return KeptTokens(table=table, notes=told)
            return _kept(table, parts, place, told)
    except OSError as error:  # the disk is full, or not to be written to
        table = TokenTable(tokeniser.table(rows.rows, range(len(rows.rows))))
        return KeptTokens(table=table, notes=(*told, _unkept(place or tempfile.gettempdir(), str(error))))


def _kept(table: TokenTable, parts: Sequence[Path], place: Path, told: tuple[str, ...]) -> KeptTokens:
    """Give what is made its place, where that is possible."""
    made = parts[0].parent
    kept = KeptTokens(table=table, place=f"kept in {place}", notes=told)
    try:
        if made.parent != place.parent:
            raise PermissionError("it cannot be written")
        if _open(place, len(table)) is not None:  # another run was faster, and may read it
            return kept
        manifest = [{"name": path.name, "bytes": path.stat().st_size} for path in parts]
        (made / _MANIFEST).write_text(json.dumps({"parts": manifest}), encoding="utf-8")
        put_folder(made, place)
    except OSError as error:
        if _open(place, len(table)) is not None:  # put there meanwhile
            return kept
        return KeptTokens(table=table, notes=(*told, _unkept(place, str(error))))
    return kept


def _unkept(place: object, why: str) -> str:
    return (
        f"The tokens of the rows could not be kept in {place} ({why}), so that the next start makes them anew. Free "
        "space there, or name another folder by HF_DATASETS_CACHE."
    )


@contextmanager
def _folder_beside(place: Path | None) -> Iterator[Path]:
    """A new folder beside a place, or where that cannot be, among temporary files; it goes away unless it is renamed.

    What is mapped stays readable after its file is gone.
    """
    made = None
    if place is not None:
        try:
            made = folder_beside(place)
        except OSError:
            made = None
    made = made or Path(tempfile.mkdtemp(prefix="trl_ray-tokens-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


class _MapBatch:
    """What `datasets.map` calls; it holds a number alone, under which a forked process finds the rest."""

    def __init__(self, ticket: int) -> None:
        self._ticket = ticket

    def __call__(self, batch: Mapping[str, list[int]]) -> pa.Table:
        tokeniser, rows = _forked[self._ticket]
        return tokeniser.batch(rows, batch["place"])


def _map(rows: Rows, tokeniser: RowTokeniser, path: Path, *, work: int) -> list[Path]:
    """Tokenise all rows; the files that hold them, in order."""
    from datasets import Dataset, Features

    ticket = next(_tickets)
    _forked[ticket] = (tokeniser, rows.rows)
    places = Dataset.from_dict({"place": np.arange(len(rows.rows))})
    try:
        with _tokenizers_alone(work > 1):
            mapped = places.map(
                _MapBatch(ticket),
                batched=True,
                batch_size=row_tokenisation.BATCH_ROWS,
                remove_columns=["place"],
                features=Features.from_arrow_schema(SCHEMA),
                num_proc=work if work > 1 else None,
                cache_file_name=str(path),
                new_fingerprint=path.parent.name.strip(".")[:32],
                load_from_cache_file=False,
                desc=f"Tokenising {rows.name}"[:60],
            )
    except RuntimeError as error:
        if "subprocesses" not in str(error):
            raise
        raise ResourceError(
            f"All {work} processes that tokenise rows must live to the end, and one ended before, most often for lack "
            "of memory. Lower dataset_num_proc."
        ) from error
    finally:
        del _forked[ticket]
    return [Path(file["filename"]) for file in mapped.cache_files]


@contextmanager
def _tokenizers_alone(apart: bool) -> Iterator[None]:
    """Each tokenizer of several processes works on one thread; the environment is afterwards as it was."""
    environment, before = os.environ, os.environ.get(_PARALLELISM)
    if apart:
        os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003 - the library put a copy in its place
        if before is None:
            os.environ.pop(_PARALLELISM, None)
        else:
            os.environ[_PARALLELISM] = before


def _mapped(parts: Sequence[Path]) -> pa.Table:
    """The tables of some files one behind the other, memory-mapped."""
    tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in parts]
    return pa.concat_tables(table.replace_schema_metadata(None) for table in tables)


def _open(place: Path, total: int) -> pa.Table | None:
    """What is kept at a place; None where nothing is, or it is not whole."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        parts = [(place / part["name"], part["bytes"]) for part in manifest["parts"]]
        if any(path.stat().st_size != size for path, size in parts):
            return None
        table = _mapped([path for path, _ in parts])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return table if table.num_rows == total and table.schema.names == SCHEMA.names else None


def _key(rows: Rows, tokeniser: RowTokeniser) -> str | None:
    """A hash of all that the table depends on; None where a part of it cannot be hashed."""
    readers = {name: repr(reader) for name, reader in tokeniser.readers.items()}
    tokens, content = tokenizer_key(tokeniser.tokenizer), content_key(rows.rows)
    return combined_key(code_key(), rows.name, readers, _options(tokeniser.making), tokens, content)


def _options(making: Making) -> str | None:
    """What a task is told about how tokens are made; None where that has no lasting form."""
    found = {field.name: getattr(making, field.name) for field in fields(making)}  # type: ignore[arg-type]
    told = repr((type(making).__name__, {name: value for name, value in found.items() if name not in _LATER}))
    return None if " object at 0x" in told else told
