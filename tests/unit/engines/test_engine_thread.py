import pickle
import threading
import time
from concurrent.futures import wait

import numpy as np
import pytest
import torch

from trl_ray.engines.backend import Finished, Limits
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import DataError, DeadlineError, EngineError, WeightError
from trl_ray.models.weight_payload import export_weights
from trl_ray.types import Completion, FinishReason, GenerationRequest, SamplingParams, VersionSpan

WEIGHTS = [("w", torch.arange(4.0))]


class FakeBackend:
    """Every request takes `steps` steps; `before_step` may block or raise."""

    def __init__(self, *, steps=1, before_step=lambda: None, before_load=lambda: None):
        self.steps, self.before_step, self.before_load = steps, before_step, before_load
        self.left, self.batches, self.closed, self.version = {}, [], False, 0

    def build(self):
        return Limits(max_model_len=8, vocab_size=10, manifest=export_weights(WEIGHTS, version=0).manifest)

    def add(self, key, request):
        if request.sampling.top_k == 7:
            raise ValueError("seven")
        self.left[key] = self.steps

    def add_score(self, key, token_ids):
        self.left[key] = self.steps

    def abort(self, keys):
        for key in keys:
            self.left.pop(key, None)

    def step(self):
        self.before_step()
        self.batches.append(len(self.left))
        self.left = {key: left - 1 for key, left in self.left.items()}
        done = [key for key, left in self.left.items() if left == 0]
        for key in done:
            del self.left[key]
        return [Finished(key=key, result=(completion(self.version),)) for key in done]

    def load(self, payload):
        self.before_load()
        self.version = payload.identity.version

    def close(self):
        self.closed = True


def completion(version):
    return Completion(
        token_ids=np.array([1], np.int32),
        logprobs=np.array([-1.0], np.float32),
        versions=(VersionSpan(version=version, start=0, end=1),),
        finish_reason=FinishReason.STOP,
        text="a",
    )


def request(name="r", *, prompt=(1, 2), n=1, top_k=0, max_tokens=4):
    return GenerationRequest(
        request_id=name,
        prompt_ids=np.array(prompt, np.int32),
        n=n,
        sampling=SamplingParams(max_tokens=max_tokens, top_k=top_k),
        seed=0,
    )


def engine_of(backend, *, hang_deadline_s=5.0):
    return EngineThread(backend, name="fake", max_num_seqs=4, hang_deadline_s=hang_deadline_s)


def test_requests_of_one_submit_enter_together_and_each_gets_its_future():
    backend = FakeBackend(steps=2)
    engine = engine_of(backend)
    futures = engine.submit([request("a"), request("b"), request("c")])
    assert [len(future.result(5)) for future in futures] == [1, 1, 1]
    assert backend.batches == [3, 3]
    assert engine.in_flight == 0
    engine.close()
    assert backend.closed


def test_a_paused_engine_keeps_requests_and_steps_none_of_them():
    backend = FakeBackend()
    engine = engine_of(backend, hang_deadline_s=0.2)
    engine.pause()
    [future] = engine.submit([request(n=3)])
    time.sleep(0.4)  # Longer than the deadline: being paused is not hanging.
    assert not future.done() and engine.in_flight == 3 and backend.batches == [] and engine.broken is None
    engine.resume()
    future.result(5)
    engine.close()


def test_weights_loaded_while_paused_label_what_is_generated_afterwards():
    engine = engine_of(FakeBackend())
    assert engine.version.version == 0
    payload = export_weights(WEIGHTS, version=7)
    engine.pause()
    [future] = engine.submit([request()])
    engine.load_weights(payload)
    engine.resume()
    assert future.result(5)[0].min_version == 7
    assert engine.version == payload.identity
    engine.close()


def test_weights_of_another_model_are_refused_before_the_backend_sees_them():
    backend = FakeBackend(before_load=lambda: pytest.fail("touched"))
    engine = engine_of(backend)
    with pytest.raises(WeightError, match="wrong shape"):
        engine.load_weights(export_weights([("w", torch.zeros(5))], version=1))
    engine.submit([request()])[0].result(5)
    engine.close()


