"""The vLLM engine: vLLM's `LLMEngine` inside this process, stepped by a thread of ours; no child process.

    submit -> n child requests with seeds of their own -> LLMEngine.step ... -> CompletionOutput -> Completion
    score_completions -> prompts with prompt_logprobs, scheduled beside what is generated -> TeacherAnswer
    load_weights -> running requests preempted, KV and prefix cache dropped -> weights -> tied heads -> version label

vLLM is imported by `build`, after the environment it reads at import is set. Token versions are vLLM's own: it labels
the tokens of a step with the version set at that step. That is exact here, because weights and label change between
two steps, and asynchronous scheduling (which would hold a step's tokens back) is off.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trl_ray.engines.backend import CHECKPOINT_VERSION, Finished, Limits
from trl_ray.engines.checkpoint_facts import CheckpointFacts, default_kv_bytes, read_facts
from trl_ray.engines.checkpoint_layout import CheckpointLayout, in_checkpoint_layout
from trl_ray.engines.completion_scoring import answer_of, top_width
from trl_ray.engines.sampling import sample_seed
from trl_ray.engines.start.start_errors import START_ERRORS, start_error
from trl_ray.engines.start.vllm_differences import config_corrections, cpu_corrections
from trl_ray.engines.thread import EngineThread
from trl_ray.engines.vllm_workers.policy_logprobs import MARK, report_policy_logprobs
from trl_ray.errors import ConfigError
from trl_ray.models.weight_payload import named_tensors
from trl_ray.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    IntArray,
    TeacherQuestion,
    TeacherRequest,
    VersionSpan,
    WeightPayload,
)

_CPU_BLOCK_SIZE = 32
"""Tokens of a KV block. vLLM's 128 on CPU would share no prompt shorter than that between the samples of a group."""
_CPU_BATCHED_TOKENS = 4096
"""Tokens of one step, at least; prompts are never split on CPU."""
_SPARE_TOKENS = 8
"""Asked for beside the most probable ones where the model has ids that the question's vocabulary lacks."""


