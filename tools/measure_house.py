"""Measures how hard a checkout is to read: sizes, import edges, names used twice, and what one training step touches.

    python tools/measure_house.py [--repo DIR] [--step [--list]]

Files and imports are read as text. `--step` also runs a tiny GRPO in this process (runtime.kind=local, the model of the
tests) and counts the package's files and functions that a steady step calls, in all threads.
"""

from __future__ import annotations

import argparse
import ast
import collections
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEP = """
import collections
import os, sys, threading
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
from pathlib import Path
import runs
from tiny_models import build_tiny_model
from trl_ray.pipelines.grpo import GRPOPipeline

touched, on = set(), False

def profile(frame, event, argument):
    if on and event == "call" and "/trl_ray/" in frame.f_code.co_filename:
        touched.add((frame.f_code.co_filename, frame.f_code.co_qualname))

class Watch:
    def on_step_begin(self, args, state, control, **kwargs):
        global on
        on = state.global_step == 2

threading.setprofile(profile)
sys.setprofile(profile)
folder = Path(sys.argv[2])
args = runs.grpo(build_tiny_model(folder / "model"), folder / "run", max_steps=4)
GRPOPipeline(args=args, train_dataset=runs.PROMPTS, callbacks=[Watch()]).train()
sys.setprofile(None)
files = collections.Counter(file for file, _ in touched)
print("measured", len(files), len(touched))
for file, count in sorted(files.items()):
    print("touched", count, file.rpartition("/trl_ray/")[2])
"""


def modules_of(repo: Path) -> dict[str, Path]:
    """Modules of the package by dotted name."""
    found = {}
    for path in sorted((repo / "trl_ray").rglob("*.py")):
        parts = path.relative_to(repo).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def edges_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules of the package each module imports when it is imported itself."""
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        edges[name] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for each in node.names:
                    full = f"{node.module}.{each.name}"
                    edges[name] |= {target for target in (full, node.module) if target in modules} - {name}
            elif isinstance(node, ast.Import):
                edges[name] |= {each.name for each in node.names if each.name in modules}
    return edges


def longest_chain(edges: dict[str, set[str]], start: str) -> int:
    """Modules on the longest way along imports from a module."""
    known: dict[str, int] = {}

    def longest(name: str, above: frozenset[str]) -> int:
        if name not in known:
            further = [longest(each, above | {name}) for each in edges[name] if each not in above]
            known[name] = 1 + max(further, default=0)
        return known[name]

    return longest(start, frozenset())


def measure_text(repo: Path) -> dict[str, float]:
    """What can be read off the files."""
    modules = modules_of(repo)
    files = [path for path in modules.values() if path.name != "__init__.py"]
    sizes = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    edges = edges_of(modules)
    stems = collections.Counter(path.stem for path in files)
    roots = collections.Counter(path.parent.name for path in files if path.parent.parent.name == "trl_ray")
    return {
        "files": len(files),
        "lines": sum(sizes),
        "lines_median": statistics.median(sizes),
        "lines_p90": sizes[int(0.9 * len(sizes))],
        "lines_max": sizes[-1],
        "import_edges": sum(map(len, edges.values())),
        "import_chain_from_cli": longest_chain(edges, "trl_ray.cli.main"),
        "base_names_used_twice": sum(count > 1 for count in stems.values()),
        "files_at_the_largest_root": max(roots.values()),
    }


def measure_step(repo: Path, *, list_files: bool) -> dict[str, float]:
    """What one steady step of a local GRPO run calls; on request its files, each with the functions called in it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", STEP, str(repo), folder]
        found = subprocess.run(command, capture_output=True, text=True, cwd=repo, check=False)
    lines = [line.split() for line in found.stdout.splitlines() if line.startswith("measured ")]
    if not lines:
        raise SystemExit(f"the run must end, but did not:\n{found.stdout}{found.stderr}")
    if list_files:
        print(
            *(line.removeprefix("touched ") for line in found.stdout.splitlines() if line.startswith("touched")),
            sep="\n",
        )
    return {"files_per_step": int(lines[0][1]), "functions_per_step": int(lines[0][2])}


def main() -> None:
    """Print one figure a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--step", action="store_true", help="run a tiny GRPO and count what a step calls")
    parser.add_argument("--list", action="store_true", help="with --step, name the files")
    args = parser.parse_args()
    figures = measure_text(args.repo) | (measure_step(args.repo, list_files=args.list) if args.step else {})
    for name, value in figures.items():
        print(f"{name}: {value:g}")


if __name__ == "__main__":
    main()