def test_a_load_that_fails_half_way_breaks_the_engine():
    def explode():
        raise AssertionError("half")

    engine = engine_of(FakeBackend(before_load=explode))
    engine.pause()
    [waiting] = engine.submit([request()])
    with pytest.raises(EngineError, match="half"):
        engine.load_weights(export_weights(WEIGHTS, version=1))
    assert "half" in engine.broken and engine.version.version == 0
    with pytest.raises(EngineError):
        engine.resume()
    with pytest.raises(EngineError):
        waiting.result(5)
    engine.close()


def test_a_failing_step_fails_every_future_with_an_error_that_pickles():
    class Unpicklable(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one}{two}")

    def explode():
        raise Unpicklable("bo", "om")

    engine = engine_of(FakeBackend(before_step=explode))
    engine.pause()
    futures = engine.submit([request("a"), request("b")])
    engine.resume()
    for future in futures:
        error = pickle.loads(pickle.dumps(future.exception(5)))
        assert isinstance(error, EngineError) and "boom" in str(error)
    assert "boom" in engine.broken
    with pytest.raises(EngineError, match="boom"):
        engine.submit([request()])
    engine.close()


def test_a_step_that_blocks_fails_all_futures_after_the_deadline():
    release = threading.Event()
    engine = engine_of(FakeBackend(before_step=lambda: release.wait(20)), hang_deadline_s=0.3)
    began = time.monotonic()
    futures = engine.submit([request("a"), request("b")])
    progress = engine.last_progress
    assert not wait(futures, timeout=5).not_done
    assert 0.25 < time.monotonic() - began < 3
    assert all(isinstance(future.exception(), EngineError) for future in futures)
    assert "no step finished" in engine.broken and engine.last_progress <= progress + 0.1
    with pytest.raises(EngineError):
        engine.pause()
    engine.close()
    release.set()


def test_slow_steps_that_finish_do_not_count_as_a_hang():
    engine = engine_of(FakeBackend(steps=6, before_step=lambda: time.sleep(0.1)), hang_deadline_s=0.4)
    engine.submit([request()])[0].result(5)
    assert engine.broken is None
    engine.close()


def test_an_aborted_request_is_cancelled_and_leaves_the_backend():
    backend = FakeBackend()
    engine = engine_of(backend)
    engine.pause()
    gone, kept = engine.submit([request("gone"), request("kept")])
    engine.abort(["gone", "never heard of"])
    assert gone.cancelled()
    engine.resume()
    kept.result(5)
    assert backend.batches == [1]
    engine.close()


def test_a_refused_request_fails_alone():
    engine = engine_of(FakeBackend())
    bad, good = engine.submit([request("bad", top_k=7), request("good")])
    assert isinstance(bad.exception(5), EngineError) and "seven" in str(bad.exception())
    good.result(5)
    assert engine.broken is None
    engine.close()


@pytest.mark.parametrize(
    "wrong",
    [
        request(prompt=()),
        request(prompt=range(8)),
        request(prompt=(1, 10)),
        request(prompt=(-1, 1)),
        request(n=0),
        request(max_tokens=0),
    ],
    ids=["empty", "too long", "unknown id", "negative id", "no sample", "no token"],
)
def test_a_request_that_cannot_run_is_an_input_error_and_nothing_is_queued(wrong):
    engine = engine_of(FakeBackend())
    with pytest.raises(DataError):
        engine.submit([request(), wrong])
    assert engine.in_flight == 0
    engine.close()


def test_scoring_on_a_paused_engine_ends_at_its_deadline_and_says_so():
    engine = engine_of(FakeBackend())
    engine.pause()
    with pytest.raises(DeadlineError, match="paused"):
        engine.score([np.array([1, 2], np.int32)], deadline_s=0.1)
    engine.close()


def test_closing_fails_what_is_in_flight_and_may_be_repeated():
    engine = engine_of(FakeBackend())
    engine.pause()
    [future] = engine.submit([request()])
    engine.close()
    engine.close()
    assert "closed" in str(future.exception(5))
    with pytest.raises(EngineError, match="closed"):
        engine.submit([request()])


def test_a_backend_that_cannot_be_built_raises_in_the_constructor():
    class Unbuildable(FakeBackend):
        def build(self):
            raise OSError("no model")

    with pytest.raises(EngineError, match="no model"):
        engine_of(Unbuildable())


def test_an_idle_engine_reports_progress_now():
    engine = engine_of(FakeBackend())
    time.sleep(0.05)
    assert time.time() - engine.last_progress < 0.05
    engine.close()
