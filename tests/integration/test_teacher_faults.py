"""Teachers are killed, stopped, and answer what cannot be true: nothing of it is trained on, and no run stalls.

on Ray      the teacher or the learner is killed or stopped --> the run ends all its steps
one process a real HTTP server misbehaves               --> groups are dropped by name, or the run stops and says why
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from runs import PROMPTS, Disturbance, assert_balanced, distill, events, ledger, lines, sdpo, values
from teacher_servers import Babble, Behaviour, Close, Drip, Hang, Reply, frame_answer, serving, vllm_answer
from tiny_models import VOCAB_SIZE, build_tiny_model, build_tokenizer
from trl_ray.cli.main import main
from trl_ray.errors import ModelError, NumericsError, TeacherError
from trl_ray.pipelines.distill import DistillPipeline
from trl_ray.pipelines.sdpo import SDPOPipeline
from trl_ray.types import TeacherScores
from trl_ray.wire.teacher_requests import decode_requests

pytestmark = pytest.mark.integration
RAY = {"kind": "ray", "health_interval_s": 0.3, "health_deadline_s": 4.0}
PROTOCOLS = ("trl_ray", "vllm")
ALLOWED = 6
"""Failed groups in a row of the runs that stop."""
COUNTS = [row["prompt"] for row in PROMPTS[:7]]
UNBEARABLE = "count to a hundred and one, slowly: "
"""A prompt that one teacher cannot score."""
Teach = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


# ---- actors --------------------------------------------------------------------------------------------------------


def newest_pid(run: Path, actor: str) -> int:
    """The process that an actor has now."""
    told = [*events(run, "actor_started"), *events(run, "actor_restarted")]
    return int([event["detail"]["pid"] for event in told if event["actor"] == actor][-1])


def hit(run: Path, target: str, how: signal.Signals, *, after_step: int) -> Disturbance:
    """A signal to one process of a run."""
    return Disturbance(run, after_step=after_step, act=lambda: os.kill(newest_pid(run, target), how))


def run_disturbed(model: str, run: Path, *hits: Disturbance, steps: int, **changes: Any) -> None:
    """A run of self-distillation on Ray that is hit, and ends all its steps nevertheless."""
    options: dict[str, Any] = {"max_steps": steps, "max_staleness": 2, "teacher": {"num_cpus": 0.5}, "runtime": RAY}
    output = SDPOPipeline(args=sdpo(model, run, **options, **changes), train_dataset=PROMPTS).train()
    assert all(each.done for each in hits), "the run was over before it could be disturbed"
    assert output.steps == len(lines(run / "metrics.jsonl")) == steps
    assert_balanced(run, trained=4 * steps)


def actors(run: Path, kind: str) -> list[str]:
    return [event["actor"] for event in events(run, kind)]


def told(run: Path, kind: str, actor: str) -> list[str]:
    """What events of one kind say of an actor."""
    return [event["detail"].get("detail", "") for event in events(run, kind) if event["actor"] == actor]


@pytest.mark.parametrize("kind", ["ema", "live"])
def test_a_killed_and_then_a_stopped_teacher_comes_back_with_its_weights(
    ray_local: Any, model: str, tmp_path: Path, kind: str
) -> None:
    run, name = tmp_path / "run", f"teacher-{kind}-0"
    # Without its teacher a run can end the steps whose groups are ready, which are fewer than lie between the two.
    killed, stopped = hit(run, name, signal.SIGKILL, after_step=4), hit(run, name, signal.SIGSTOP, after_step=12)
    run_disturbed(model, run, killed, stopped, steps=20, teacher_model_kind=kind, save_steps=3)
    assert actors(run, "actor_lost") == actors(run, "actor_restarted") == [name, name]
    assert len({event["detail"]["pid"] for event in events(run, "actor_lost") + events(run, "actor_restarted")}) == 3
    assert "must answer within" in events(run, "actor_lost")[1]["detail"]["reason"]
    pulled = [event for event in events(run, "weights_pulled") if event["actor"] == name]
    for lost in events(run, "actor_lost"):
        versions = [event["detail"]["version"] for event in pulled if event["time"] > lost["time"]]
        assert versions == sorted(versions) and versions[-1] == 20
    said = " ".join(told(run, "warning", name))
    # An average that had begun anew, from the policy as it is, would say so.
    assert "begins at version" not in said
    gaps = re.findall(r"its average goes on from version (\d+); version (\d+) stands in", said)
    assert said.count("average") == len(gaps) and (kind == "ema" or not said)
    assert all(int(kept) + 1 < int(newest) for kept, newest in gaps)


def test_a_killed_learner_takes_an_averaged_teacher_back_to_the_checkpoint(
    ray_local: Any, model: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_disturbed(model, run, hit(run, "learner", signal.SIGKILL, after_step=4), steps=12, save_steps=2)
    assert actors(run, "actor_lost") == ["learner"]
    [resumed] = events(run, "run_resumed")
    step = resumed["detail"]["step"]
    assert step >= 2
    pulled = [event for event in events(run, "weights_pulled") if event["actor"] == "teacher-ema-0"]
    after = [event["detail"]["version"] for event in pulled if event["time"] > resumed["time"]]
    assert after == list(range(step, 13))
    assert not told(run, "warning", "teacher-ema-0")
    average = load_file(run / "checkpoints" / "step-12" / "teacher" / "weights.safetensors")
    policy = load_file(run / "checkpoints" / "step-12" / "model.safetensors")
    assert any(not np.array_equal(average[name], policy[name]) for name in average.keys() & policy.keys())


# ---- servers -------------------------------------------------------------------------------------------------------


def teach(body: bytes) -> bytes:
    """A good answer, in whatever the server is asked in."""
    return vllm_answer(body, vocab_size=VOCAB_SIZE) if body.startswith(b"{") else frame_answer(body)


def spoilt(of_scores: Callable[[TeacherScores], Any], of_json: Callable[[dict[str, Any]], Any]) -> Teach:
    """A good answer but for one thing: of our own server's first scores, or of the first choice of vLLM's."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        of_json(answer["choices"][0])
        return answer

    def answer(body: bytes) -> bytes:
        if body.startswith(b"{"):
            return vllm_answer(body, vocab_size=VOCAB_SIZE, change=change)
        return frame_answer(body, lambda scores: [of_scores(scores[0]), *scores[1:]])

    return answer


