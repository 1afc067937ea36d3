"""What a causal language model says of completions that it did not write: the teacher that computes with transformers.

TeacherRequest x B --passes--> forward passes of similar lengths, each prompt once, no padding where the model allows it
one pass: hidden [N,H] --the head's first V rows--> own [N] | top-k [N,K] | given [N,S] | tail [N] --> TeacherScores

Logits [N, V] are never made (`algorithms.logprobs`). Who holds which weights is `models.teacher_weights`' business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trl_ray.algorithms.batches.work_sharing import Bin, CutRules, piece_of
from trl_ray.algorithms.head.head_problem import ExtraOutputs
from trl_ray.algorithms.head.logprobs import TokenLogprobs, token_logprobs
from trl_ray.config.sections import ModelConfig, SharePrompt
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.errors import ConfigError, DataError
from trl_ray.models.policy_loading import Policy, find_source, load_policy
from trl_ray.models.scoring.head import head_module
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.models.scoring.segment_attention import SEGMENT_ATTENTION
from trl_ray.types import FloatArray, IntArray, TeacherQuestion, TeacherRequest, TeacherScores, TrainingSample
from trl_ray.wire.teacher_answers import TeacherAnswer, split_answer, tail_of, width_of


def teacher_model_config(source: TeacherSource) -> ModelConfig:
    """The options under which a teacher's model is loaded: frozen, never quantised.

    Published weights come with the adapter merged, so a teacher that follows the policy is the plain base model. One
    that keeps the weights training started from has the adapter that training started from, if there was one.

    Raises:
        ModelError: a folder is missing or incomplete.
    """
    model = source.model.replace(gradient_checkpointing=False, load_in_4bit=False, load_in_8bit=False)
    if not model.use_peft:
        return model
    found = find_source(model)
    if source.is_initial and found.initial_adapter is not None:
        return model
    return model.replace(
        model_name_or_path=found.base,
        model_revision=found.revision or "main",
        use_peft=False,
        use_dora=False,
        use_rslora=False,
        lora_modules_to_save=None,
        lora_kwargs={},
    )


def load_teacher_model(source: TeacherSource, *, device: torch.device | str = "cpu") -> TeacherModel:
    """Load a teacher's model; one that follows the policy is yet to be given its weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    model, options = teacher_model_config(source), source.options
    return TeacherModel(
        load_policy(model, device=device, trainable=False),
        name=source.name,
        max_tokens_per_batch=options.max_tokens_per_batch,
        max_model_len=source.external.max_model_len if source.external is not None else None,
        bf16=bool(model.bf16),
    )


