"""Measures the chunked language-model head, forward and backward: peak memory and time, against two others.

    full       log-softmax and entropy of logits [N, V], in plain torch
    trl        TRL 1.16's chunked kernel, in tiles of 32768 words as its trainers set
    trl_ray    trl_ray.algorithms.head.logprobs

    this process --spawns, in turn--> one child per contender and repeat --its last line, JSON--> figures

Each computes log-probs and entropies of N tokens and the gradients of hidden states and weight, of a loss of both
(or, with --entropy value, of the log-probs alone). Counted as peak memory is what the process takes at its highest,
less what it takes once hidden states, weight, targets and the memory of both gradients are there: what a head needs
on top of what no head can do without. On a CPU that is resident memory (ru_maxrss), on CUDA
torch.cuda.max_memory_allocated. Time is the best of the repeats, in which the contenders take turns, so that a busy
moment of the machine does not fall on one alone. The processes' own CPU time is told as well: it depends less on what
else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "measurement:"
FULL, TRL, OURS = "full", "trl", "trl_ray"
TRL_CHUNK = 32_768
FULL_BYTES = 20
"""What full logits take at their peak, for each token and word: five float32 copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one child measures; travels to it as JSON."""

    system: str
    device: str
    dtype: str
    tokens: int
    hidden: int
    vocab: int
    chunk_size: int | None
    entropy: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one child found."""

    peak_bytes: float
    """On top of inputs and gradients."""
    absolute_bytes: float
    """All of it."""
    seconds: float
    cpu_seconds: float
    value: float
    """The loss, and the norm of the gradients: all contenders must agree on them."""
    grad_norm: float


class Meter:
    """Memory in bytes now and at its highest."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"

    def now(self) -> float:
        """Taken now."""
        import torch

        if self._on_cuda:
            return float(torch.cuda.memory_allocated())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))

    def highest(self) -> float:
        """The highest so far."""
        import torch

        if self._on_cuda:
            return float(torch.cuda.max_memory_allocated())
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        import torch

        if self._on_cuda:
            torch.cuda.synchronize()


def outputs(settings: Settings, hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any]:
    """Log-probs [N] and entropies [N] by one contender."""
    import torch

    if settings.system == FULL:
        log_p = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
        return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    if settings.system == TRL:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        arguments = (hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
        found = ChunkedLogProbFunction.apply(*arguments)
        return found[0], found[1]
    from trl_ray.algorithms.head.logprobs import token_logprobs

    scores = token_logprobs(hidden, weight, targets, temperature=1.0, chunk_size=settings.chunk_size)
    return scores.logprobs, scores.entropy


def run(settings: Settings, hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any]:
    """Loss and gradients of hidden states and weight."""
    import torch

    logprobs, entropy = outputs(settings, hidden, weight, targets)
    loss = -logprobs.mean()
    if settings.entropy == "gradient":
        loss = loss - 0.01 * entropy.mean()
    return loss.detach(), torch.autograd.grad(loss, (hidden, weight))


def inputs(settings: Settings, tokens: int) -> tuple[Any, Any, Any]:
    """Hidden states, weight and targets of a model that is neither sure nor clueless."""
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    hidden = torch.randn(tokens, settings.hidden, device=settings.device).to(dtype).requires_grad_()
    weight = torch.randn(settings.vocab, settings.hidden, device=settings.device).mul_(0.08).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, settings.vocab, (tokens,), device=settings.device)


def measure(settings: Settings) -> Measurement:
    """One contender, in this process."""
    import torch

    torch.set_num_threads(settings.threads)
    meter = Meter(settings.device)
    # Libraries, kernels and thread pools come into memory with the first call: a small one that is not measured.
    small = dataclasses.replace(settings, vocab=TRL_CHUNK // 8)
    run(small, *inputs(small, 16))
    hidden, weight, targets = inputs(settings, settings.tokens)
    # The gradients' own memory: touched, told, and given back for the measured call to take.
    room = [torch.zeros_like(tensor).add_(1) for tensor in (hidden, weight)]
    meter.wait()
    base = meter.now()
    del room
    started, cpu = time.perf_counter(), time.process_time()
    loss, grads = run(settings, hidden, weight, targets)
    meter.wait()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    highest = meter.highest()
    return Measurement(
        peak_bytes=highest - base,
        absolute_bytes=highest,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        value=float(loss),
        grad_norm=float(sum(float(grad.float().norm()) for grad in grads)),
    )


def run_child(settings: Settings) -> Measurement:
    """Measure in a fresh process.

    Raises:
        SystemExit: the child failed; its output has been shown.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(dataclasses.asdict(settings))]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        output.seek(0)
        text = output.read()
    found = [line for line in text.splitlines() if line.startswith(MARK)]
    if process.returncode != 0 or not found:
        sys.stderr.write(text)
        raise SystemExit(f"{settings.system} ended with {process.returncode} and no measurement; its output is above.")
    return Measurement(**json.loads(found[-1].removeprefix(MARK)))


