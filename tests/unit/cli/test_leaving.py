"""The exit code of a command is its run's, whatever happens while Python ends."""

import subprocess
import sys

import pytest

HANGS = "import atexit, time; from trl_ray.cli import leaving; leaving._END_S = 0.2; atexit.register(time.sleep, 60)\n"


@pytest.mark.parametrize(
    ("program", "code"),
    [
        (HANGS + "leaving.leave(0, at_once=False); print('over')", 0),
        (HANGS + "leaving.leave(3, at_once=False); raise SystemExit(3)", 3),
        (HANGS + "print('over'); leaving.leave(130, at_once=True); print('not reached')", 130),
        (
            HANGS + "from trl_ray.runtime.ray_thread import leave_ray_behind; leave_ray_behind()\n"
            "leaving.leave(0, at_once=False); print('not reached')",
            0,
        ),
        (
            "import atexit; from trl_ray.cli.leaving import leave\n"
            "def fails(): raise RuntimeError('Ray is gone')\n"
            "atexit.register(fails); leave(0, at_once=False)",
            0,
        ),
    ],
)
def test_the_code_is_that_of_the_run_where_the_end_of_python_hangs_or_fails(program: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == code, ended.stderr
    assert "not reached" not in ended.stdout