def twice(body: bytes) -> bytes:
    """One completion more than was asked about."""
    if not body.startswith(b"{"):
        return frame_answer(body, lambda scores: [*scores, scores[0]])
    return vllm_answer(
        body,
        vocab_size=VOCAB_SIZE,
        change=lambda answer: {"choices": [*answer["choices"], {**answer["choices"][0], "index": 1}]},
    )


def nan(scores: TeacherScores) -> TeacherScores:
    return replace(scores, logprobs=np.full_like(scores.logprobs, np.nan))


def longer(scores: TeacherScores) -> TeacherScores:
    fields = ("logprobs", "top_ids", "top_logprobs", "tail")
    return replace(scores, **{name: np.concatenate([getattr(scores, name)] * 2) for name in fields})


def strange(scores: TeacherScores) -> TeacherScores:
    assert scores.top_ids is not None
    ids = scores.top_ids.copy()
    ids[-1, 0] = VOCAB_SIZE
    return replace(scores, top_ids=ids)


def nan_json(choice: dict[str, Any]) -> None:
    for known in choice["prompt_logprobs"][-1].values():
        known["logprob"] = float("nan")


def strange_json(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][-1][str(VOCAB_SIZE)] = {"logprob": -9.0, "rank": 0}


WRONG: dict[str, tuple[Behaviour, str]] = {
    "HTTP 500": (Reply(status=500, body=b"out of order"), "HTTP 500: out of order"),
    "HTTP 404": (Reply(status=404, body=b"no such thing"), "refused the request with 404: 'no such thing'"),
    "NaN": (spoilt(nan, nan_json), "logprobs: must be"),
    "one too many": (twice, "got "),
    "length": (spoilt(longer, lambda choice: choice["prompt_logprobs"].append(None)), "completion 0"),
    "vocabulary": (spoilt(strange, strange_json), f"must be ids of a vocabulary of {VOCAB_SIZE}, got {VOCAB_SIZE}"),
    "garbage": (Reply(body=b"\x00\x01\xff garbage"), "must h"),
    "no HTTP": (Babble(), "BadStatusLine"),
    "closes": (Close(), "RemoteDisconnected"),
    "drips": (Drip(), "within 0.3 s"),
    "hangs": (Hang(), "within 0.3 s"),
}
SLOW = ("drips", "hangs")