class TeacherModel:
    """Answers requests; not for several threads at once.

    Args:
        policy: the model, frozen; nothing else may wrap its head.
        name: as scores and messages bear it.
        max_tokens_per_batch: model inputs of one forward pass, unless one request alone has more.
        max_model_len: tokens of context and completion together; None takes what the model allows.
        bf16: run matrix products in bfloat16.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        name: str,
        max_tokens_per_batch: int,
        max_model_len: int | None = None,
        bf16: bool = False,
    ) -> None:
        self.name, self.policy = name, policy
        self.version: int | None = None
        """Of its weights, as scores bear it; None where they never change."""
        self._module = ScoringModule(policy, chunk_size=None, bf16=bf16)
        self._scorer = SampleScorer(self._module, share_prompt=SharePrompt.AUTO, temperature=1.0)
        has_segments = policy.config._attn_implementation == SEGMENT_ATTENTION
        self._rules = CutRules(max_tokens=max_tokens_per_batch, padded=not has_segments)
        allowed = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        limits = [int(limit) for limit in (max_model_len, allowed) if limit]
        self._max_model_len = min(limits) if limits else None

    @property
    def vocab_size(self) -> int:
        """Entries of its vocabulary, padding included."""
        return int(head_module(self.policy).weight.shape[0])

    def check(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        """Refuse what cannot be computed.

        Raises:
            ConfigError: a vocabulary larger than its own, a temperature that is no positive number, or more of its
                tokens than there are.
            DataError: a request is empty or too long, or names ids outside the vocabulary.
        """
        self.check_vocabulary(question.vocab_size)
        if not 0 < question.temperature < math.inf:
            raise ConfigError(f"the temperature must be a positive number, got {question.temperature}. Correct it.")
        if not 0 <= question.top_k <= question.vocab_size:
            raise ConfigError(
                f"top_k must be in [0, {question.vocab_size}], the vocabulary, with teacher {self.name}, got "
                f"{question.top_k}. Lower it."
            )
        width_of(requests, question)
        for index, request in enumerate(requests):
            self._check_request(f"request {index} to teacher {self.name}", request, question)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a student with more tokens.

        Raises:
            ConfigError: it knows fewer.
        """
        if vocab_size > self.vocab_size:
            raise ConfigError(
                f"teacher {self.name} must know the student's {vocab_size} tokens, but knows {self.vocab_size}. Choose "
                "a teacher with the student's tokenizer."
            )

    def _check_request(self, what: str, request: TeacherRequest, question: TeacherQuestion) -> None:
        length = len(request.prompt_ids) + len(request.completion_ids)
        if not len(request.prompt_ids) or not len(request.completion_ids):
            raise DataError(
                f"{what} must have at least one token of context and one of completion, got {len(request.prompt_ids)} "
                f"and {len(request.completion_ids)}."
            )
        if self._max_model_len is not None and length > self._max_model_len:
            raise DataError(
                f"{what} must have at most {self._max_model_len} tokens, got {len(request.prompt_ids)} of context and "
                f"{len(request.completion_ids)} of completion. Shorten one of the two, or raise max_model_len where "
                "the model allows more."
            )
        parts = {"completion": request.completion_ids, "context": request.prompt_ids}
        if request.support_ids is not None:
            parts["tokens asked about"] = request.support_ids
            assert len(request.support_ids) == len(request.completion_ids), "tokens are asked about at every place"
        for part, ids in parts.items():
            if ids.size and not 0 <= ids.min() <= ids.max() < question.vocab_size:
                raise DataError(
                    f"{what} must hold ids of a vocabulary of {question.vocab_size}, but its {part} holds {ids.min()} "
                    f"to {ids.max()}. Tokenise with the student's own tokenizer, which must be the teacher's, too."
                )

    def passes(self, requests: Sequence[TeacherRequest]) -> list[list[int]]:
        """Places of the requests, pass by pass: the longest first, because what does not fit into memory fails at once;
        those that share their prompt one after the other, where it is computed once for them."""
        samples = [_sample(request) for request in requests]
        lengths = [len(request.prompt_ids) + len(request.completion_ids) for request in requests]
        trained = [len(request.completion_ids) for request in requests]
        order = sorted(range(len(requests)), key=lambda place: -lengths[place])
        if not self._rules.padded:
            first: dict[bytes, int] = {}
            for rank, place in enumerate(order):
                first.setdefault(requests[place].prompt_ids.tobytes(), rank)
            order.sort(key=lambda place: first[requests[place].prompt_ids.tobytes()])
        found: list[list[int]] = []
        bin_ = Bin(rules=self._rules)
        for place in order:
            piece = piece_of(samples, [place], trained)
            if not found or not bin_.fits(piece):
                found.append([])
                bin_ = Bin(rules=self._rules)
            bin_.add(piece)
            found[-1].append(place)
        return found

    def score(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """Scores in the order of the requests.

        Raises:
            ConfigError, DataError: see `check`.
        """
        self.check(requests, question)
        found: dict[int, TeacherScores] = {}
        for places in self.passes(requests):
            scores = self.forward([requests[place] for place in places], question)
            found |= dict(zip(places, scores, strict=True))
        return [found[place] for place in range(len(requests))]

    @torch.no_grad()
    def forward(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """One forward pass over requests that have been checked; scores in their order."""
        told = self._judge(requests, question)
        logprobs, ids, top = told.logprobs.float().cpu().numpy(), None, None
        if width_of(requests, question):
            ids, top = _join(told, _support(requests))
        answer = TeacherAnswer(
            lengths=np.array([len(request.completion_ids) for request in requests], dtype=np.int64),
            logprobs=logprobs,
            top_ids=ids,
            top_logprobs=top,
            tail=tail_of(top, tokens=len(logprobs)) if question.tail else None,
            version=self.version,
        )
        return split_answer(answer, teacher=self.name)

    def _judge(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> TokenLogprobs:
        """What the head says of the requests' tokens, one request after the other.

        The vocabulary is cut by leaving out rows of the head, as teachers whose embeddings are padded need it.
        """
        hidden = self._scorer.states([_sample(request) for request in requests])
        assert hidden is not None, "every request has a token"
        head, size = self._module.head_input(hidden), question.vocab_size
        targets, support = np.concatenate([request.completion_ids for request in requests]), _support(requests)
        return token_logprobs(
            hidden,
            head.weight[:size],
            _indices(targets, hidden.device),
            support=None if support is None else _indices(support, hidden.device),
            bias=None if head.bias is None else head.bias[:size],
            temperature=question.temperature,
            compute_dtype=torch.bfloat16 if self._module.bf16 else None,
            transform=head.transform,
            extras=ExtraOutputs(top_k=question.top_k),
        )


def _indices(values: IntArray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _sample(request: TeacherRequest) -> TrainingSample:
    """A request as the layout knows it: equal prompts are one, and every token of the completion is read."""
    return TrainingSample(
        group_id=0,
        prompt_ids=request.prompt_ids,
        completion_ids=request.completion_ids,
        loss_mask=np.ones(len(request.completion_ids), dtype=np.bool_),
    )


def _support(requests: Sequence[TeacherRequest]) -> IntArray | None:
    """[N, S] the given tokens of all requests."""
    given = [request.support_ids for request in requests if request.support_ids is not None]
    return np.concatenate(given) if given else None


def _join(told: TokenLogprobs, support: IntArray | None) -> tuple[IntArray, FloatArray]:
    """Ids and log-probs [N, K + S] of its own tokens and the given ones, of which repeats count as nothing."""
    ids: list[NDArray[np.int32]] = []
    values: list[NDArray[np.float32]] = []
    if told.top_ids is not None and told.top_logprobs is not None:
        ids.append(told.top_ids.to(torch.int32).cpu().numpy())
        values.append(told.top_logprobs.float().cpu().numpy())
    if support is not None and told.support_logprobs is not None:
        given = told.support_logprobs.float().cpu().numpy().copy()
        for place in range(support.shape[1]):
            before = np.concatenate([*ids, support[:, :place]], axis=1)
            given[(before == support[:, place, None]).any(axis=1), place] = -np.inf
        ids.append(support.astype(np.int32))
        values.append(given)
    return np.concatenate(ids, axis=1), np.concatenate(values, axis=1)
