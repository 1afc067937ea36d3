"""What a teacher model says, against plain log-softmax; how its passes are cut; how its weights follow the policy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_models import VOCAB_SIZE, build_tiny_model, random_model
from trl_ray.config.sections import Dtype, ModelConfig, SharePrompt
from trl_ray.config.teacher_options import TeacherConfig, TeacherKind, TeacherOptions, TeacherSource, TeacherWeights
from trl_ray.errors import CheckpointError, ConfigError, DataError, ModelError, WeightError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.adapters.merging import merged_weights
from trl_ray.models.companions.average_file import FILE
from trl_ray.models.companions.averaging import Pace, WeightAverage
from trl_ray.models.companions.teacher_model import TeacherModel, load_teacher_model
from trl_ray.models.companions.teacher_weights import AveragedWeights, CopiedWeights, follow_policy
from trl_ray.models.policy_loading import load_policy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.models.scoring.segment_attention import SEGMENT_ATTENTION
from trl_ray.models.weight_payload import export_weights, named_tensors
from trl_ray.types import TeacherQuestion, TeacherRequest, TeacherScores, TrainingSample, WeightPayload
from trl_ray.wire.teacher_answers import check_answer, join_scores

PLAIN = TeacherQuestion(vocab_size=VOCAB_SIZE)


def averaging(**pace: Any) -> Callable[[Mapping[str, Tensor]], WeightAverage]:
    return lambda weights: WeightAverage(weights, Pace(**pace))


def ids(*shape: int, seed: int = 0, vocab_size: int = 250) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)


def request(prompt: int, completion: int, *, seed: int = 0, support: np.ndarray | None = None) -> TeacherRequest:
    return TeacherRequest(
        prompt_ids=ids(prompt, seed=seed), completion_ids=ids(completion, seed=seed + 100), support_ids=support
    )


def teacher(model: torch.nn.Module | None = None, *, max_tokens: int = 4096, **changes: object) -> TeacherModel:
    return TeacherModel(model or random_model(), name="wise", max_tokens_per_batch=max_tokens, **changes)


def by_hand(model: torch.nn.Module, asked: TeacherRequest, question: TeacherQuestion) -> Tensor:
    """Log-probs [L, V] over the first V ids, one sequence alone."""
    row = torch.from_numpy(np.concatenate([asked.prompt_ids, asked.completion_ids]).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=row[None]).logits[0, len(asked.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits[:, : question.vocab_size].double() / question.temperature, dim=-1)


def assert_close(values: np.ndarray, expected: Tensor, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(values, expected.numpy(), atol=atol, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_own_top_and_tail_are_those_of_plain_log_softmax(attention: str, temperature: float) -> None:
    model = random_model(tied=False)
    model.set_attn_implementation(attention)
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, temperature=temperature, top_k=5, tail=True)
    asked = [request(7, 4), request(3, 9, seed=1), request(7, 2), request(1, 1, seed=2)]
    scores = teacher(model).score(asked, question)
    for one, said in zip(asked, scores, strict=True):
        expected = by_hand(model, one, question)
        own = expected.gather(1, torch.from_numpy(one.completion_ids.astype(np.int64))[:, None])[:, 0]
        top = expected.topk(5)
        assert_close(said.logprobs, own)
        assert said.top_ids is not None and said.top_logprobs is not None and said.tail is not None
        assert said.top_ids.tolist() == top.indices.tolist()
        assert_close(said.top_logprobs, top.values)
        assert_close(np.exp(said.tail), 1 - top.values.exp().sum(dim=1))
        assert (said.teacher, said.version) == ("wise", None)
    check_answer(join_scores(scores), teacher="wise", requests=asked, question=question)


def test_nothing_but_the_own_tokens_is_said_where_nothing_else_is_asked() -> None:
    [said] = teacher().score([request(2, 3)], PLAIN)
    assert (said.top_ids, said.top_logprobs, said.tail) == (None, None, None)
    assert said.logprobs.shape == (3,) and said.logprobs.dtype == np.float32


def test_given_tokens_stand_behind_the_top_and_count_as_nothing_where_they_repeat_a_token() -> None:
    model = random_model()
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=2, tail=True)
    first, second = by_hand(model, request(4, 1), question)[0].topk(2).indices.tolist()
    others = [token for token in (10, 11, 12, 13) if token not in (first, second)][:2]
    asked = request(4, 1, support=np.array([[second, others[0], others[1], others[0]]], dtype=np.int32))
    [said] = teacher(model).score([asked], question)
    expected = by_hand(model, asked, question)[0]
    assert said.top_ids is not None and said.top_logprobs is not None and said.tail is not None
    assert said.top_ids.tolist() == [[first, second, second, *others, others[0]]]
    assert np.isneginf(said.top_logprobs).tolist() == [[False, False, True, False, False, True]]
    assert_close(said.top_logprobs[0, [0, 1, 3, 4]], expected[[first, second, *others]])
    # Each token's mass once: the four of them and the tail make one.
    assert_close(np.exp(said.tail[0]), 1 - expected[[first, second, *others]].exp().sum())
    check_answer(join_scores([said]), teacher="wise", requests=[asked], question=question)


def test_given_tokens_alone_are_answered_in_their_order() -> None:
    model = random_model()
    asked = request(4, 3, support=np.array([[1, 2], [9, 3], [250, 0]], dtype=np.int32))
    [said] = teacher(model).score([asked], PLAIN)
    assert asked.support_ids is not None and said.top_logprobs is not None
    expected = by_hand(model, asked, PLAIN).gather(1, torch.from_numpy(asked.support_ids.astype(np.int64)))
    assert_close(said.top_logprobs, expected)
    np.testing.assert_array_equal(said.top_ids, asked.support_ids)


def test_a_larger_vocabulary_is_cut_before_the_softmax() -> None:
    model = random_model(tied=False)
    with torch.no_grad():  # what lies beyond would take nearly all the mass
        model.get_output_embeddings().weight[200:] *= 5
    question = TeacherQuestion(vocab_size=200, top_k=200, tail=False)
    asked = TeacherRequest(prompt_ids=ids(5, vocab_size=200), completion_ids=ids(6, seed=1, vocab_size=200))
    [said] = teacher(model).score([asked], question)
    expected = by_hand(model, asked, question)
    assert said.top_ids is not None and said.top_logprobs is not None
    assert said.top_ids.max() < 200
    np.testing.assert_allclose(np.exp(said.top_logprobs).sum(axis=1), 1, atol=1e-5)
    assert_close(
        said.logprobs, expected.gather(1, torch.from_numpy(asked.completion_ids.astype(np.int64))[:, None])[:, 0]
    )


def test_a_teacher_under_bfloat16_says_what_the_learner_says_under_it() -> None:
    model = random_model()
    asked = request(6, 8)
    [said] = teacher(model, bf16=True).score([asked], PLAIN)
    sample = TrainingSample(
        group_id=0, prompt_ids=asked.prompt_ids, completion_ids=asked.completion_ids, loss_mask=np.ones(8, np.bool_)
    )
    module = ScoringModule(random_model(), chunk_size=None, bf16=True)
    with torch.no_grad():
        learner = SampleScorer(module, share_prompt=SharePrompt.AUTO, temperature=1.0).logprobs([sample])
    assert learner is not None
    np.testing.assert_array_equal(said.logprobs, learner.numpy())
    [exact] = teacher().score([asked], PLAIN)
    assert np.abs(said.logprobs - exact.logprobs).max() > 1e-4


def numbers(scores: list[TeacherScores]) -> np.ndarray:
    columns = [np.column_stack([each.logprobs, each.top_logprobs, each.tail]) for each in scores]
    return np.concatenate(columns)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_tokens", [1, 20, 60, 4096])
def test_who_shares_a_pass_does_not_change_the_numbers(attention: str, max_tokens: int) -> None:
    model = random_model()
    model.set_attn_implementation(attention)
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=4, tail=True)
    asked = [request(9, 5 + 3 * place) for place in range(4)] + [request(2, 12, seed=5), request(17, 1, seed=6)]
    together = teacher(model, max_tokens=max_tokens).score(asked, question)
    alone = [teacher(model).score([one], question)[0] for one in asked]
    np.testing.assert_allclose(numbers(together), numbers(alone), atol=2e-5)


def test_passes_hold_equal_prompts_once_and_begin_with_the_longest() -> None:
    asked = [request(10, 3), request(4, 20, seed=1), request(10, 6), request(4, 2, seed=1)]
    # Inputs: a prompt once, and all of a completion but its last token: 4 + 19 + 1, and 10 + 5 + 2.
    model = teacher(max_tokens=24)
    assert model.policy.config._attn_implementation == SEGMENT_ATTENTION
    assert model.passes(asked) == [[1, 3], [2, 0]]
    assert teacher(max_tokens=41).passes(asked) == [[1, 3, 2, 0]]
    assert teacher(max_tokens=40).passes(asked) == [[1, 3, 2], [0]]
    assert teacher(max_tokens=1).passes(asked) == [[1], [3], [2], [0]]


def test_passes_count_padding_where_a_model_needs_it_and_hold_equal_lengths() -> None:
    model = random_model()
    model.set_attn_implementation("eager")
    asked = [request(10, 3), request(4, 20, seed=1), request(10, 6), request(4, 2, seed=1)]
    # Rows of 12, 23, 15 and 5 inputs; two rows of 23 are 46, three of 15 are 45.
    assert teacher(model, max_tokens=45).passes(asked) == [[1], [2, 0, 3]]
    assert teacher(model, max_tokens=46).passes(asked) == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("asked", "question", "kind", "says"),
    [
        (request(3, 2), TeacherQuestion(vocab_size=261), ConfigError, "know the student's 261 tokens, but knows 260"),
        (request(3, 2), TeacherQuestion(vocab_size=100, top_k=101), ConfigError, r"top_k must be in \[0, 100\]"),
        (request(3, 2), TeacherQuestion(vocab_size=100, temperature=0.0), ConfigError, "must be a positive number"),
        (request(500, 13), PLAIN, DataError, "at most 512 tokens, got 500 of context and 13"),
        (request(0, 2), PLAIN, DataError, "at least one token of context"),
        (request(3, 0), PLAIN, DataError, "one of completion, got 3 and 0"),
        (request(3, 40), TeacherQuestion(vocab_size=9), DataError, "a vocabulary of 9, but its completion holds"),
        (request(3, 1, support=np.array([[260]], np.int32)), PLAIN, DataError, "its tokens asked about holds 260"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(
    asked: TeacherRequest, question: TeacherQuestion, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        teacher().score([asked], question)


def test_a_shorter_context_may_be_ordered_and_not_a_longer_one() -> None:
    with pytest.raises(DataError, match="at most 8 tokens"):
        teacher(max_model_len=8).score([request(5, 4)], PLAIN)
    with pytest.raises(DataError, match="at most 512 tokens"):
        teacher(max_model_len=9999).score([request(500, 13)], PLAIN)


# How weights follow -----------------------------------------------------------------------------------------------


def payload(model: torch.nn.Module, version: int) -> WeightPayload:
    return export_weights(model.named_parameters(), version=version)


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().double() for name, tensor in model.named_parameters()}


def assert_same(model: torch.nn.Module, expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.double(), expected[name], atol=atol, rtol=0, msg=name)


POLICIES = [random_model(seed=10 + version) for version in range(6)]
"""What the learner has after each step."""


def test_a_live_teacher_is_what_was_published_last() -> None:
    model = random_model()
    weights = CopiedWeights(model)
    assert weights.identity is None
    assert weights.take(payload(POLICIES[0], 0)) and weights.take(payload(POLICIES[3], 3))
    assert_same(model, values(POLICIES[3]), atol=0)
    assert not weights.take(payload(POLICIES[2], 2)) and not weights.take(payload(POLICIES[4], 3))
    assert_same(model, values(POLICIES[3]), atol=0)
    assert weights.identity == payload(POLICIES[3], 3).identity


def test_an_average_begins_at_the_first_version_and_blends_each_further_one() -> None:
    model = random_model()
    weights = AveragedWeights(model, averaging(rate=0.25))
    expected = values(POLICIES[0])
    # After every step: teacher <- (1 - rate) teacher + rate policy.
    assert weights.take(payload(POLICIES[0], 0))
    for version in (1, 2, 3):
        assert not weights.take(payload(POLICIES[version], version))
        policy = values(POLICIES[version])
        expected = {name: 0.75 * tensor + 0.25 * policy[name] for name, tensor in expected.items()}
    assert_same(model, expected)
    assert not weights.take(payload(POLICIES[5], 3)) and not weights.take(payload(POLICIES[5], 1))
    assert_same(model, expected)
    assert weights.identity == payload(POLICIES[3], 3).identity


def test_an_average_begins_at_the_version_it_is_given_first_whatever_its_number() -> None:
    model = random_model()
    weights = AveragedWeights(model, averaging(rate=0.5, every=2))
    weights.take(payload(POLICIES[0], 3))
    expected, policy = values(POLICIES[0]), values(POLICIES[1])
    assert_same(model, expected, atol=0)
    # Only step 4 is due after step 3.
    weights.take(payload(POLICIES[1], 4))
    assert_same(model, {name: 0.5 * tensor + 0.5 * policy[name] for name, tensor in expected.items()})


def test_versions_that_were_missed_are_stood_in_for_by_the_one_at_hand() -> None:
    model = random_model()
    weights = AveragedWeights(model, averaging(rate=0.5))
    weights.take(payload(POLICIES[0], 0))
    weights.take(payload(POLICIES[4], 3))
    first, last = values(POLICIES[0]), values(POLICIES[4])
    assert_same(model, {name: tensor / 8 + 7 / 8 * last[name] for name, tensor in first.items()})


def test_steps_between_two_blends_count_as_pulled_and_change_nothing() -> None:
    model = random_model()
    weights = AveragedWeights(model, averaging(rate=0.5, every=3))
    weights.take(payload(POLICIES[0], 0))
    weights.take(payload(POLICIES[1], 1))
    assert_same(model, values(POLICIES[0]), atol=0)
    assert weights.identity is not None and weights.identity.version == 1


def test_weights_of_16_bits_are_averaged_in_float32() -> None:
    model = random_model().bfloat16()
    weights = AveragedWeights(model, averaging(rate=0.01))
    first, policy = random_model(seed=10).bfloat16(), random_model(seed=11).bfloat16()
    weights.take(payload(first, 0))
    for version in range(1, 101):
        weights.take(payload(policy, version))
    kept, last = 0.99**100, values(policy)
    # Half a step of bfloat16 between 1 and 2; in bfloat16 itself most blends would be lost.
    assert_same(model, {name: kept * tensor + (1 - kept) * last[name] for name, tensor in values(first).items()}, 4e-3)


def damaged(good: WeightPayload) -> WeightPayload:
    buffer = good.buffer.copy()
    buffer[5] ^= 1
    return WeightPayload(identity=good.identity, manifest=good.manifest, buffer=buffer)


@pytest.mark.parametrize("make", [CopiedWeights, lambda model: AveragedWeights(model, averaging(rate=0.5))])
def test_weights_that_are_wrong_are_refused_and_the_old_ones_kept(make: type[CopiedWeights]) -> None:
    model = random_model()
    weights = make(model)
    weights.take(payload(POLICIES[0], 0))
    with pytest.raises(WeightError, match="checksum"):
        weights.take(damaged(payload(POLICIES[1], 1)))
    with pytest.raises(WeightError, match="missing"):
        weights.take(payload(random_model(family="llama"), 1))
    assert_same(model, values(POLICIES[0]), atol=0)
    assert weights.identity is not None and weights.identity.version == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_average_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    pace = averaging(rate=0.03, every=2)
    whole, resumed = random_model().to(dtype), random_model(seed=3).to(dtype)
    weights, again = AveragedWeights(whole, pace), AveragedWeights(resumed, pace)
    for version in (0, 1, 2, 3):
        weights.take(payload(POLICIES[version], version))
    assert weights.save(tmp_path / "teacher")
    again.restore(tmp_path / "teacher")
    assert again.identity == weights.identity
    for version in (3, 4, 5):
        weights.take(payload(POLICIES[version], version))
        again.take(payload(POLICIES[version], version))
    assert_same(resumed, values(whole), atol=0)
    assert [file.name for file in (tmp_path / "teacher").iterdir()] == [FILE]
    # Once more into the same folder, and back.
    assert weights.save(tmp_path / "teacher")
    again.restore(tmp_path / "teacher")
    assert_same(resumed, values(whole), atol=0)


def test_equal_averages_have_equal_files(tmp_path: Path) -> None:
    for name in map(str, range(8)):
        weights = AveragedWeights(random_model(), averaging(rate=0.5))
        weights.take(payload(POLICIES[0], 0))
        weights.save(tmp_path / name)
    assert len({(tmp_path / name / FILE).read_bytes() for name in map(str, range(8))}) == 1


def test_an_average_as_old_checkpoints_have_it_is_found(tmp_path: Path) -> None:
    model, resumed = random_model(), random_model(seed=3)
    weights, again = AveragedWeights(model, averaging(rate=0.5)), AveragedWeights(resumed, averaging(rate=0.5))
    for version in (0, 1):
        weights.take(payload(POLICIES[version], version))
    weights.save(tmp_path)
    assert weights.identity is not None
    facts = {"format": "pt", "step": "1", "version": "1", "checksum": weights.identity.checksum}
    save_file(load_file(tmp_path / FILE), tmp_path / "average.safetensors", metadata=facts)
    (tmp_path / FILE).unlink()
    again.restore(tmp_path)
    assert again.identity == weights.identity
    assert_same(resumed, values(model), atol=0)


def test_an_average_that_cannot_be_kept_or_found_is_told(tmp_path: Path) -> None:
    model = random_model()
    weights = AveragedWeights(model, averaging(rate=0.5))
    with pytest.raises(CheckpointError, match="must have been given weights"):
        weights.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors must hold the teacher's average"):
        weights.restore(tmp_path)
    weights.take(payload(POLICIES[0], 0))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="must be written"):
        weights.save(tmp_path / "file")
    weights.save(tmp_path)
    file = tmp_path / FILE
    with pytest.raises(CheckpointError, match="those of this model"):
        AveragedWeights(random_model(family="llama"), averaging(rate=0.5)).restore(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    before = values(model)
    with pytest.raises(CheckpointError, match="SafetensorError"):
        weights.restore(tmp_path)
    assert_same(model, before, atol=0)


def test_what_comes_from_the_learner_is_not_kept(tmp_path: Path) -> None:
    weights = CopiedWeights(random_model())
    assert not weights.save(tmp_path / "teacher") and not (tmp_path / "teacher").exists()
    weights.restore(tmp_path / "teacher")
    assert weights.identity is None


# How a teacher is loaded ------------------------------------------------------------------------------------------


def source(kind: TeacherKind, model: ModelConfig, **weights: object) -> TeacherSource:
    return TeacherSource(
        name=kind.value, kind=kind, model=model, options=TeacherConfig(), weights=TeacherWeights(**weights)
    )


def adapter_folder(base: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """A trained adapter, and the merged weights it stands for."""
    policy = load_policy(ModelConfig(model_name_or_path=base, use_peft=True, gradient_checkpointing=False))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folder.mkdir()
    save_adapter(policy, folder)
    return str(folder), {name: tensor.clone().double() for name, tensor in merged_weights(policy)}


def test_a_base_teacher_of_a_run_that_started_from_an_adapter_has_that_adapter(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "model")
    folder, merged = adapter_folder(base, tmp_path / "adapter")
    config = ModelConfig(model_name_or_path=folder, use_peft=True)
    plain = random_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged[name])
    [said] = load_teacher_model(source(TeacherKind.BASE, config)).score([request(4, 5)], PLAIN)
    [expected] = teacher(plain).score([request(4, 5)], PLAIN)
    [without] = teacher(random_model()).score([request(4, 5)], PLAIN)
    np.testing.assert_allclose(said.logprobs, expected.logprobs, atol=1e-4)
    assert np.abs(said.logprobs - without.logprobs).max() > 0.01


@pytest.mark.parametrize("kind", [TeacherKind.EMA, TeacherKind.LIVE])
def test_a_teacher_that_follows_a_policy_with_an_adapter_is_the_plain_model(tmp_path: Path, kind: TeacherKind) -> None:
    base = build_tiny_model(tmp_path / "model")
    folder, merged = adapter_folder(base, tmp_path / "adapter")
    told = source(kind, ModelConfig(model_name_or_path=folder, use_peft=True, lora_kwargs={"bias": "none"}))
    model = load_teacher_model(told)
    weights = follow_policy(told, model.policy)
    assert weights is not None
    tensors = [(name, tensor.float()) for name, tensor in merged.items()]
    # Version 0 brings what training started from: base and adapter.
    assert weights.take(export_weights(tensors, version=0))
    assert_same(model.policy, merged)


def test_a_new_adapter_leaves_the_base_teacher_plain(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "model")
    told = source(TeacherKind.BASE, ModelConfig(model_name_or_path=base, use_peft=True, use_dora=True))
    model = load_teacher_model(told)
    assert_same(model.policy, values(random_model()), atol=0)
    assert follow_policy(told, model.policy) is None
    assert not any(parameter.requires_grad for parameter in model.policy.parameters())
    assert not model.policy.training


def test_an_external_teacher_is_loaded_as_its_options_say(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "model")
    options = TeacherOptions(name="big", model_name_or_path=base, dtype=Dtype.BFLOAT16, max_model_len=30)
    told = TeacherSource(name="big", kind=TeacherKind.EXTERNAL, model=options.model, options=options)
    model = load_teacher_model(told)
    assert next(model.policy.parameters()).dtype == torch.bfloat16
    with pytest.raises(DataError, match="at most 30 tokens"):
        model.score([request(20, 11)], PLAIN)
    [said] = model.score([request(20, 10)], TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=3))
    assert said.top_logprobs is not None and said.top_logprobs.dtype == np.float32
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="must exist"):
        load_teacher_model(told)


def test_the_payload_of_a_teacher_in_another_format_is_converted() -> None:
    model = random_model().bfloat16()
    CopiedWeights(model).take(payload(POLICIES[0], 0))
    sent = dict(named_tensors(payload(POLICIES[0], 0)))
    assert all(torch.equal(tensor, sent[name].bfloat16()) for name, tensor in model.named_parameters())