class VLLMEngine(EngineThread):
    """Generates with vLLM. Sample i of a request depends on (seed, i), the prompt and the weights alone.

    Args:
        model: path or hub name.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"``.
        max_model_len: prompt and completion tokens of one sequence.
        max_num_seqs: completions generated at once.
        kv_cache_memory_bytes: None takes, on CPU, enough for `max_num_seqs` full-length sequences (at most a fifth of
            the memory), and on GPU what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: share of the GPU's memory; not used on CPU.
        enforce_eager: no graph capture; on CPU always.
        tensor_parallel_size: GPUs of this engine; above 1 vLLM starts worker processes.
        enable_prefix_caching: compute a prompt shared by several samples once.
        max_logprobs: the largest `top_k` that `score_completions` may be asked for; None takes vLLM's own, 20. On a GPU
            vLLM holds log-probs [tokens of one step, V] while it answers, on a CPU those of whole prompts.
        hang_deadline_s: seconds without a finished step after which the engine counts as hung.
        seed: of vLLM's global generator; every sample draws from its own.
        trust_remote_code: run model code from the hub.
        revision: of a hub name.
        eos_token: ends a completion beside the tokens that tokenizer and generation config name.
        tokenizer: takes the place of the model's own, and may be longer.
        config_changes: of the model's configuration.
        engine_kwargs: further `EngineArgs` of vLLM; they win over everything above.

    Raises:
        ModelError: the model cannot be read.
        EngineError: vLLM cannot start with these arguments.
    """

    def __init__(
        self,
        *,
        model: str,
        dtype: str = "auto",
        max_model_len: int = 2048,
        max_num_seqs: int = 64,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
        enable_prefix_caching: bool = True,
        max_logprobs: int | None = None,
        hang_deadline_s: float = 300.0,
        seed: int = 0,
        trust_remote_code: bool = False,
        revision: str | None = None,
        eos_token: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config_changes: Mapping[str, Any] | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        common = {
            "model": model,
            "dtype": dtype,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            "tensor_parallel_size": tensor_parallel_size,
            "enable_prefix_caching": enable_prefix_caching,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
        }
        if revision is not None:
            common |= {"revision": revision, "tokenizer_revision": revision}
        if max_logprobs is not None:
            common["max_logprobs"] = max_logprobs + _SPARE_TOKENS
        backend = VLLMBackend(
            common,
            max_model_len=max_model_len,
            overrides=dict(engine_kwargs or {}),
            eos_token=eos_token,
            tokenizer=tokenizer,
            config_changes=dict(config_changes or {}),
        )
        super().__init__(backend, name="vllm", max_num_seqs=max_num_seqs, hang_deadline_s=hang_deadline_s)


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """The completions of a request that have finished so far, by index."""

    n: int
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Question:
    """What is asked about one completion."""

    length: int
    """Tokens of the completion."""
    question: TeacherQuestion
    width: int
    """Most probable tokens that vLLM gives for each place."""


class VLLMBackend:
    """vLLM's scheduler and worker behind the calls of the engine thread."""

    def __init__(
        self,
        common: dict[str, Any],
        *,
        max_model_len: int,
        overrides: dict[str, Any],
        eos_token: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config_changes: dict[str, Any] | None = None,
    ) -> None:
        self._common = common
        self._config_changes = config_changes or {}
        self._eos_token, self._tokenizer = eos_token, tokenizer
        self._tokenizer_folder: tempfile.TemporaryDirectory[str] | None = None
        self._max_model_len = max_model_len
        self._overrides = overrides
        self._groups: dict[str, _Group] = {}
        self._scores: set[str] = set()
        self._questions: dict[str, _Question] = {}
        self._version = CHECKPOINT_VERSION.version
        self._reports_policy = False
        self._max_logprobs = 0
        self._llm: Any = None
        self._facts: CheckpointFacts | None = None

    def build(self) -> Limits:
        """Start vLLM in this process and thread.

        Raises:
            ModelError: the model cannot be read.
            ConfigError, ResourceError, EngineError: vLLM cannot start with these arguments, or this memory.
        """
        facts = read_facts(
            self._common["model"],
            dtype=self._common["dtype"],
            trust_remote_code=self._common["trust_remote_code"],
            revision=self._common.get("revision"),
            eos_token=self._eos_token,
            tokenizer=self._tokenizer,
            config_changes=self._config_changes,
        )
        self._facts = facts
        self._max_model_len = min(self._max_model_len, facts.max_positions or self._max_model_len)
        prepare_environment(on_gpu=torch.cuda.is_available())
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = self._arguments(facts)
        kept = _class_kept(facts.base_class) if arguments["enforce_eager"] else contextlib.nullcontext()
        try:
            with _random_state_kept(), kept:
                self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except START_ERRORS as error:
            raise start_error("vllm", error, arguments=arguments, given=self._overrides) from error
        self._llm.set_weight_version(str(CHECKPOINT_VERSION.version))
        most = int(self._llm.model_config.max_logprobs)
        self._max_logprobs = most if most >= 0 else facts.vocab_size
        return Limits(
            max_model_len=self._max_model_len,
            vocab_size=facts.vocab_size,
            manifest=facts.manifest,
            starts_from_files=arguments.get("load_format") != "dummy",
        )

    def add(self, key: str, request: GenerationRequest) -> None:
        """Queue n child requests that share the prompt.

        Raises:
            ValueError: vLLM does not accept the request.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        prompt = [int(token) for token in request.prompt_ids]
        if request.sampling.policy_logprobs and not self._reports_policy:
            self._llm.collective_rpc(report_policy_logprobs)
            self._reports_policy = True
        for index in range(request.n):
            try:
                params = self._params(request, index, room=self._max_model_len - len(prompt))
                self._llm.add_request(f"{key}/{index}", tokens_input(prompt), params)
            except (VLLMClientError, TypeError) as error:  # the first sample is refused, or none is
                raise ValueError(str(error)) from error
        self._groups[key] = _Group(n=request.n)

    def add_score(self, key: str, token_ids: IntArray) -> None:
        """Queue a prompt whose own log-probs are wanted; vLLM insists on sampling one token, which is dropped."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, flat_logprobs=True)
        self._llm.add_request(key, tokens_input([int(token) for token in token_ids]), params)
        self._scores.add(key)

    def check_question(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        """Only the own most probable tokens, at temperature 1, and no more than the engine was made for.

        Raises:
            ConfigError: another question.
        """
        if question.temperature != 1:
            raise ConfigError(
                f"the temperature must be 1 where vLLM scores completions, got {question.temperature}: it leaves the "
                "temperature out of log-probs of given tokens. Set temperature=1, or score with transformers."
            )
        if any(request.support_ids is not None for request in requests):
            raise ConfigError(
                "vLLM must be asked about its own most probable tokens only, got others. Ask for the teacher's own "
                "tokens or the sampled ones, or score with transformers."
            )
        if self._width(question) > self._max_logprobs:
            raise ConfigError(
                f"vLLM must be asked for at most {self._max_logprobs} log-probs at each place, as it was started, got "
                f"{self._width(question)}. Ask for fewer, or start it with a higher max_logprobs."
            )

    def add_question(self, key: str, request: TeacherRequest, question: TeacherQuestion) -> None:
        """Queue prompt and completion as one prompt. vLLM reads no cached prefix where log-probs of it are wanted."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        width = self._width(question)
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=width, detokenize=False, flat_logprobs=True
        )
        ids = [*request.prompt_ids.tolist(), *request.completion_ids.tolist()]
        self._llm.add_request(key, tokens_input(ids), params)
        self._questions[key] = _Question(length=len(request.completion_ids), question=question, width=width)

    def abort(self, keys: Sequence[str]) -> None:
        """Take requests out of vLLM's scheduler."""
        for key in keys:
            group = self._groups.pop(key, None)
            if group is not None:
                self._llm.abort_request([f"{key}/{index}" for index in range(group.n) if index not in group.done])
            if key in self._scores or key in self._questions:
                self._scores.discard(key)
                self._questions.pop(key, None)
                self._llm.abort_request([key])

    def step(self) -> list[Finished]:
        """One scheduler step: prompts and decoding together."""
        finished = []
        for output in self._llm.step():
            if not output.finished:
                continue
            if output.request_id in self._scores:
                item: Finished | None = self._take_score(output)
            elif output.request_id in self._questions:
                item = self._take_answer(output)
            else:
                item = self._take_completion(output)
            if item is not None:
                finished.append(item)
        return finished

    def load(self, payload: WeightPayload) -> None:
        """Preempt running requests (they keep their tokens), drop all KV, load, and label what follows."""
        self._llm.reset_prefix_cache(reset_running_requests=True)
        assert self._facts is not None, "an engine is built before weights are loaded"
        self._llm.collective_rpc(reload_worker, args=(payload, self._facts.layout))
        self._llm.set_weight_version(str(payload.identity.version))
        self._version = payload.identity.version

    def close(self) -> None:
        """Free weights and KV cache, and undo vLLM's process-wide distributed state."""
        if self._llm is not None:
            self._llm.engine_core.shutdown()
            self._llm = None
        if self._tokenizer_folder is not None:
            self._tokenizer_folder.cleanup()

    # Arguments --------------------------------------------------------------------------------------------------

    def _arguments(self, facts: CheckpointFacts) -> dict[str, Any]:
        # One position more than ours: to score T tokens vLLM must have room for one to sample, which it never computes.
        length = self._max_model_len + 1
        arguments = dict(self._common)
        arguments |= {
            "max_model_len": length,
            "logprobs_mode": "processed_logprobs",
            "async_scheduling": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self._common["tensor_parallel_size"] == 1:
            arguments["distributed_executor_backend"] = "uni"
        if not torch.cuda.is_available():
            arguments |= self._cpu_arguments(facts, length)
        changes = _merged(self._config_changes, config_corrections(facts.layout.config))
        if facts.grown:
            changes = _merged(changes, _vocabulary(facts))
            arguments |= self._grown_arguments(facts)
        overrides = dict(self._overrides)
        if changes:
            arguments["hf_overrides"] = _merged(changes, overrides.pop("hf_overrides", None) or {})
        return arguments | overrides

    def _grown_arguments(self, facts: CheckpointFacts) -> dict[str, Any]:
        """vLLM cannot load fewer rows than the model has, and starts with random weights.

        Only an engine that is fed weights before its first request may be grown: it is given the learner's tokenizer.
        """
        self._tokenizer_folder = tempfile.TemporaryDirectory(prefix="trl_ray_tokenizer_")
        facts.tokenizer.save_pretrained(self._tokenizer_folder.name)
        return {
            "load_format": "dummy",
            "tokenizer": self._tokenizer_folder.name,
            "tokenizer_revision": None,
        }

    def _cpu_arguments(self, facts: CheckpointFacts, length: int) -> dict[str, Any]:
        kv_bytes = self._common["kv_cache_memory_bytes"] or default_kv_bytes(
            facts, max_num_seqs=self._common["max_num_seqs"], max_model_len=length, block_size=_CPU_BLOCK_SIZE
        )
        return {
            "kv_cache_memory_bytes": kv_bytes,
            "block_size": _CPU_BLOCK_SIZE,
            "enforce_eager": True,
            # A split prompt makes vLLM rewind the request's generator, which CPU generators cannot: the engine dies.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(length, _CPU_BATCHED_TOKENS),
            # States of recurrent layers are kept for prefixes only where prompts may be split.
            **({"enable_prefix_caching": False} if facts.is_recurrent else {}),
            **cpu_corrections(facts.layout.config),
        }

    def _params(self, request: GenerationRequest, index: int, *, room: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        assert self._facts is not None
        wanted = request.sampling
        max_tokens = min(wanted.max_tokens, room)
        fields = dict(wanted.fields)
        stop_ids = {*self._facts.stop_ids, *(int(token) for token in fields.pop("stop_token_ids", ()))}
        if wanted.policy_logprobs:
            fields["extra_args"] = {**(fields.get("extra_args") or {}), MARK: True}
        if isinstance(fields.get("structured_outputs"), Mapping):
            fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
        if isinstance(fields.get("logit_bias"), Mapping):  # a file's keys may be texts
            fields["logit_bias"] = {int(token): float(bias) for token, bias in fields["logit_bias"].items()}
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(wanted.min_tokens, max_tokens),
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            min_p=wanted.min_p,
            repetition_penalty=wanted.repetition_penalty,
            stop=list(wanted.stop),
            stop_token_ids=sorted(stop_ids),
            seed=sample_seed(request.seed, index),
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(wanted.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **fields,
        )

    # Results ----------------------------------------------------------------------------------------------------

    def _take_score(self, output: Any) -> Finished:
        self._scores.discard(output.request_id)
        # Flat: one entry per position, and none for the first token.
        result = np.asarray(output.prompt_logprobs.logprobs, dtype=np.float32)
        assert len(result) == len(output.prompt_token_ids) - 1
        return Finished(key=output.request_id, result=result)

    def _take_answer(self, output: Any) -> Finished:
        asked = self._questions.pop(output.request_id)
        flat, columns = output.prompt_logprobs, asked.width + 1
        # One entry for the token itself and `width` for the most probable ones, at every place but the first.
        assert len(flat.logprobs) == (len(output.prompt_token_ids) - 1) * columns
        start = len(flat.logprobs) - asked.length * columns
        shape = (asked.length, columns)
        logprobs = np.asarray(flat.logprobs[start:], dtype=np.float32).reshape(shape)
        ids = np.asarray(flat.token_ids[start:], dtype=np.int32).reshape(shape)
        answer = answer_of(logprobs[:, 0], ids[:, 1:], logprobs[:, 1:], question=asked.question, version=self._version)
        return Finished(key=output.request_id, result=answer)

    def _width(self, question: TeacherQuestion) -> int:
        assert self._facts is not None
        return top_width(question, vocab_size=self._facts.vocab_size, spare=_SPARE_TOKENS)

    def _take_completion(self, output: Any) -> Finished | None:
        key, _, index = output.request_id.rpartition("/")
        group = self._groups.get(key)
        if group is None:
            return None
        group.done[int(index)] = self._completion(output.outputs[0])
        if len(group.done) < group.n:
            return None
        del self._groups[key]
        return Finished(key=key, result=tuple(group.done[position] for position in range(group.n)))

    def _completion(self, output: Any) -> Completion:
        assert self._facts is not None
        tokens = np.asarray(output.token_ids, dtype=np.int32)
        logprobs = np.asarray(output.logprobs.logprobs, dtype=np.float32)
        versions = tuple(
            VersionSpan(version=int(span.version), start=span.start, end=span.end) for span in output.weight_versions
        )
        assert len(tokens) == len(logprobs) == versions[-1].end
        return Completion(
            token_ids=tokens,
            logprobs=logprobs,
            versions=versions,
            finish_reason=FinishReason(output.finish_reason),
            text=str(self._facts.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)),
        )


def _vocabulary(facts: CheckpointFacts) -> dict[str, Any]:
    """The rows of a model, where its configuration states them."""
    rows = {"vocab_size": facts.vocab_size}
    return rows if facts.text_section is None else {facts.text_section: rows}


def _merged(ours: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """Changes of a configuration, section by section; what is given wins.

    Raises:
        ConfigError: the given ones are no mapping, and would take the place of ours.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"rollout.engine_kwargs.hf_overrides must be a mapping beside model_init_kwargs or new rows of the "
            f"vocabulary ({sorted(ours)}), got {given!r}. Write the options that it changes."
        )
    merged = {**ours, **given}
    for key in ours.keys() & given.keys():
        if isinstance(ours[key], Mapping) and isinstance(given[key], Mapping):
            merged[key] = _merged(ours[key], given[key])
    return merged


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds the global generators, which in this process may be those of a learner."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@contextlib.contextmanager
def _class_kept(cls: type[Any]) -> Iterator[None]:
    """vLLM makes models that it has no code for of transformers' classes, which it changes so that they compile.

    Where nothing is compiled these are put back: a learner in this process has models of the same classes.
    """
    bases, own = cls.__bases__, {name: vars(cls).get(name) for name in ("__init__", "__call__")}
    try:
        yield
    finally:
        for name, value in own.items():
            if value is not None:
                setattr(cls, name, value)
            elif name in vars(cls):
                delattr(cls, name)
        if cls.__bases__ != bases:
            cls.__bases__ = bases


def prepare_environment(*, on_gpu: bool) -> None:
    """Set what vLLM reads from the environment; what the user has set stays, except for the process layout."""
    # The engine lives in this process: with "1" vLLM would start a child, and on CPU even two.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # For the one position more than the model has, see `_arguments`.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    # Its warnings are a dozen lines per engine about choices made here on purpose.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not on_gpu:
        # Otherwise the first request for log-probs compiles for seconds.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # vLLM's own choice pins threads to cores, the same ones in every engine of the machine.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@torch.no_grad()
def reload_worker(worker: Any, payload: WeightPayload, layout: CheckpointLayout) -> None:
    """Load a payload into the model of one vLLM worker; runs inside the worker."""
    weights = in_checkpoint_layout(layout, named_tensors(payload))
    worker.reload_weights(weights_iterator=iter(weights))
    model = worker.model_runner.get_model()
    reload_written_past(model, weights)
    repack_tied_heads(model)
    repack_experts(model)


def repack_tied_heads(model: torch.nn.Module) -> None:
    """Pack the LM head anew where vLLM computes with a packed copy of it (CPU).

    A reload packs the layers it has loaded. A tied head is not among them: its weight arrives through the embedding,
    and the packed copy would silently stay the old one.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def reload_written_past(model: torch.nn.Module, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load once more what vLLM's loader of gpt-oss writes into parameters by itself: experts and attention sinks.

    A reload gathers what is given to loaders of parameters; what is written past them gets lost, and old values stay.
    """
    if type(model).__name__ != "GptOssForCausalLM":
        return
    # Copies, as the loader of some ranks writes zeros into biases.
    past = [(name, tensor.clone()) for name, tensor in weights if ".experts." in name or name.endswith(".sinks")]
    model.load_weights(iter(past))  # type: ignore[operator]
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.process_weights_after_loading(module)


def repack_experts(model: torch.nn.Module) -> None:
    """Pack experts anew where vLLM computes with a packed layout of them (CPU).

    vLLM packs them when their kernel is made, which is once: a reload would leave plain weights for a kernel that reads
    packed ones.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if isinstance(experts, CPUUnquantizedExperts):
            experts.process_weights_after_loading(module)
