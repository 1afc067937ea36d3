"""How a command refuses wrong input: exit code 2, one message on stderr, and nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from trl_ray.cli.main import main


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_one_message(stderr: str, says: Sequence[str]) -> None:
    """Nothing but one message, which says what it must."""
    assert stderr.startswith("trl-ray: "), f"stderr must hold the message alone, got:\n{stderr}"
    assert stderr.count("trl-ray: ") == 1 and "Traceback" not in stderr, stderr
    for text in says:
        assert text in stderr, f"the message must say {text!r}, got:\n{stderr}"


def refuse(arguments: Sequence[str], says: Sequence[str], *, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command in this process and check that it does nothing but explain itself."""
    before = contents(folder)
    capsys.readouterr()
    code = main(list(arguments))
    shown = capsys.readouterr()
    assert_one_message(shown.err, says)
    assert code == 2, f"exit code must be 2, got {code}: {shown.err}"
    assert shown.out == "", f"stdout must be empty, got {shown.out!r}"
    assert contents(folder) == before
