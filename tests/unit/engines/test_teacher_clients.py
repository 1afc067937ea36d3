"""Teachers behind HTTP: what comes back is right, or an error with a name, after as many attempts as are allowed."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from teacher_batches import make_requests, make_scores
from teacher_servers import Babble, Behaviour, Close, Drip, Hang, Reply, frame_answer, serving, trl_answer, vllm_answer
from trl_ray.config.teacher_options import PayloadDtype, PayloadIds, TeacherConfig, TeacherServerConfig
from trl_ray.engines.teacher_clients import (
    Chunking,
    FrameTeacher,
    HttpTeacher,
    TeacherClient,
    TrlTeacher,
    VllmTeacher,
    cut,
    teacher_client,
)
from trl_ray.engines.teacher_transport import ServerAddress, TeacherServer
from trl_ray.errors import ConfigError, TeacherError
from trl_ray.types import TeacherQuestion, TeacherScores

VOCAB = 50
LENGTHS = [3, 1, 4, 2, 5]
REQUESTS = make_requests(LENGTHS)
QUESTION = TeacherQuestion(vocab_size=VOCAB, top_k=3, tail=True)
ALL_AT_ONCE = Chunking(size=8)
Make = Callable[[TeacherServer, Chunking], HttpTeacher]
MAKERS: dict[str, Make] = {"trl_ray": FrameTeacher, "vllm": partial(VllmTeacher, model="big"), "trl": TrlTeacher}
GOOD: dict[str, Callable[[bytes], bytes]] = {
    "trl_ray": frame_answer,
    "vllm": partial(vllm_answer, vocab_size=VOCAB),
    "trl": partial(trl_answer, vocab_size=VOCAB),
}


def connect(url: str, *, delays: list[float] | None = None, **address: Any) -> TeacherServer:
    """A server that is given up quickly; the delays between attempts are noted and not waited for."""
    waited: list[float] = [] if delays is None else delays
    options = {"timeout_s": 30.0, "max_attempts": 3} | address
    return TeacherServer(teacher="big", address=ServerAddress(url=url, **options), sleep=waited.append)


def same(some: Sequence[TeacherScores], others: Sequence[TeacherScores], **tolerance: float) -> None:
    for one, other in zip(some, others, strict=True):
        for name in ("logprobs", "top_ids", "top_logprobs", "tail"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None), name
            if a is not None:
                np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("protocol", MAKERS)
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_scores_are_those_of_the_teacher(protocol: str, top_k: int) -> None:
    question = TeacherQuestion(vocab_size=VOCAB, top_k=top_k, tail=top_k > 0)
    # vLLM's made-up logits go on from the first token of the sequence, where the others begin at the completion.
    requests = [dataclasses.replace(each, prompt_ids=each.prompt_ids[:1]) for each in REQUESTS]
    with serving(GOOD[protocol]) as server:
        scores = MAKERS[protocol](connect(server.url), ALL_AT_ONCE).score(requests, question)
    same(scores, make_scores(requests, question), rtol=1e-6)
    assert {each.teacher for each in scores} == {"big"}
    assert {each.version for each in scores} == {3 if protocol == "trl_ray" else None}


@pytest.mark.parametrize("protocol", ["vllm", "trl"])
def test_no_tokens_leave_out_everything_as_they_do_for_an_engine(protocol: str) -> None:
    with serving(GOOD[protocol]) as server:
        question = TeacherQuestion(vocab_size=VOCAB, top_k=0, tail=True)
        scores = MAKERS[protocol](connect(server.url), ALL_AT_ONCE).score(REQUESTS, question)
    assert [None if each.tail is None else each.tail.tolist() for each in scores] == [[0.0] * n for n in LENGTHS]


@pytest.mark.parametrize("protocol", MAKERS)
def test_chunks_are_asked_apart_and_put_together_in_order(protocol: str) -> None:
    with serving(GOOD[protocol]) as server:
        scores = MAKERS[protocol](connect(server.url), Chunking(size=2, concurrent=3)).score(REQUESTS, QUESTION)
        assert len(server.seen) == 3
    assert [len(each.logprobs) for each in scores] == LENGTHS


def test_a_chunk_is_full_by_completions_or_by_tokens() -> None:
    # Prompts have 1 to 5 tokens: 4, 3, 7, 6 and 10 with their completions.
    assert [len(chunk) for chunk in cut(REQUESTS, Chunking(size=2, tokens=100))] == [2, 2, 1]
    assert [len(chunk) for chunk in cut(REQUESTS, Chunking(size=9, tokens=13))] == [2, 2, 1]
    assert [len(chunk) for chunk in cut(REQUESTS, Chunking(size=9, tokens=1))] == [1, 1, 1, 1, 1]
    assert list(cut([], Chunking())) == []


@pytest.mark.parametrize("protocol", MAKERS)
def test_nothing_is_asked_about_nothing(protocol: str) -> None:
    with serving(GOOD[protocol]) as server:
        assert MAKERS[protocol](connect(server.url), ALL_AT_ONCE).score([], QUESTION) == []
        assert not server.seen


FAILING: dict[str, tuple[Behaviour, str]] = {
    "killed": (Close(), "RemoteDisconnected"),
    "killed while it answered": (Reply(body=b"{", announced=1000), "IncompleteRead"),
    "HTTP 500": (Reply(status=500, body=b"out of memory"), "HTTP 500: out of memory"),
    "HTTP 503": (Reply(status=503, body=b"busy"), "HTTP 503: busy"),
    "not HTTP": (Babble(), "BadStatusLine"),
    "garbage": (Reply(body=b"\x00\x01\x02 garbage"), "teacher big"),
    "nothing": (Reply(body=b""), "teacher big"),
    "other JSON": (Reply(body=b'{"choices": [{"index": 0, "prompt_logprobs": [1, 2]}], "shape": "x"}'), "teacher big"),
    "deep JSON": (Reply(body=b"[" * 100_000), "teacher big"),
}


@pytest.mark.parametrize("protocol", MAKERS)
@pytest.mark.parametrize("failing", FAILING)
def test_a_failing_server_is_asked_again_and_then_named(protocol: str, failing: str) -> None:
    behaviour, words = FAILING[failing]
    delays: list[float] = []
    with serving(behaviour) as server:
        client = MAKERS[protocol](connect(server.url, delays=delays), ALL_AT_ONCE)
        with pytest.raises(TeacherError, match=r"teacher big: must answer at http://.* but failed 3 times") as caught:
            client.score(REQUESTS, QUESTION)
        assert len(server.seen) == 3
    assert words in str(caught.value)
    assert delays == [0.5, 1.0]


@pytest.mark.parametrize("protocol", MAKERS)
@pytest.mark.parametrize("failing", FAILING)
def test_a_server_that_recovers_is_not_noticed(protocol: str, failing: str) -> None:
    with serving(FAILING[failing][0], GOOD[protocol]) as server:
        scores = MAKERS[protocol](connect(server.url), ALL_AT_ONCE).score(REQUESTS, QUESTION)
        assert len(server.seen) == 2
    assert [len(each.logprobs) for each in scores] == LENGTHS


@pytest.mark.parametrize("behaviour", [Hang(), Drip()])
def test_a_server_that_hangs_or_drips_is_left_when_time_is_up(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        client = FrameTeacher(connect(server.url, timeout_s=0.1, max_attempts=2), ALL_AT_ONCE)
        with pytest.raises(TeacherError, match=r"failed 2 times, at last: TimeoutError: no answer within 0.1 s"):
            client.score(REQUESTS, QUESTION)
        assert len(server.seen) == 2


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(TeacherError, match="failed 3 times, at last: ConnectionRefusedError"):
            FrameTeacher(connect(url), ALL_AT_ONCE).score(REQUESTS, QUESTION)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422, 429])
def test_a_refused_request_is_not_sent_again(status: int) -> None:
    with serving(Reply(status=status, body=b"no")) as server:
        with pytest.raises(TeacherError, match=f"refused the request with {status}: 'no'"):
            FrameTeacher(connect(server.url), ALL_AT_ONCE).score(REQUESTS, QUESTION)
        assert len(server.seen) == 1


def test_delays_double_up_to_ten_seconds() -> None:
    delays: list[float] = []
    with serving(Reply(status=500)) as server, pytest.raises(TeacherError, match="failed 8 times"):
        FrameTeacher(connect(server.url, delays=delays, max_attempts=8), ALL_AT_ONCE).score(REQUESTS, QUESTION)
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_an_answer_beyond_all_bounds_is_not_read() -> None:
    with serving(Reply(body=b"x" * 2000)) as server, pytest.raises(TeacherError, match="more than 1000 bytes"):
        FrameTeacher(connect(server.url, max_response_bytes=1000), ALL_AT_ONCE).score(REQUESTS, QUESTION)


def test_after_a_failure_no_further_chunks_are_sent() -> None:
    with serving(Reply(status=400)) as server:
        with pytest.raises(TeacherError, match="400"):
            FrameTeacher(connect(server.url), Chunking(size=1, concurrent=1)).score(make_requests([1] * 50), QUESTION)
        assert len(server.seen) < 50


def change_scores(**changes: Any) -> Callable[[bytes], bytes]:
    """Our own server, with fields of the second completion changed by functions."""

    def change(scores: list[TeacherScores]) -> list[TeacherScores]:
        fields = {name: make(getattr(scores[1], name).copy()) for name, make in changes.items()}
        return [scores[0], dataclasses.replace(scores[1], **fields), *scores[2:]]

    return partial(frame_answer, change=change)


def put(value: float, *place: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


def longer(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array])


def change_vllm(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """vLLM's server, with something done to the answer's second choice."""

    def apply(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer["choices"][1])
        return answer

    return partial(vllm_answer, vocab_size=VOCAB, change=apply)


def change_trl(**changes: Any) -> Callable[[bytes], bytes]:
    """TRL's server, with something done to its arrays."""

    def apply(answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {name: make(answer[name]) for name, make in changes.items()}

    return partial(trl_answer, vocab_size=VOCAB, change=apply)


def of_completion(choice: dict[str, Any]) -> dict[str, Any]:
    """vLLM's entry for the last token of its second sequence."""
    place: dict[str, Any] = choice["prompt_logprobs"][-1]
    return place


SAMPLED = str(REQUESTS[1].completion_ids[-1])
WRONG: dict[str, tuple[str, Behaviour, str]] = {
    "frames: NaN": ("trl_ray", change_scores(logprobs=put(np.nan, 0)), "completion 1, token 0, logprobs"),
    "frames: NaN in the top": (
        "trl_ray",
        change_scores(top_logprobs=put(np.nan, 0, 2)),
        "completion 1, token 0, top_log",
    ),
    "frames: missing": ("trl_ray", change_scores(logprobs=put(-np.inf, 0)), "completion 1, token 0, logprobs"),
    "frames: vocabulary": ("trl_ray", change_scores(top_ids=put(VOCAB, 0, 0)), f"vocabulary of {VOCAB}, got {VOCAB}"),
    "frames: length": (
        "trl_ray",
        change_scores(logprobs=longer, top_ids=longer, top_logprobs=longer, tail=longer),
        "completion 1, length: must be 1 tokens, got 2",
    ),
    "frames: one short": (
        "trl_ray",
        partial(frame_answer, change=lambda scores: scores[:-1]),
        "completions: must be 5",
    ),
    "vllm: NaN": (
        "vllm",
        change_vllm(lambda c: of_completion(c)[SAMPLED].update(logprob=np.nan)),
        "completion 1, token 0",
    ),
    "vllm: -inf": ("vllm", change_vllm(lambda c: of_completion(c)[SAMPLED].update(logprob=-9999.0)), "got -inf"),
    "vllm: missing": (
        "vllm",
        change_vllm(lambda c: of_completion(c).pop(SAMPLED)),
        "a log-prob of completion 1, token 0",
    ),
    "vllm: no place": (
        "vllm",
        change_vllm(lambda c: c["prompt_logprobs"].__setitem__(-1, None)),
        "completion 1, token 0",
    ),
    "vllm: length": ("vllm", change_vllm(lambda c: c["prompt_logprobs"].pop()), "3 places for completion 1, got 2"),
    "vllm: not asked": ("vllm", change_vllm(lambda c: c.update(prompt_logprobs=None)), "known to answer"),
    "vllm: choices": ("vllm", change_vllm(lambda c: c.update(index=7)), "choices 0 to 4"),
    "vllm: vocabulary": (
        "vllm",
        change_vllm(lambda c: of_completion(c).update({"99999999999": {"logprob": -9.0, "rank": 0}})),
        f"vocabulary of {VOCAB}, got -1",
    ),
    "vllm: few": (
        "vllm",
        change_vllm(lambda c: c["prompt_logprobs"].__setitem__(-1, {SAMPLED: {"logprob": -1.0, "rank": 9}})),
        "3 tokens at completion 1, token 0, got 1",
    ),
    "vllm: text": ("vllm", change_vllm(lambda c: of_completion(c)[SAMPLED].update(logprob="low")), "known to answer"),
    "trl: missing": ("trl", change_trl(actual_logprobs_b64=put(-np.inf, 1, 0, 0)), "completion 1, token 0, logprobs"),
    "trl: NaN": ("trl", change_trl(logprobs_b64=put(np.nan, 1, 0, 0)), "completion 1, token 0, top_logprobs"),
    "trl: vocabulary": ("trl", change_trl(token_ids_b64=put(VOCAB, 1, 0, 0)), f"vocabulary of {VOCAB}, got {VOCAB}"),
    "trl: others": ("trl", change_trl(actual_token_ids_b64=put(0, 1, 0, 0)), "the tokens of completion 1 as they were"),
    "trl: length": ("trl", change_trl(completion_lengths=lambda sizes: [9, *sizes[1:]]), "completions of"),
    "trl: shape": ("trl", change_trl(shape=lambda shape: [shape[0], shape[1], 1]), "arrays of shape"),
    "trl: cut": ("trl", change_trl(logprobs_b64=lambda array: array[:-1]), "known to answer"),
    "trl: not base64": ("trl", change_trl(logprobs_b64=lambda _: "%%%%"), "known to answer"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_answer_that_cannot_be_true_is_named_and_asked_for_again(wrong: str) -> None:
    protocol, behaviour, words = WRONG[wrong]
    if wrong == "trl: others":
        assert REQUESTS[1].completion_ids[0] != 0
    with serving(behaviour) as server:
        with pytest.raises(TeacherError, match="teacher big") as caught:
            MAKERS[protocol](connect(server.url, max_attempts=2), ALL_AT_ONCE).score(REQUESTS, QUESTION)
        assert len(server.seen) == 2
    assert words in str(caught.value)


@pytest.mark.parametrize("protocol", ["vllm", "trl"])
def test_what_a_foreign_server_would_answer_wrongly_is_not_asked(protocol: str) -> None:
    with serving(GOOD[protocol]) as server:
        client = MAKERS[protocol](connect(server.url), ALL_AT_ONCE)
        with pytest.raises(ConfigError, match=r"temperature must be 1 with teacher big, got 0\.7"):
            client.score(REQUESTS, dataclasses.replace(QUESTION, temperature=0.7))
        with pytest.raises(ConfigError, match="cannot score given ones"):
            client.score(make_requests(LENGTHS, support=2), QUESTION)
        assert not server.seen


def test_our_own_server_is_asked_about_given_tokens_at_any_temperature() -> None:
    requests = make_requests(LENGTHS, support=4)
    question = TeacherQuestion(vocab_size=VOCAB, top_k=2, tail=True, temperature=0.7)
    with serving(frame_answer) as server:
        scores = FrameTeacher(connect(server.url), ALL_AT_ONCE).score(requests, question)
    same(scores, make_scores(requests, question))


def test_numbers_travel_in_the_formats_that_were_asked_for() -> None:
    with serving(frame_answer) as server:
        client = FrameTeacher(connect(server.url), ALL_AT_ONCE, dtype=PayloadDtype.FLOAT16, ids=PayloadIds.COMPACT)
        scores = client.score(REQUESTS, QUESTION)
    wanted = make_scores(REQUESTS, QUESTION)
    same(scores, wanted, rtol=2**-11)
    assert (scores[0].logprobs != wanted[0].logprobs).any()


def test_the_token_is_sent_and_never_shown() -> None:
    with serving(frame_answer, Reply(status=401, body=b"who are you")) as server:
        connected = connect(server.url + "/teachers/", token="s3cret")
        client = FrameTeacher(connected, ALL_AT_ONCE)
        client.score(REQUESTS, QUESTION)
        with pytest.raises(TeacherError, match="Check its token") as caught:
            client.score(REQUESTS, QUESTION)
        assert server.seen[0].headers["Authorization"] == "Bearer s3cret"
        assert server.seen[0].path == "/teachers/v1/teacher/score"
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(ServerAddress(url="http://a", token="s3cret"))
    with pytest.raises(ConfigError, match="printable ASCII") as refused:
        connect("http://a", token="s3cret\n")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a/?x=1"])
def test_an_address_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must be like http"):
        connect(url)


def test_the_wire_of_foreign_servers_is_what_they_know() -> None:
    with serving(GOOD["vllm"]) as server:
        MAKERS["vllm"](connect(server.url), ALL_AT_ONCE).score(REQUESTS[:1], QUESTION)
        seen = server.seen[0]
    sequence = [*REQUESTS[0].prompt_ids.tolist(), *REQUESTS[0].completion_ids.tolist()]
    assert (seen.path, seen.headers["Content-Type"]) == ("/v1/completions", "application/json")
    wanted = {"model": "big", "prompt": [sequence], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 3}
    assert json.loads(seen.body) == wanted
    with serving(GOOD["trl"]) as server:
        MAKERS["trl"](connect(server.url), ALL_AT_ONCE).score(REQUESTS[:1], QUESTION)
        seen = server.seen[0]
    assert seen.path == "/get_sequence_logprobs/"
    assert json.loads(seen.body) == {
        "sequences": [sequence],
        "prompt_lengths": [1],
        "top_logprobs": 3,
        "temperature": 1.0,
        "response_format": "binary",
    }


def test_the_options_make_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_TOKEN", "t")
    config = TeacherConfig(max_attempts=1, payload_dtype=PayloadDtype.FLOAT16)
    for protocol, kind in (("trl_ray", FrameTeacher), ("vllm", VllmTeacher), ("trl", TrlTeacher)):
        with serving(GOOD[protocol]) as server:
            model = "big" if protocol == "vllm" else None
            section = TeacherServerConfig(
                url=server.url, protocol=protocol, model=model, token_variable="TEACHER_TOKEN", chunk_size=2
            )
            client = teacher_client(name="big", server=section, teacher=config)
            assert isinstance(client, kind) and isinstance(client, TeacherClient) and client.name == "big"
            assert len(client.score(REQUESTS, QUESTION)) == 5
            assert len(server.seen) == 3
            assert server.seen[0].headers["Authorization"] == "Bearer t"
    monkeypatch.delenv("TEACHER_TOKEN")
    with pytest.raises(ConfigError, match="TEACHER_TOKEN must hold the token of teacher big"):
        teacher_client(name="big", server=section, teacher=config)
    with pytest.raises(ConfigError, match="model must be set with protocol=vllm"):
        TeacherServerConfig(url="http://a", protocol="vllm")
