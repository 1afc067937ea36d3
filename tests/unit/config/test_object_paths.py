"""Which paths name one object, and what is found by the names that installed packages give."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from trl_ray.config.object_paths import find_plug_in, is_same_object, real_path
from trl_ray.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder one is in, beside ``other``: each has a ``mine.py``, and ``link.py`` leads to that of ``other``."""
    for name in ("here", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").touch()
    (tmp_path / "here" / "link.py").symlink_to(tmp_path / "other" / "mine.py")
    monkeypatch.chdir(tmp_path / "here")
    return (tmp_path / "here").resolve()


@pytest.mark.parametrize(
    ("written", "used", "is_same"),
    [
        ("grpo", "grpo", True),
        ("grpo", "rloo", False),
        ("package.module:A", "package.module:A", True),
        ("package.module:A", "module:A", False),
        ("mine.py:A", "./mine.py:A", True),
        ("mine.py:A", "../here/mine.py:A", True),
        ("mine.py:A", "{folder}/mine.py:A", True),
        ("{folder}/mine.py:A", "mine.py:A", True),
        ("../other/mine.py:A", "link.py:A", True),
        # Written in a file of the other folder, where that is its path.
        ("mine.py:A", "../other/mine.py:A", True),
        ("other/mine.py:A", "../other/mine.py:A", True),
        ("{folder}/mine.py:A", "../other/mine.py:A", False),
        ("elsewhere/mine.py:A", "mine.py:A", False),
        ("mine.py:A", "mine.py:B", False),
        ("ne.py:A", "mine.py:A", False),
        ("mine.py:A", "mine:A", False),
        ("grpo", "mine.py:A", False),
    ],
)
def test_paths_of_one_object_may_be_spelled_differently(folder: Path, written: str, used: str, is_same: bool) -> None:
    assert is_same_object(written.format(folder=folder), used.format(folder=folder)) is is_same


def test_only_the_path_of_a_file_is_made_to_hold_in_every_folder(folder: Path) -> None:
    assert real_path("../here/mine.py:A.b") == f"{folder}/mine.py:A.b"
    assert real_path("link.py:A") == f"{folder.parent}/other/mine.py:A"
    assert [real_path(same) for same in ("grpo", "package.module:A")] == ["grpo", "package.module:A"]


def test_an_entry_point_gives_a_name_to_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [EntryPoint("joined", "posixpath:join", "some.group")]
    monkeypatch.setattr(
        "trl_ray.config.object_paths.entry_points", lambda *, group: given if group == "some.group" else []
    )
    assert find_plug_in("joined", group="some.group", what="loss")("a", "b") == "a/b"
    assert find_plug_in("posixpath:join", group="none.given", what="loss")("a", "b") == "a/b"
    with pytest.raises(
        ConfigError, match=r"loss must be one of x, y, or package.module:Class.*some.group \(joined\), got 'z'"
    ):
        find_plug_in("z", group="some.group", what="loss", built_in=("x", "y"))
    with pytest.raises(ConfigError, match=r"loss must be package.module:Class.*none.given, got 'joined'"):
        find_plug_in("joined", group="none.given", what="loss")