def taught_by(url: str, protocol: str, **changes: Any) -> dict[str, Any]:
    """Options: four prompts a step, and a teacher that is asked twice about each."""
    server = {"url": url, "protocol": protocol, "retry_delay_s": 0.01}
    if protocol == "vllm":
        server["model"] = "judge"
    teacher = {"name": "judge", "server": server, "timeout_s": 10.0, "max_attempts": 2}
    return {
        "reward_funcs": [],
        "num_generations": 1,
        "teachers": [{**teacher, "max_failures_in_a_row": ALLOWED, **changes}],
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "loss_top_k": 8,
        "max_attempts": 1,
        "max_steps": 2,
    }


def write_config(model: str, folder: Path, *, prompts: Sequence[str] = COUNTS, **changes: Any) -> Path:
    """The configuration and the dataset of a run, as files."""
    rows, file = folder / "rows.jsonl", folder / "run.yaml"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    file.write_text(yaml.safe_dump(values(model, folder / "run", dataset_name=str(rows), **changes)))
    return file


def assert_stopped(folder: Path, message: str, *, says: str) -> None:
    """A run ended because of its teacher: it said so, and trained on nothing."""
    run = folder / "run"
    assert "TeacherError" in message and "Traceback" not in message
    assert f"fewer than {ALLOWED} groups in a row may lose their teacher (max_failures_in_a_row)" in message
    assert "Bring the teacher back, then resume." in message and "trl-ray resume" in message
    failed, dropped = events(run, "teacher_failed"), events(run, "group_dropped")
    # Those that were under way when the last one failed may have failed, too.
    assert ALLOWED <= len(failed) <= ALLOWED + 16
    for event in failed:
        detail = event["detail"]["detail"]
        assert "teacher judge" in detail and says in detail and "asked 2 times" in detail, detail
    assert {event["detail"]["reason"] for event in dropped} == {"teacher_failed"}
    assert len(dropped) == len(failed)
    assert not lines(run / "metrics.jsonl") and not list((run / "checkpoints").glob("step-*"))
    assert events(run, "run_failed") and not events(run, "run_finished")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_run_whose_teacher_answers_nothing_that_can_be_true_stops_and_trains_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, protocol: str
) -> None:
    behaviour, says = WRONG[wrong]
    changes = {"timeout_s": 0.3} if wrong in SLOW else {}
    with serving(behaviour) as server:
        config = write_config(model, tmp_path, **taught_by(server.url, protocol, **changes))
        assert main(["distill", "--config", str(config)]) == 3
    assert_stopped(tmp_path, capsys.readouterr().err, says=says)


def test_a_run_whose_teacher_is_not_there_stops_and_trains_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        # Bound but not listening: nobody else can take the port, and nobody answers there.
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        config = write_config(model, tmp_path, **taught_by(url, "trl_ray"))
        assert main(["distill", "--config", str(config)]) == 3
    assert_stopped(tmp_path, capsys.readouterr().err, says="ConnectionRefusedError")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_teacher_that_fails_twice_is_asked_again_and_nothing_is_lost(
    model: str, tmp_path: Path, protocol: str
) -> None:
    broken = Reply(status=500, body=b"not yet")
    with serving(broken, broken, teach) as server:
        config = write_config(model, tmp_path, **taught_by(server.url, protocol, max_attempts=3))
        assert main(["distill", "--config", str(config)]) == 0
    run = tmp_path / "run"
    assert_balanced(run, trained=8)
    assert not events(run, "teacher_failed") and not events(run, "group_dropped")
    assert len(server.seen) == 8 + 2
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines(run / "metrics.jsonl"))


def test_a_run_that_its_teacher_ended_goes_on_when_the_teacher_is_back(model: str, tmp_path: Path) -> None:
    is_well = threading.Event()
    with serving(lambda body: teach(body) if is_well.is_set() else b"") as server:
        config = write_config(model, tmp_path, **taught_by(server.url, "trl_ray"))
        assert main(["distill", "--config", str(config)]) == 3
        is_well.set()
        assert main(["resume", str(tmp_path / "run")]) == 0
    assert_balanced(tmp_path / "run", trained=8)


