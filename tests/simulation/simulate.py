"""The simulation as a command; its figures come last, one `name: value` a line, and violations make it fail.

python tests/simulation/simulate.py --faults 1000000     runs, one seed after the other, until so many faults
python tests/simulation/simulate.py --hours 24           one run of so many simulated hours
python tests/simulation/simulate.py --bugs               every planted bug, until a seed finds it
python tests/simulation/simulate.py --seed 17            one run again, with its history in --history
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from simulation.faults import DENSE, STORM, FaultPlan  # noqa: E402
from simulation.history_checker import Verdict, check_history, summary  # noqa: E402
from simulation.planted_bugs import BUGS, planted  # noqa: E402
from simulation.simulated_run import Played, Scene, play  # noqa: E402

HARSH_HOURS = 0.5


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where that is possible."""
    folder = Path(tempfile.mkdtemp(prefix="simulation-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def judged(scene: Scene) -> tuple[Played, Verdict]:
    """Play a scene and read its history."""
    with scratch() as folder:
        played = play(scene, folder)
    return played, check_history(played.history, played.rules)


def scene_of(seed: int) -> Scene:
    """One run of three has few faults and gets far, one has many, one has hardly anything else."""
    plan = (FaultPlan(), DENSE, STORM)[seed % 3]
    return Scene(seed=seed, plan=plan, hours=HARSH_HOURS if plan is not STORM else 2 * HARSH_HOURS)


def mostly_storms(seed: int) -> Scene:
    """For a great number of faults: of eight runs six are storms, with short steps."""
    if seed % 8 < 2:
        return replace(scene_of(seed), plan=(FaultPlan(), DENSE)[seed % 8])
    return Scene(seed=seed, plan=STORM, hours=2 * HARSH_HOURS, step_s=4, generate_s=2)


def seeds_to_find(name: str, most: int) -> tuple[int, str] | None:
    """How many seeds it took to find a planted bug, and by what; None when none did."""
    with planted(name):
        for seed in range(most):
            _, verdict = judged(scene_of(seed))
            if verdict.violations:
                return seed + 1, verdict.violations[0]
    return None


def many(faults: int, first: int) -> int:
    """Runs until so many faults have happened; the exit code."""
    counts: Counter[str] = Counter()
    verdicts: list[Verdict] = []
    begin, simulated, seed = time.perf_counter(), 0.0, first
    while counts.total() < faults:
        played, verdict = judged(mostly_storms(seed))
        counts.update(played.faults)
        simulated += played.simulated_s
        verdict.violations = [f"seed {seed}: {each}" for each in verdict.violations]
        verdicts.append(verdict)
        for each in verdict.violations:
            print(each, flush=True)
        seed += 1
        if seed % 20 == 0:
            print(f"# seed {seed}: {counts.total()} faults, {time.perf_counter() - begin:.0f} s", flush=True)
    return tell(counts, verdicts, simulated, time.perf_counter() - begin)


def tell(counts: Counter[str], verdicts: Sequence[Verdict], simulated: float, seconds: float) -> int:
    """Print the figures."""
    for kind, count in sorted(counts.items()):
        print(f"faults_{kind.replace(' ', '_').replace('-', '_')}: {count}")
    print(f"runs: {len(verdicts)}")
    print(f"simulated_hours: {simulated / 3600:.1f}")
    print(f"seconds: {seconds:.1f}")
    print(f"faults: {counts.total()}")
    found = summary(verdicts)
    for name, count in found.items():
        print(f"{name}: {count}")
    return int(found["violations"] > 0)


def bugs(most: int, names: Sequence[str]) -> int:
    """Every planted bug; the exit code."""
    missed = 0
    worst = 0
    for name in names:
        found = seeds_to_find(name, most)
        missed += found is None
        worst = max(worst, found[0] if found else 0)
        print(f"{name}: " + ("NOT FOUND" if found is None else f"seed {found[0]}, {found[1][:110]}"), flush=True)
    print(f"planted: {len(names)}")
    print(f"missed: {missed}")
    print(f"most_seeds: {worst}")
    return int(missed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--hours", type=float)
    parser.add_argument("--bugs", action="store_true")
    parser.add_argument("--only", help="part of the name of a planted bug")
    parser.add_argument("--most-seeds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--history", type=Path, help="where the history of one run is written")
    args = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    if args.bugs:
        return bugs(args.most_seeds, [name for name in BUGS if (args.only or "") in name])
    if args.faults is not None:
        return many(args.faults, args.seed)
    scene = scene_of(args.seed)
    if args.hours is not None:
        scene = Scene(seed=args.seed, plan=FaultPlan(), hours=args.hours)
    begin = time.perf_counter()
    played, verdict = judged(scene)
    if args.history is not None:
        args.history.write_text("\n".join(played.history), encoding="utf-8")
    for each in verdict.violations:
        print(each)
    return tell(Counter(played.faults), [verdict], played.simulated_s, time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
