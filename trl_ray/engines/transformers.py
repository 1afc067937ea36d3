"""The transformers engine: batches of ready requests, decoded with a KV cache; the numerical reference.

    queue of rows -> [prefill distinct prompts once, expand to rows] -> sample -> [one token per row] -> sample ...
                      ^ again for all rows after a weight update, over prompt and completion so far

    queue of questions -> [as many completions as fit one pass] -> TeacherAnswer each      (before the next token)

Models with recurrent layers (state spaces, linear attention, short convolutions), and those that heed no padding or
keep no cache (`keeps_cache`), are read anew for every token.
A row is one sample of one request. A batch takes all rows that are ready, up to max_num_seqs; rows that arrive later
wait for the next batch. B rows, S positions so far, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase
from transformers.utils import logging

from trl_ray.engines.backend import CHECKPOINT_VERSION, Finished, Limits
from trl_ray.engines.checkpoint_facts import at_revision, read_facts, stop_ids_of
from trl_ray.engines.logit_rules import LogitRules
from trl_ray.engines.sampling import BatchSampling, draw, policy_logprobs, processed_logprobs, sample_seed
from trl_ray.engines.start.cache_proof import keeps_cache
from trl_ray.engines.thread import EngineThread
from trl_ray.models.companions.teacher_model import TeacherModel
from trl_ray.models.policy_loading import positions_of
from trl_ray.models.quantised_checkpoints import dequantising, make_plain
from trl_ray.models.scoring.head import check_head
from trl_ray.models.scoring.rope_regimes import compute_by_sequence
from trl_ray.models.scoring.segment_attention import heed_soft_cap
from trl_ray.models.vocabulary import add_rows
from trl_ray.models.weight_payload import build_manifest, named_tensors
from trl_ray.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    IntArray,
    SamplingParams,
    TeacherQuestion,
    TeacherRequest,
    VersionSpan,
    WeightPayload,
)
from trl_ray.wire.teacher_answers import join_scores

_SCORED_TOKENS = 4096
"""Tokens of one forward pass over completions to score, unless one alone has more."""


class TransformersEngine(EngineThread):
    """Generates with a Hugging Face model. The same requests in one `submit` on an idle engine give the same bits.

    Args:
        model: path or hub name, or a causal language model that already exists (it is used in place, and updated).
        tokenizer: needed with a model object; with a path it takes the place of the model's own, and may be longer.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ignored with a model object.
        max_model_len: prompt and completion tokens of one sequence.
        max_num_seqs: rows of one batch.
        hang_deadline_s: seconds without a finished step after which the engine counts as hung.
        seed: accepted for symmetry; every sample draws from the generator of its request.
        trust_remote_code: run model code from the hub.
        revision: of a hub name.
        eos_token: ends a completion beside the tokens that tokenizer and generation config name.
        config_changes: of the model's configuration; ignored with a model object.
        engine_kwargs: further arguments of `from_pretrained`, e.g. ``{"attn_implementation": "eager"}``.

    Raises:
        ModelError: the model cannot be read.
    """

    def __init__(
        self,
        *,
        model: str | torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str = "float32",
        max_model_len: int = 2048,
        max_num_seqs: int = 64,
        hang_deadline_s: float = 300.0,
        seed: int = 0,
        trust_remote_code: bool = False,
        revision: str | None = None,
        eos_token: str | None = None,
        config_changes: Mapping[str, Any] | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        del seed
        backend = TransformersBackend(
            model=model,
            tokenizer=tokenizer,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            trust_remote_code=trust_remote_code,
            revision=revision,
            eos_token=eos_token,
            config_changes=dict(config_changes or {}),
            engine_kwargs=dict(engine_kwargs or {}),
        )
        super().__init__(backend, name="transformers", max_num_seqs=max_num_seqs, hang_deadline_s=hang_deadline_s)


@dataclass(slots=True, kw_only=True, eq=False)
class _Row:
    """One sample on its way."""

    key: str
    index: int
    prompt: list[int]
    sampling: SamplingParams
    max_tokens: int
    uniforms: torch.Tensor
    """[max_tokens] float64, all that this sample will ever draw."""
    rules: LogitRules | None = None
    """Of its request's further fields; None without any."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def append(self, token: int, logprob: float, version: int) -> None:
        """Take one token, sampled by `version`."""
        start = len(self.tokens)
        if self.spans and self.spans[-1].version == version:
            start = self.spans.pop().start
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.spans.append(VersionSpan(version=version, start=start, end=len(self.tokens)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    """A question about one completion that waits for its answer."""

    key: str
    request: TeacherRequest
    question: TeacherQuestion

    def goes_with(self, other: _Asked) -> bool:
        """Whether one pass can answer both."""
        return self.question == other.question and self._num_support == other._num_support

    @property
    def _num_support(self) -> int | None:
        return None if self.request.support_ids is None else self.request.support_ids.shape[1]


@dataclass(slots=True, kw_only=True, eq=False)
class _Batch:
    """Rows that run together. Without a cache the next step prefills all of them."""

    rows: list[_Row]
    sampling: BatchSampling
    seen: torch.Tensor | None
    """[B, V] tokens of prompt and completion, when some row has a repetition penalty."""
    cache: DynamicCache | None = None
    mask: torch.Tensor | None = None
    """[B, S] 1 where a position is a token, 0 where it is padding on the left."""


class TransformersBackend:
    """Decoding loop and scheduler over one model; see `TransformersEngine` for the arguments."""

    def __init__(
        self,
        *,
        model: str | torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        trust_remote_code: bool,
        revision: str | None,
        eos_token: str | None,
        config_changes: dict[str, Any],
        engine_kwargs: dict[str, Any],
    ) -> None:
        assert isinstance(model, str) or tokenizer is not None, "a model object needs its tokenizer"
        self._source = model
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._trust_remote_code, self._revision = trust_remote_code, revision
        self._eos_token, self._config_changes = eos_token, config_changes
        self._engine_kwargs = engine_kwargs
        self._version = CHECKPOINT_VERSION.version
        self._waiting: deque[_Row] = deque()
        self._scores: deque[tuple[str, IntArray]] = deque()
        self._questions: list[_Asked] = []
        self._teacher: TeacherModel | None = None
        self._groups: dict[str, list[Completion | None]] = {}
        self._batch: _Batch | None = None
        self._model: Any = None
        self._tokenizer: Any = tokenizer
        self._vocab_size = 0
        self._stop_ids: tuple[int, ...] = ()

    def build(self) -> Limits:
        """Load the model onto the GPU where there is one.

        Raises:
            ModelError: the model cannot be read.
        """
        if isinstance(self._source, str):
            facts = read_facts(
                self._source,
                dtype=self._dtype,
                trust_remote_code=self._trust_remote_code,
                revision=self._revision,
                eos_token=self._eos_token,
                tokenizer=self._tokenizer,
                config_changes=self._config_changes,
            )
            disable_progress_bar: Any = logging.disable_progress_bar
            disable_progress_bar()
            options: dict[str, Any] = {"dtype": self._dtype, "trust_remote_code": self._trust_remote_code}
            options |= at_revision(self._revision) | self._config_changes
            plain = dequantising(self._source, self._revision)  # as the learner holds them
            options |= {} if plain is None else {"quantization_config": plain}
            options |= self._engine_kwargs
            model: Any = AutoModelForCausalLM.from_pretrained(self._source, **options)
            if plain is not None:
                make_plain(model, getattr(torch, self._dtype))
            compute_by_sequence(model)
            if "attn_implementation" not in self._engine_kwargs:
                heed_soft_cap(model)
            if facts.grown:
                add_rows(model, facts.vocab_size)
            self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
            self._tokenizer, self._stop_ids = facts.tokenizer, facts.stop_ids
        else:
            self._model = self._source
            if self._eos_token is not None:
                self._tokenizer.eos_token = self._eos_token
            self._stop_ids = stop_ids_of(self._tokenizer, getattr(self._source, "generation_config", None))
        text = self._model.config.get_text_config()
        self._vocab_size = text.vocab_size
        self._max_model_len = min(self._max_model_len, positions_of(text) or self._max_model_len)
        return Limits(
            max_model_len=self._max_model_len,
            vocab_size=self._vocab_size,
            manifest=build_manifest(self._model.named_parameters()),
        )

    def add(self, key: str, request: GenerationRequest) -> None:
        """Queue the n rows of a request.

        Raises:
            ValueError: its further fields cannot be used.
        """
        rules = self._rules(request.sampling.fields)
        prompt = [int(token) for token in request.prompt_ids]
        max_tokens = min(request.sampling.max_tokens, self._max_model_len - len(prompt))
        self._groups[key] = [None] * request.n
        for index in range(request.n):
            generator = torch.Generator().manual_seed(sample_seed(request.seed, index))
            self._waiting.append(
                _Row(
                    key=key,
                    index=index,
                    prompt=prompt,
                    sampling=request.sampling,
                    max_tokens=max_tokens,
                    uniforms=torch.rand(max_tokens, generator=generator, dtype=torch.float64),
                    rules=rules,
                )
            )

    def _rules(self, fields: Mapping[str, Any]) -> LogitRules | None:
        if not fields:
            return None
        device = self._model.device
        return LogitRules(fields, tokenizer=self._tokenizer, vocab_size=self._vocab_size, device=device)

    def add_score(self, key: str, token_ids: IntArray) -> None:
        """Queue one sequence; it is scored at the next step, before any decoding."""
        self._scores.append((key, token_ids))

    def check_question(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        """Any question can be answered."""

    def add_question(self, key: str, request: TeacherRequest, question: TeacherQuestion) -> None:
        """Queue one completion; it is scored before any further decoding, together with others.

        Raises:
            ModelError: the model's log-probs cannot be computed from its head.
            DataError: tokens that are asked about are outside the vocabulary.
        """
        if self._teacher is None:
            check_head(self._model)
            self._teacher = TeacherModel(
                self._model,
                name="transformers",
                max_tokens_per_batch=_SCORED_TOKENS,
                max_model_len=self._max_model_len,
            )
        self._teacher.check([request], question)
        self._questions.append(_Asked(key=key, request=request, question=question))

    def abort(self, keys: Sequence[str]) -> None:
        """Drop queued rows and take running ones out of the batch."""
        gone = set(keys)
        for key in gone:
            self._groups.pop(key, None)
        self._waiting = deque(row for row in self._waiting if row.key not in gone)
        self._scores = deque(item for item in self._scores if item[0] not in gone)
        self._questions = [item for item in self._questions if item.key not in gone]
        if self._batch is not None:
            self._keep([row.key not in gone for row in self._batch.rows])

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """Score one queued sequence, or some completions, or sample one token for every row of the batch."""
        if self._scores:
            key, ids = self._scores.popleft()
            return [Finished(key=key, result=self._score(ids))]
        if self._questions:
            return self._answer()
        if self._batch is None:
            self._batch = self._next_batch()
        self._sample(self._batch, self._forward(self._batch))
        return self._retire(self._batch)

    @torch.no_grad()
    def load(self, payload: WeightPayload) -> None:
        """Copy into the parameters; rows in flight are prefilled again at the next step."""
        parameters = dict(self._model.named_parameters())
        for name, tensor in named_tensors(payload):
            parameters[name].copy_(tensor)
        self._version = payload.identity.version
        if self._batch is not None:
            self._batch.cache = None

    def close(self) -> None:
        """Let go of model and rows."""
        self._model = self._batch = self._teacher = None
        self._waiting.clear()

    # Decoding ---------------------------------------------------------------------------------------------------

    def _next_batch(self) -> _Batch:
        rows = [self._waiting.popleft() for _ in range(min(self._max_num_seqs, len(self._waiting)))]
        batch = _Batch(rows=rows, sampling=self._columns(rows), seen=None)
        if batch.sampling.penalises:
            batch.seen = torch.zeros(len(rows), self._vocab_size, dtype=torch.bool, device=self._model.device)
            for index, row in enumerate(rows):
                batch.seen[index, row.prompt] = True
        return batch

    def _columns(self, rows: Sequence[_Row]) -> BatchSampling:
        return BatchSampling.of([row.sampling for row in rows], vocab_size=self._vocab_size, device=self._model.device)

    def _forward(self, batch: _Batch) -> torch.Tensor:
        """Logits [B, V] of the next token of every row."""
        if not self._keeps_cache:
            return self._read_whole(batch)
        if batch.cache is None:
            return self._prefill(batch)
        assert batch.mask is not None
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        output = self._model(
            input_ids=self._tensor([[row.tokens[-1]] for row in batch.rows]),
            attention_mask=batch.mask,
            position_ids=batch.mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=batch.cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    @cached_property
    def _keeps_cache(self) -> bool:
        """Whether what the model remembers can be dealt out to rows, and taken from them."""
        return keeps_cache(self._model)

    def _read_whole(self, batch: _Batch) -> torch.Tensor:
        """Logits [B, V] without a cache, of sequences as they are: padding would enter what they compute.

        The work of a token grows with its place; vLLM keeps such states.
        """
        sequences = [tuple(row.prompt + row.tokens) for row in batch.rows]
        found: dict[tuple[int, ...], torch.Tensor] = {}
        for length in sorted({len(ids) for ids in sequences}):
            alike = [ids for ids in dict.fromkeys(sequences) if len(ids) == length]
            logits = self._model(input_ids=self._tensor(alike), use_cache=False).logits[:, -1]
            found |= dict(zip(alike, logits, strict=True))
        return torch.stack([found[ids] for ids in sequences])

    def _prefill(self, batch: _Batch) -> torch.Tensor:
        """Run every distinct sequence once, then give each row its copy of cache and logits [B, V]."""
        sequences = [tuple(row.prompt + row.tokens) for row in batch.rows]
        distinct = list(dict.fromkeys(sequences))
        longest = max(map(len, distinct))
        mask = self._tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in distinct])
        output = self._model(
            input_ids=self._tensor([[0] * (longest - len(ids)) + list(ids) for ids in distinct]),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=DynamicCache(config=self._model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        place = {ids: index for index, ids in enumerate(distinct)}
        rows = self._tensor([place[ids] for ids in sequences])
        output.past_key_values.batch_select_indices(rows)
        batch.cache, batch.mask = output.past_key_values, mask[rows]
        logits: torch.Tensor = output.logits[rows, -1]
        return logits

    def _sample(self, batch: _Batch, logits: torch.Tensor) -> None:
        """Draw one token per row and note it with log-prob and version."""
        ruled = any(row.rules is not None for row in batch.rows)
        logprobs = processed_logprobs(
            _biased(batch.rows, logits) if ruled else logits,
            batch.sampling,
            lengths=self._tensor([[len(row.tokens)] for row in batch.rows]),
            stop_ids=self._tensor(list(self._stop_ids)),
            seen=batch.seen,
            penalties=_penalties(batch.rows, logits) if ruled else None,
            cut_off=(lambda scores: _cut_off(batch.rows, scores)) if ruled else None,
        )
        uniforms = torch.stack([row.uniforms[len(row.tokens)] for row in batch.rows]).unsqueeze(1)
        tokens = draw(logprobs, batch.sampling, uniforms.to(logprobs.device))
        if batch.seen is not None:
            batch.seen.scatter_(1, tokens, True)
        if batch.sampling.of_policy is not None:
            logprobs = torch.where(batch.sampling.of_policy, policy_logprobs(logits, batch.sampling), logprobs)
        chosen = logprobs.gather(1, tokens)[:, 0].tolist()
        for row, token, logprob in zip(batch.rows, tokens[:, 0].tolist(), chosen, strict=True):
            row.append(token, logprob, self._version)
            row.finish_reason = self._finish_reason(row)

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        own = row.rules is not None and row.tokens[-1] in row.rules.stop_ids
        if own or row.tokens[-1] in self._stop_ids or self._hit_stop_string(row):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(row.tokens) >= row.max_tokens else None

    def _hit_stop_string(self, row: _Row) -> bool:
        if not row.sampling.stop or len(row.tokens) <= row.sampling.min_tokens:
            return False
        # A character takes at most four tokens; a few more keep a cut-off character at the start out of the match.
        tail = 4 * max(map(len, row.sampling.stop)) + 8
        text = self._tokenizer.decode(row.tokens[row.sampling.min_tokens :][-tail:], skip_special_tokens=True)
        return any(stop in text for stop in row.sampling.stop)

    def _retire(self, batch: _Batch) -> list[Finished]:
        """Take finished rows out of the batch; a request is done with its last row."""
        finished = []
        for row in batch.rows:
            if row.finish_reason is None:
                continue
            group = self._groups[row.key]
            group[row.index] = self._completion(row, row.finish_reason)
            done = tuple(completion for completion in group if completion is not None)
            if len(done) == len(group):
                del self._groups[row.key]
                finished.append(Finished(key=row.key, result=done))
        self._keep([row.finish_reason is None for row in batch.rows])
        return finished

    def _keep(self, wanted: Sequence[bool]) -> None:
        """Shrink the batch to the wanted rows, so that finished ones cost nothing more."""
        batch = self._batch
        if batch is None or all(wanted):
            return
        indices = [index for index, keep in enumerate(wanted) if keep]
        if not indices:
            self._batch = None
            return
        rows = self._tensor(indices)
        batch.rows = [batch.rows[index] for index in indices]
        batch.sampling = self._columns(batch.rows)
        batch.seen = None if batch.seen is None else batch.seen[rows]
        if batch.cache is not None and batch.mask is not None:
            batch.cache.batch_select_indices(rows)
            batch.mask = batch.mask[rows]

    def _completion(self, row: _Row, reason: FinishReason) -> Completion:
        return Completion(
            token_ids=np.asarray(row.tokens, dtype=np.int32),
            logprobs=np.asarray(row.logprobs, dtype=np.float32),
            versions=tuple(row.spans),
            finish_reason=reason,
            text=self._tokenizer.decode(row.tokens, skip_special_tokens=True),
        )

    def _score(self, ids: IntArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[T-1] log-probs of one sequence [T]."""
        tokens = self._tensor([[int(token) for token in ids]])
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        scores = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])[:, 0]
        result: np.ndarray[Any, np.dtype[np.float32]] = scores.cpu().numpy()
        return result

    def _answer(self) -> list[Finished]:
        """Answer the first question, and those that one pass can answer with it."""
        assert self._teacher is not None, "made with the first question"
        alike = [each for each in self._questions if each.goes_with(self._questions[0])]
        chosen = [alike[place] for place in self._teacher.passes([each.request for each in alike])[0]]
        gone = {each.key for each in chosen}
        self._questions = [each for each in self._questions if each.key not in gone]
        self._teacher.version = self._version
        scores = self._teacher.forward(
            [each.request for each in chosen], dataclasses.replace(chosen[0].question, tail=False)
        )
        return [
            Finished(key=each.key, result=join_scores([answer])) for each, answer in zip(chosen, scores, strict=True)
        ]

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


def _biased(rows: Sequence[_Row], logits: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] with the biases and bans of the rows that have some."""
    return torch.stack(
        [
            scores.float()
            if row.rules is None
            else row.rules.before(scores, prompt=row.prompt, tokens=row.tokens, min_tokens=row.sampling.min_tokens)
            for row, scores in zip(rows, logits, strict=True)
        ]
    )


def _penalties(rows: Sequence[_Row], logits: torch.Tensor) -> torch.Tensor:
    nothing = torch.zeros(logits.shape[1], device=logits.device)
    return torch.stack([nothing if row.rules is None else row.rules.penalties(row.tokens) for row in rows])


def _cut_off(rows: Sequence[_Row], scores: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [
            each if row.rules is None else row.rules.after(each, prompt=row.prompt, tokens=row.tokens)
            for row, each in zip(rows, scores, strict=True)
        ]
    )
