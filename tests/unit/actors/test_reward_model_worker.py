"""One copy of a reward model: whole groups, joined or alone, in passes of similar lengths; how each thing fails."""

import asyncio
import math
import re
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fakes import completion, prompt
from tiny_models import build_tokenizer
from tiny_reward_models import build_reward_model
from trl_ray.actors.reward_model_worker import RewardModelWorker
from trl_ray.config.reward_model_options import RewardModelOptions
from trl_ray.errors import ModelError
from trl_ray.types import EventKind, Prompt, RewardErrorKind

QUESTION = Prompt(
    prompt_id="0:0", token_ids=np.arange(3, dtype=np.int32), messages=({"role": "user", "content": "Why?"},)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_reward_model(tmp_path_factory.mktemp("models") / "judge")


@pytest.fixture(scope="module")
def stepwise(tmp_path_factory):
    return build_reward_model(tmp_path_factory.mktemp("models") / "steps", labels=2)


def worker(path, *, join_groups=False, **changes):
    options = RewardModelOptions(model_name_or_path=path, **changes)
    return RewardModelWorker(name="reward-model-judge-0", options=options, template_kwargs={}, join_groups=join_groups)


class FakeModel:
    """Rates a row with its number of tokens; writes down the lengths of every pass, and waits where it is told."""

    def __init__(self, *, go=None, fails=None, value=float):
        self.passes, self._go, self._fails, self._value = [], go, fails, value
        self.begun = threading.Event()

    def rate(self, rows, positions):
        self.passes.append([len(row) for row in rows])
        self.begun.set()
        if self._go is not None:
            assert self._go.wait(20)
        if self._fails is not None:
            raise self._fails
        return [self._value(len(row)) for row in rows]


def faked(path, model, **changes):
    made = worker(path, **changes)
    made._model = model
    return made


def ask(made, *groups):
    """Score groups of texts side by side."""

    async def run():
        return await asyncio.gather(*(made.score(prompt(0), [completion(text) for text in texts]) for texts in groups))

    try:
        return asyncio.run(run())
    finally:
        made.close()


def totals(scored):
    assert scored.failure is None, scored.failure
    return [reward.total for reward in scored.rewards]


def test_a_group_gets_what_transformers_says_of_each_conversation_alone(folder):
    texts = ["Because.", "", "I cannot say, " * 5]

    async def run(made):
        return await made.score(QUESTION, [completion(text) for text in texts])

    made = worker(folder)
    scored = asyncio.run(run(made))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), build_tokenizer()
    for reward, text in zip(scored.rewards, texts, strict=True):
        said = [*QUESTION.messages, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            assert reward.total == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)
        assert reward.parts == {"judge": reward.total}
    assert scored.metrics == {"reward/judge/truncated_fraction": 0.0}
    made.close()


# "prompt 0" is 8 tokens, a completion one per character, and the end one more.
def test_rows_are_read_longest_first_in_passes_of_the_given_size_and_answered_in_their_order(folder):
    model = FakeModel()
    [scored] = ask(faked(folder, model, batch_size=2), ["a", "bbbb", "cc", "", "ddd"])
    assert model.passes == [[13, 12], [11, 10], [9]]
    assert totals(scored) == [10, 13, 11, 9, 12]


def test_a_pass_holds_no_more_tokens_than_it_may_padding_included_but_one_row_at_least(folder):
    model = FakeModel()
    ask(faked(folder, model, max_tokens_per_forward=24), ["x" * 30, "bbb", "cc", "d"])
    assert model.passes == [[39], [12, 11], [10]]


def test_groups_that_wait_together_share_passes_only_where_they_are_joined(folder):
    together, apart = FakeModel(), FakeModel()
    joined = ask(faked(folder, together, join_groups=True), ["a", "bb"], ["ccc", "dddd"])
    alone = ask(faked(folder, apart), ["a", "bb"], ["ccc", "dddd"])
    assert together.passes == [[13, 12, 11, 10]]
    assert apart.passes == [[11, 10], [13, 12]]
    assert [totals(scored) for scored in joined] == [totals(scored) for scored in alone] == [[10, 11], [12, 13]]