def best(repeats: Sequence[Measurement]) -> Measurement:
    """The shortest times and the median peak of several repeats."""
    order = sorted(repeats, key=lambda found: found.peak_bytes)
    return dataclasses.replace(
        order[len(order) // 2],
        seconds=min(found.seconds for found in repeats),
        cpu_seconds=min(found.cpu_seconds for found in repeats),
    )


def compare(base: Settings, systems: Sequence[str], full_tokens: int, repeats: int) -> dict[str, Measurement]:
    """Every contender, in turn, `repeats` times; full logits for as many tokens as they are given."""
    found: dict[str, list[Measurement]] = {system: [] for system in systems}
    for _ in range(repeats):
        for system in systems:
            tokens = full_tokens if system == FULL else base.tokens
            found[system].append(run_child(dataclasses.replace(base, system=system, tokens=tokens)))
            last = found[system][-1]
            print(
                f"{system}, {tokens} tokens: {last.seconds:.2f} s ({last.cpu_seconds:.2f} s of CPU), "
                f"{last.peak_bytes / 2**20:.0f} MiB on top of inputs and gradients, "
                f"{last.absolute_bytes / 2**20:.0f} MiB in all; loss {last.value:.5f}, gradients {last.grad_norm:.5f}",
                flush=True,
            )
    return {system: best(values) for system, values in found.items()}


def affordable_tokens(base: Settings) -> int:
    """As many of the tokens as full logits may have without filling more than two thirds of the free memory."""
    if base.device == "cuda":
        import torch

        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tokens = base.tokens
    while tokens > 1 and tokens * base.vocab * FULL_BYTES > free * 2 / 3:
        tokens //= 2
    return tokens


def figures(base: Settings, full_tokens: int, found: dict[str, Measurement]) -> dict[str, float]:
    """What is printed last. Full logits measured for fewer tokens count in proportion: all they hold is [tokens, V]."""
    grown = base.tokens / full_tokens
    values: dict[str, float] = {"tokens": base.tokens, "full_tokens_measured": full_tokens}
    peaks = {name: one.peak_bytes * (grown if name == FULL else 1.0) for name, one in found.items()}
    for name, one in found.items():
        scale = grown if name == FULL else 1.0
        values[f"{name}_seconds"] = one.seconds * scale
        values[f"{name}_cpu_seconds"] = one.cpu_seconds * scale
        values[f"{name}_peak_mib"] = peaks[name] / 2**20
        values[f"{name}_absolute_mib"] = one.absolute_bytes / 2**20
    ours = found.get(OURS)
    if ours is not None:
        for name in (TRL, FULL):
            if name in found:
                values[f"ratio_time_vs_{name}"] = values[f"{name}_seconds"] / ours.seconds
                values[f"ratio_cpu_time_vs_{name}"] = values[f"{name}_cpu_seconds"] / ours.cpu_seconds
                values[f"ratio_memory_vs_{name}"] = peaks[name] / peaks[OURS]
    if "ratio_memory_vs_full" in values:
        values["ratio"] = values["ratio_memory_vs_full"]
    return values


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--full-tokens", type=int, help="fewer for full logits, where memory is short; default: as many as fit"
    )
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk-size", type=int, help="words in a tile of trl_ray's; default: what it takes itself")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--entropy", choices=["gradient", "value"], default="gradient", help="what is asked of it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[FULL, TRL, OURS], default=[OURS, TRL, FULL])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.tokens, args.repeats, args.threads, args.full_tokens or 1) < 1:
        parser.error("--tokens, --full-tokens, --repeats and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; a child measures one contender and prints JSON."""
    args = parse(argv)
    if args.child:
        print(f"\n{MARK}{json.dumps(dataclasses.asdict(measure(Settings(**json.loads(args.child)))))}", flush=True)
        return
    base = Settings(
        system=OURS,
        device=args.device,
        dtype=args.dtype,
        tokens=args.tokens,
        hidden=args.hidden,
        vocab=args.vocab,
        chunk_size=args.chunk_size,
        entropy=args.entropy,
        threads=args.threads,
    )
    full_tokens = args.full_tokens or affordable_tokens(base)
    found = compare(base, args.only, full_tokens, args.repeats)
    for name, value in figures(base, full_tokens, found).items():
        print(f"{name}: {value:.2f}" if value < 1000 else f"{name}: {value:.0f}")


if __name__ == "__main__":
    main()
