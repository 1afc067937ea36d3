"""Log-probs of the reference on disk: resumable after a kill, safe for two runs, under a key of what they depend on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_models import build_tiny_model
from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.errors import ConfigError, ModelError, NumericsError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.companions import reference_cache
from trl_ray.models.companions.reference_cache import ReferenceCache, default_cache_dir, reference_key, token_digest
from trl_ray.models.policy_loading import load_policy
from trl_ray.types import TrainingSample

KEY = "ab" * 32


def test_what_was_put_is_known_and_the_rest_is_missing(tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path, KEY, 5)
    assert cache.missing().tolist() == [0, 1, 2, 3, 4] and cache.problem is None
    cache.put([3, 1], [-0.5, -2.25])
    assert cache.missing().tolist() == [0, 2, 4]
    again = ReferenceCache.open(tmp_path, KEY, 5)
    assert again.missing().tolist() == [0, 2, 4] and again.problem is None
    again.put(np.array([0, 2, 4]), np.array([-1, -3, -4], dtype=np.float32))
    assert cache.values().tolist() == [-1.0, -2.25, -3.0, -0.5, -4.0] and not len(cache.missing())
    assert cache.values().dtype == np.float32
    cache.put([], [])
    other = ReferenceCache.open(tmp_path, "cd" * 32, 5)
    assert len(other.missing()) == 5


def test_values_are_a_copy(tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path, KEY, 2)
    cache.values()[:] = 1.0
    assert len(cache.missing()) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_never_stored_and_its_row_named(tmp_path: Path, bad: float) -> None:
    cache = ReferenceCache.open(tmp_path, KEY, 9)
    with pytest.raises(NumericsError, match="row 7"):
        cache.put([2, 7, 8], [-1.0, bad, -1.0])
    assert len(cache.missing()) == 9


def test_indices_outside_are_a_broken_promise(tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path, KEY, 3)
    for indices, values in (([3], [-1.0]), ([-1], [-1.0]), ([0, 1], [-1.0])):
        with pytest.raises(AssertionError):
            cache.put(indices, values)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _garble(file: Path) -> None:
    file.write_bytes(b"\x00" * len(file.read_bytes()))


def _other_size(file: Path) -> None:
    np.save(file, np.zeros(3, dtype=np.float32))


def _other_kind(file: Path) -> None:
    np.save(file, np.zeros(4, dtype=np.float64))


def _pickle(file: Path) -> None:
    np.save(file, np.array([{}] * 4, dtype=object), allow_pickle=True)


def _infinite(file: Path) -> None:
    np.save(file, np.array([-1, -np.inf, -1, -1], dtype=np.float32))


@pytest.mark.parametrize("damage", [_truncate, _empty, _garble, _other_size, _other_kind, _pickle, _infinite])
def test_a_damaged_file_is_set_aside_told_and_begun_anew(tmp_path: Path, damage: Any) -> None:
    first = ReferenceCache.open(tmp_path, KEY, 4)
    first.put([0], [-1.0])
    del first
    path = tmp_path / f"{KEY}.npy"
    for number in (1, 2):
        damage(path)
        content = path.read_bytes()
        cache = ReferenceCache.open(tmp_path, KEY, 4)
        assert cache.problem is not None and str(path) in cache.problem and f"damaged-{number}" in cache.problem
        assert len(cache.missing()) == 4
        assert (tmp_path / f"{KEY}.npy.damaged-{number}").read_bytes() == content
    assert ReferenceCache.open(tmp_path, KEY, 4).problem is None


def test_nothing_but_the_file_its_lock_and_its_damaged_forerunners_is_left(tmp_path: Path) -> None:
    ReferenceCache.open(tmp_path, KEY, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{KEY}.npy", f"{KEY}.npy.lock"]


def _put_all(directory: Path, told: Connection) -> None:
    cache = ReferenceCache.open(directory, KEY, 100_000)
    for row in cache.missing():
        cache.put([row], [-float(row) - 1.0])
        told.send(int(row))


def test_a_killed_run_leaves_what_it_has_put_and_another_goes_on(tmp_path: Path) -> None:
    last = -1
    for _ in range(3):
        told, telling = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_put_all, args=(tmp_path, telling))
        process.start()
        telling.close()
        try:
            rows = [told.recv() for _ in range(21)]
        finally:
            process.kill()
            process.join()
        assert rows[0] in (last + 1, last + 2)  # a value may be there that was not told any more
        with contextlib.suppress(EOFError, OSError):
            while True:
                rows.append(told.recv())
        last = rows[-1]
    cache = ReferenceCache.open(tmp_path, KEY, 100_000)
    values, known = cache.values(), 100_000 - len(cache.missing())
    assert cache.problem is None and known >= last + 1 >= 63
    assert np.array_equal(values[:known], -np.arange(known) - 1.0)


def test_a_kill_while_the_file_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        ReferenceCache.open(tmp_path, KEY, 4)
    monkeypatch.undo()
    assert not (tmp_path / f"{KEY}.npy").exists()
    assert len(ReferenceCache.open(tmp_path, KEY, 4).missing()) == 4


def test_two_runs_that_open_the_same_key_at_once_share_one_file(tmp_path: Path) -> None:
    _garble_at = tmp_path / f"{KEY}.npy"
    _garble_at.write_bytes(b"\x00" * 300)
    opened: list[ReferenceCache] = []
    threads = [threading.Thread(target=lambda: opened.append(ReferenceCache.open(tmp_path, KEY, 64))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [cache.problem is not None for cache in opened].count(True) == 1
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    for number, cache in enumerate(opened):
        cache.put([number, 63], [-float(number) - 1.0, -9.0])
    for cache in opened:
        assert cache.values()[:8].tolist() == [-float(number) - 1.0 for number in range(8)]
        assert len(cache.missing()) == 64 - 9


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="ref_log_probs_cache_dir"):
        ReferenceCache.open(tmp_path / "file", KEY, 4)


def test_the_default_directory_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "trl_ray" / "reference"
    assert ReferenceCache.open(None, KEY, 1).path == tmp_path / "trl_ray" / "reference" / f"{KEY}.npy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "trl_ray" / "reference"


def _sample(prompt: list[int], completion: list[int], mask: list[bool]) -> TrainingSample:
    return TrainingSample(
        group_id=0,
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        loss_mask=np.array(mask),
    )


def test_the_digest_knows_every_token_mask_border_and_order() -> None:
    one, two = _sample([1, 2], [3, 4], [True, True]), _sample([5], [6], [True])
    digests = {
        token_digest(samples)
        for samples in (
            [one, two],
            [two, one],
            [one],
            [_sample([1], [2, 3, 4], [True, True, True]), two],
            [_sample([1, 2], [3, 4], [True, False]), two],
            [_sample([1, 2], [3, 7], [True, True]), two],
        )
    }
    assert len(digests) == 6
    assert token_digest(iter([one, two])) == token_digest([one, two])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("cache") / "tiny")


def test_the_key_is_of_contents_and_of_all_that_changes_numbers(tmp_path: Path, tiny: str) -> None:
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(tiny, copy)
    build_tiny_model(other, seed=1)

    def key(path: str | Path, *, tokens: str = "t", ld_alpha: float | None = None, **changes: Any) -> str:
        model = ModelConfig(model_name_or_path=str(path), **changes)
        return reference_key(model, tokens=tokens, ld_alpha=ld_alpha, directory=tmp_path / "cache")

    first = key(tiny)
    assert len(first) == 64 and first == key(copy) == key(tiny, gradient_checkpointing=False)
    (copy / "tokenizer_config.json").write_text("{}")
    assert key(copy) == first  # the tokens are in the key themselves
    others = [
        key(other),
        key(tiny, tokens="u"),
        key(tiny, ld_alpha=0.5),
        key(tiny, dtype=Dtype.BFLOAT16),
        key(tiny, bf16=True),
        key(tiny, attn_implementation="eager"),
    ]
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    others.append(key(copy))
    assert len({first, *others}) == 8


def test_an_adapter_that_training_starts_from_is_part_of_the_key(tmp_path: Path, tiny: str) -> None:
    pytest.importorskip("peft")

    def key(path: str | Path, **changes: Any) -> str:
        model = ModelConfig(model_name_or_path=str(path), use_peft=True, **changes)
        return reference_key(model, tokens="t", ld_alpha=None, directory=tmp_path / "cache")

    for number in (1, 2):
        (tmp_path / f"{number}").mkdir()
        model = ModelConfig(model_name_or_path=tiny, use_peft=True)
        save_adapter(load_policy(model, seed=number), tmp_path / f"{number}")
    assert len({key(tiny), key(tmp_path / "1"), key(tmp_path / "2")}) == 3
    # A new adapter is no part of the reference.
    whole = reference_key(ModelConfig(model_name_or_path=tiny), tokens="t", ld_alpha=None, directory=tmp_path / "cache")
    assert key(tiny) == key(tiny, lora_r=4) == whole


def test_files_are_hashed_once_until_they_change(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny, model_folder)
    model = ModelConfig(model_name_or_path=str(model_folder))
    read: list[str] = []
    plain = reference_cache.hashlib.file_digest

    def noted(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return plain(file, name)

    monkeypatch.setattr(reference_cache.hashlib, "file_digest", noted)

    def key() -> str:
        return reference_key(model, tokens="t", ld_alpha=None, directory=cache)

    first = key()
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert key() == first and len(read) == 2
    weights = model_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    stat = weights.stat()
    weights.write_bytes(bytes(content))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert key() != first and read[2:] == ["model.safetensors"]
    for note in (cache / "hashes").iterdir():
        note.write_text("{damaged")
    key()
    assert len(read) == 5


def test_a_model_that_is_not_there_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nobody/nothing"):
        reference_key(ModelConfig(model_name_or_path="nobody/nothing"), tokens="t", ld_alpha=None, directory=tmp_path)
