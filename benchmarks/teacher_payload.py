"""Measures how a teacher's scores travel: bytes per token and speed, against JSON and TRL v1.1's base64.

    json      lists of numbers, log-probs as Python writes them
    base64    TRL v1.1: base64 of float32 [B, C, K] and int32 [B, C, K], padded to the longest completion, in JSON
    trl_ray   trl_ray.wire.teacher_payload, in each of its number formats

    made-up scores of B completions --encode--> bytes --decode--> scores          for K in 1, 20, 100

All of them carry, for each token, K ids with their log-probs and the log-prob of the token itself; ours adds the
tail. Decoding ends with arrays; ours includes its checks. A gigabyte per second is 1e9 bytes of the payload, encoded
and decoded, in one second; the best of the repeats counts. The process's own CPU time is told as well: it depends less
on what else the machine does. By default all completions are equally long, so that what
others lose by padding is left out; with --ragged their lengths differ.
"""

from __future__ import annotations

import argparse
import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.types import TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.wire.teacher_answers import log_tail
from trl_ray.wire.teacher_payload import decode_scores, encode_scores

FORMATS = {
    "float32_int32": (PayloadDtype.FLOAT32, PayloadIds.INT32),
    "float16_int32": (PayloadDtype.FLOAT16, PayloadIds.INT32),
    "float16_compact": (PayloadDtype.FLOAT16, PayloadIds.COMPACT),
    "bfloat16_compact": (PayloadDtype.BFLOAT16, PayloadIds.COMPACT),
}
SMALLEST = "float16_compact"
"""The format that `ratio` is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What was asked and what was answered."""

    requests: list[TeacherRequest]
    scores: list[TeacherScores]
    question: TeacherQuestion

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(len(each.logprobs) for each in self.scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Of one way to carry one batch."""

    num_bytes: int
    seconds: float
    """Encoding and decoding."""
    cpu_seconds: float
    """What the process was given of them."""


def make_batch(lengths: Sequence[int], *, top_k: int, vocab_size: int, seed: int) -> Batch:
    """Scores that fall with the rank, slowly at some tokens and steeply at others, of which the teacher is certain."""
    rng = np.random.default_rng(seed)
    requests, scores = [], []
    for length in lengths:
        steepness = rng.choice([0.3, 8.0], (length, 1))
        logits = np.maximum(-np.cumsum(rng.gamma(1.0, steepness, (length, top_k + 1)), axis=1), -40)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        logprobs = logits[:, :top_k].astype(np.float32)
        ids = (rng.integers(0, vocab_size, (length, 1)) + 977 * np.arange(top_k)) % vocab_size
        requests.append(TeacherRequest(prompt_ids=np.ones(8, np.int32), completion_ids=ids[:, 0].astype(np.int32)))
        scores.append(
            TeacherScores(
                teacher="teacher",
                version=None,
                logprobs=logprobs[:, 0].copy(),
                top_ids=ids.astype(np.int32),
                top_logprobs=logprobs,
                tail=log_tail(logprobs),
            )
        )
    return Batch(
        requests=requests,
        scores=scores,
        question=TeacherQuestion(vocab_size=vocab_size, top_k=top_k, tail=True),
    )


def encode_json(batch: Batch) -> bytes:
    """Lists of numbers."""
    return json.dumps(
        {
            "logprobs": [each.top_logprobs.tolist() for each in batch.scores],
            "logprob_token_ids": [each.top_ids.tolist() for each in batch.scores],
            "actual_logprobs": [each.logprobs[:, None].tolist() for each in batch.scores],
            "actual_token_ids": [request.completion_ids[:, None].tolist() for request in batch.requests],
        }
    ).encode()


def decode_json(body: bytes) -> list[Any]:
    """Arrays again."""
    answer = json.loads(body)
    numbers = {"logprobs": np.float32, "actual_logprobs": np.float32, "logprob_token_ids": np.int32}
    return [np.asarray(piece, dtype=dtype) for name, dtype in numbers.items() for piece in answer[name]]


def encode_base64(batch: Batch) -> bytes:
    """TRL v1.1's response in its binary format."""
    sizes = [len(each.logprobs) for each in batch.scores]
    shape = (len(sizes), max(sizes), batch.question.top_k)
    logprobs, ids = np.full(shape, -np.inf, "<f4"), np.zeros(shape, "<i4")
    actual, actual_ids = np.full((*shape[:2], 1), -np.inf, "<f4"), np.zeros((*shape[:2], 1), "<i4")
    for row, (request, each) in enumerate(zip(batch.requests, batch.scores, strict=True)):
        logprobs[row, : sizes[row]] = each.top_logprobs
        ids[row, : sizes[row]] = each.top_ids
        actual[row, : sizes[row], 0] = each.logprobs
        actual_ids[row, : sizes[row], 0] = request.completion_ids
    arrays = {
        "logprobs_b64": logprobs,
        "token_ids_b64": ids,
        "actual_logprobs_b64": actual,
        "actual_token_ids_b64": actual_ids,
    }
    texts = {name: base64.b64encode(array.tobytes()).decode("ascii") for name, array in arrays.items()}
    return json.dumps({**texts, "shape": shape, "completion_lengths": sizes}).encode()


def decode_base64(body: bytes) -> list[Any]:
    """Arrays again, without the padding."""
    answer = json.loads(body)
    shape = answer["shape"]
    arrays = [
        np.frombuffer(base64.b64decode(answer[name]), dtype).reshape(*shape[:2], width)
        for name, dtype, width in (
            ("logprobs_b64", "<f4", shape[2]),
            ("token_ids_b64", "<i4", shape[2]),
            ("actual_logprobs_b64", "<f4", 1),
            ("actual_token_ids_b64", "<i4", 1),
        )
    ]
    return [array[row, :size] for array in arrays for row, size in enumerate(answer["completion_lengths"])]


def measure(encode: Callable[[], Any], decode: Callable[[Any], Any], repeats: int) -> Measurement:
    """The best of the repeats."""
    seconds, cpu_seconds, body = [], [], encode()
    decode(body)
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        decode(encode())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return Measurement(num_bytes=len(body), seconds=min(seconds), cpu_seconds=min(cpu_seconds))


def measure_ours(batch: Batch, name: str, repeats: int) -> Measurement:
    """One of our formats."""
    dtype, ids = FORMATS[name]
    return measure(
        lambda: encode_scores(batch.scores, question=batch.question, dtype=dtype, ids=ids),
        lambda body: decode_scores(body, teacher="teacher", requests=batch.requests, question=batch.question),
        repeats,
    )


def figures(batch: Batch, repeats: int) -> dict[str, float]:
    """All figures of one batch, by name."""
    found = {
        "json": measure(lambda: encode_json(batch), decode_json, 1),
        "base64": measure(lambda: encode_base64(batch), decode_base64, repeats),
        **{name: measure_ours(batch, name, repeats) for name in FORMATS},
    }
    prefix = f"k{batch.question.top_k}"
    named: dict[str, float] = {}
    for name, each in found.items():
        named[f"{prefix}_{name}_bytes_per_token"] = each.num_bytes / batch.tokens
        named[f"{prefix}_{name}_gb_per_s"] = each.num_bytes / each.seconds / 1e9
        named[f"{prefix}_{name}_gb_per_cpu_s"] = each.num_bytes / each.cpu_seconds / 1e9
    for name in FORMATS:
        named[f"{prefix}_base64_over_{name}"] = found["base64"].num_bytes / found[name].num_bytes
    return named


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 20, 100])
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest completion")
    parser.add_argument("--ragged", action="store_true", help="lengths spread evenly from a quarter of the longest")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.completions, args.length, args.repeats, *args.top_k) < 1:
        parser.error("--top-k, --completions, --length and --repeats must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    shortest = max(1, args.length // 4) if args.ragged else args.length
    lengths = np.linspace(shortest, args.length, args.completions).astype(int).tolist()
    named: dict[str, float] = {}
    for top_k in args.top_k:
        batch = make_batch(lengths, top_k=top_k, vocab_size=args.vocab, seed=args.seed)
        named.update(figures(batch, args.repeats))
    for name, value in named.items():
        print(f"{name}: {value:.3f}")
    ratios = [named[f"k{top_k}_base64_over_{SMALLEST}"] for top_k in args.top_k]
    print(f"ratio: {min(ratios):.2f}")


if __name__ == "__main__":
    main()