def test_groups_that_come_while_a_pass_runs_wait_and_are_joined_then(folder):
    go, made = threading.Event(), None

    async def run():
        first = asyncio.ensure_future(made.score(prompt(0), [completion("a")]))
        await asyncio.to_thread(model.begun.wait, 20)
        others = [asyncio.ensure_future(made.score(prompt(0), [completion(text)])) for text in ("bb", "ccc")]
        await asyncio.sleep(0)
        busy = made.health()
        go.set()
        return busy, [totals(scored) for scored in await asyncio.gather(first, *others)]

    model = FakeModel(go=go)
    made = faked(folder, model, join_groups=True)
    busy, answers = asyncio.run(run())
    assert (busy.progress, busy.busy_since is not None, busy.problem) == (0, True, None)
    assert (model.passes, answers) == ([[10], [12, 11]], [[10], [11], [12]])
    idle, report = made.health(), made.drain()
    assert (idle.progress, idle.busy_since) == (3, None)
    assert [(span.actor, span.name) for span in report.spans] == [("reward-model-judge-0", "score")] * 2
    assert made.drain().spans == ()
    made.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_fails_its_group_and_is_never_0(folder, value):
    model = FakeModel(value=lambda length: value if length == 11 else float(length))
    bad, good = ask(faked(folder, model, join_groups=True), ["a", "bb"], ["ccc"])
    assert (bad.failure.kind, bad.failure.function, bad.rewards) == (RewardErrorKind.NAN, "judge", ())
    assert "completion 1" in bad.failure.detail and str(value) in bad.failure.detail
    assert totals(good) == [12]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory.*Lower batch_size"),
        (IndexError("index out of range in self"), "IndexError: index out of range"),
    ],
)
def test_a_model_that_raises_fails_the_groups_of_that_pass_by_its_name(folder, error, says):
    scored = ask(faked(folder, FakeModel(fails=error)), ["a"])[0]
    assert (scored.failure.kind, scored.failure.function) == (RewardErrorKind.EXCEPTION, "judge")
    assert re.search(f"(?s)judge must rate 1 completions of up to 10 tokens.*{says}", scored.failure.detail)


def test_a_failed_pass_spares_the_groups_that_were_not_in_it(folder):
    class Fragile(FakeModel):
        def rate(self, rows, positions):
            if len(rows[0]) > 20:
                raise RuntimeError("too long")
            return FakeModel.rate(self, rows, positions)

    model = Fragile()
    bad, good = ask(faked(folder, model, join_groups=True, batch_size=1), ["x" * 30, "a"], ["bb"])
    assert (bad.failure.kind, totals(good)) == (RewardErrorKind.EXCEPTION, [11])
    # What is lost is not computed.
    assert model.passes == [[11]]


def test_a_conversation_that_its_template_refuses_fails_its_group_alone(folder):
    async def run(made):
        odd = Prompt(prompt_id="0:1", token_ids=QUESTION.token_ids, messages=({"role": "user", "content": "no"},))
        made._reader._tokenizer.chat_template = (
            "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never') }}{% endif %}"
            "{{ m.content }}{% endfor %}"
        )
        return await asyncio.gather(*(made.score(each, [completion("a")]) for each in (odd, QUESTION)))

    made = faked(folder, FakeModel(), join_groups=True)
    bad, good = asyncio.run(run(made))
    assert bad.failure.kind is RewardErrorKind.EXCEPTION and "never" in bad.failure.detail
    assert totals(good) == [5]
    made.close()


def test_a_pass_that_hangs_fails_its_group_and_makes_the_actor_ask_to_be_replaced(folder):
    async def run(made):
        first = asyncio.ensure_future(made.score(prompt(0), [completion("a")]))
        second = asyncio.ensure_future(made.score(prompt(0), [completion("bb")]))
        scored = await first
        health = made.health()
        # The one behind it is not answered: its caller asks again once the actor is back.
        await asyncio.sleep(0)
        waiting = not second.done()
        second.cancel()
        go.set()
        return scored, health, waiting

    go = threading.Event()
    made = faked(folder, FakeModel(go=go), timeout_s=0.2)
    scored, health, waiting = asyncio.run(run(made))
    assert (scored.failure.kind, scored.failure.function) == (RewardErrorKind.TIMEOUT, "judge")
    assert "within 0.2 s" in health.problem and waiting
    made.close()


def test_what_is_cut_off_counts_in_a_metric_and_is_told_once(folder):
    made = faked(folder, FakeModel(), max_length=12)
    scored = ask(made, ["aaa", "bbbb", "c", "dddddddd"], ["eeeeeee"])
    assert [each.metrics["reward/judge/truncated_fraction"] for each in scored] == [0.5, 1.0]
    assert totals(scored[0]) == [12, 12, 10, 12]
    [event] = made.drain().events
    assert event.kind is EventKind.WARNING
    assert "judge reads the last 12 tokens" in event.detail["detail"] and "12 + 5" in event.detail["detail"]


def test_a_solution_without_steps_has_no_reward_and_the_others_do(stepwise):
    [scored] = ask(worker(stepwise, name="prm"), ["add\ncarry", "   "])
    first, second = totals(scored)
    assert 0 < first < 1 and second is None
    assert scored.metrics == {"reward/prm/truncated_fraction": 0.0, "reward/prm/steps": 1.0}


def test_a_gpu_that_is_not_there_is_missed_at_the_start(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"judge: num_gpus=0.5 needs a GPU"):
        worker(folder, num_gpus=0.5)