@pytest.mark.parametrize("attempts", [1, 2])
def test_groups_that_a_teacher_cannot_score_are_dropped_and_the_others_trained(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], attempts: int
) -> None:
    asked: list[str] = []

    def mostly(body: bytes) -> bytes:
        [request] = decode_requests(body).requests
        if len(request.prompt_ids) != len(UNBEARABLE):
            return frame_answer(body)
        asked.append(UNBEARABLE)
        return frame_answer(body, lambda scores: [nan(scores[0])])

    with serving(mostly) as server:
        options = {**taught_by(server.url, "trl_ray"), "max_steps": 6, "max_attempts": attempts}
        config = write_config(model, tmp_path, prompts=[*COUNTS, UNBEARABLE], **options)
        assert main(["distill", "--config", str(config)]) == 0
    run = tmp_path / "run"
    assert_balanced(run, trained=24)
    dropped = ledger(run)["dropped"]["teacher_failed"]
    assert dropped >= 3
    assert len(events(run, "teacher_failed")) == dropped * attempts
    assert capsys.readouterr().out.count("teacher failed [queue]") == dropped * attempts
    assert lines(run / "metrics.jsonl")[-1]["ledger/dropped"] >= 2
    # Sent `max_attempts` times whenever the group is issued.
    assert len(asked) == dropped * attempts * 2


# ---- weights -------------------------------------------------------------------------------------------------------


def spoil(folder: str, name: str, place: int) -> None:
    """Make one of a model's weights NaN."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors[name][place] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def spoilt_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a teacher that is sound until it reads the first letter of a prompt."""
    folder = build_tiny_model(tmp_path_factory.mktemp("teacher"), family="llama", tied=False, seed=7)
    [first] = {build_tokenizer()(prompt)["input_ids"][0] for prompt in COUNTS}
    spoil(folder, "model.embed_tokens.weight", first)
    return folder


@pytest.mark.parametrize("placement", ["actor", "learner"])
def test_a_teacher_all_of_whose_answers_would_be_nan_is_refused_by_name(
    model: str, tmp_path: Path, placement: str
) -> None:
    folder = build_tiny_model(tmp_path / "teacher", family="llama", tied=False, seed=7)
    spoil(folder, "model.norm.weight", 0)
    teachers = [{"model_name_or_path": folder, "placement": placement}]
    config = distill(model, None, tmp_path / "run", teachers=teachers, loss_support="sampled")
    with pytest.raises(ModelError, match=r"the weights of .*teacher must be numbers, but model.norm.weight holds NaN"):
        DistillPipeline(args=config, train_dataset=PROMPTS).train()


@pytest.mark.parametrize("support", [{"loss_support": "sampled"}, {"loss_support": "full"}], ids=["sampled", "full"])
@pytest.mark.parametrize("on_non_finite", ["skip", "stop"])
def test_a_teacher_of_the_learner_that_is_nan_trains_nothing_and_is_named(
    model: str, spoilt_teacher: str, tmp_path: Path, on_non_finite: str, support: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    teachers = [{"model_name_or_path": spoilt_teacher, "placement": "learner"}]
    config = distill(
        model, None, run, max_skipped_steps=2, on_non_finite=on_non_finite, teachers=teachers, max_steps=9, **support
    )
    with pytest.raises(NumericsError, match=r"the teacher's log-probs must be finite.*Check the teacher's weights"):
        DistillPipeline(args=config, train_dataset=PROMPTS).train()
    skipped = [event for event in events(run, "group_dropped") if event["detail"]["reason"] == "numerics"]
    assert len(skipped) == (2 * 16 if on_non_finite == "skip" else 0)
    assert not list((run / "checkpoints").glob("step-*"))
    published = {event["detail"]["checksum"] for event in events(run, "weights_published")}
    assert len(published) == 1
    assert events(run, "run_failed")


def test_a_teacher_actor_that_is_nan_trains_nothing(model: str, spoilt_teacher: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    teachers = [{"name": "judge", "model_name_or_path": spoilt_teacher, "max_failures_in_a_row": ALLOWED}]
    config = distill(model, None, run, teachers=teachers, max_attempts=1)
    with pytest.raises(TeacherError, match="must be a finite number, at most 0, got nan"):
        DistillPipeline(args=config, train_dataset=PROMPTS).train()
    assert {event["detail"]["reason"] for event in events(run, "group_dropped")} == {"teacher_failed"}
    assert not lines(run / "metrics.jsonl") and not list((run / "checkpoints").glob("step-*"))
