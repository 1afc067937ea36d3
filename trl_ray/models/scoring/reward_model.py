"""Reward models that rate completions: a sequence classifier with one label, or a token classifier with two.

RewardModelOptions --find_reward_model--> RewardModelFacts (configuration only) --load_reward_model--> RewardModel

token ids [T] x B --padded right--> logits [B, 1]    --> one reward each, read at the last token
                                    logits [B, T, 2] --at positions [S]--> P(right) [S] --aggregation--> one reward each
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.preference.reward_losses import step_rewards, trajectory_rewards
from trl_ray.config.losses.reward_modelling_options import StepAggregation
from trl_ray.config.reward_model_options import RewardModelKind, RewardModelOptions
from trl_ray.errors import ModelError
from trl_ray.models.adapters.adapter_config import (
    ADAPTER_CONFIG,
    base_of_adapter,
    is_adapter_folder,
    read_adapter_weights,
    require_peft,
)
from trl_ray.models.policy_loading import LOAD_ERRORS, check_model_path, require_weights, torch_dtype
from trl_ray.models.scoring.classifier import AUTO_CLASSES, ENDINGS
from trl_ray.models.scoring.rope_regimes import compute_by_sequence, rope_regimes
from trl_ray.models.scoring.segment_attention import heed_soft_cap
from trl_ray.models.vocabulary import num_tokens
from trl_ray.types import IntArray

NUM_LABELS = {RewardModelKind.SEQUENCE: 1, RewardModelKind.STEPS: 2}
_LOADERS = {kind: AUTO_CLASSES[count] for kind, count in NUM_LABELS.items()}
_HEADS = {kind: ENDINGS[count] for kind, count in NUM_LABELS.items()}
_TASKS = {"SEQ_CLS": RewardModelKind.SEQUENCE, "TOKEN_CLS": RewardModelKind.STEPS}
"""PEFT's names of what an adapter is for."""
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RewardModelFacts:
    """What is known of a reward model before its weights are read."""

    kind: RewardModelKind
    """SEQUENCE or STEPS."""
    base: str
    """Folder or hub name of the whole model."""
    revision: str | None
    """Of a hub name; None for a folder."""
    adapter: str | None
    """Folder of an adapter beside it."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    """Tokens it can read; None where neither its configuration nor the options say."""


def find_reward_model(options: RewardModelOptions) -> RewardModelFacts:
    """Find a reward model and check what can be checked without its weights.

    Raises:
        ModelError: there is none, it has no head that rates, the wrong number of labels, or no tokenizer.
    """
    try:
        return _find(options)
    except ModelError as error:
        raise ModelError(f"reward model {options.label}: {error}") from error


def _find(options: RewardModelOptions) -> RewardModelFacts:
    name = options.model_name_or_path
    adapter = str(Path(name).expanduser()) if is_adapter_folder(name) else None
    base, revision = (check_model_path(name), options.revision) if adapter is None else base_of_adapter(adapter)
    base = base if adapter is None else check_model_path(base)
    revision = None if Path(base).is_dir() else revision or "main"
    require_weights(base)
    config = _config(options, base, revision)
    kind = _kind(options, config) if adapter is None else _kind_of_adapter(options, adapter)
    if adapter is None:
        _check_labels(kind, config, base)
    tokenizer, rows = _tokenizer(options, base, revision, adapter), int(config.get_text_config().vocab_size)
    if num_tokens(tokenizer) > rows:
        raise ModelError(
            f"its embedding must have a row for each of the {num_tokens(tokenizer)} ids of its tokenizer, but {base} "
            f"has {rows}. Save it again after model.resize_token_embeddings(len(tokenizer)), or with the tokenizer it "
            "was trained with."
        )
    return RewardModelFacts(
        kind=kind,
        base=base,
        revision=revision,
        adapter=adapter,
        config=config,
        tokenizer=tokenizer,
        max_length=_max_length(options, config),
    )


def _config(options: RewardModelOptions, base: str, revision: str | None) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            base, trust_remote_code=options.trust_remote_code, **_revision(revision)
        )
    except LOAD_ERRORS as error:
        raise ModelError(
            f"model_name_or_path must be a local directory or a model on the hub, but the configuration of {base} does "
            f"not load: {type(error).__name__}: {_first_line(error)}. Check the name, or that the hub can be reached."
        ) from error
    return config


def _kind(options: RewardModelOptions, config: PretrainedConfig) -> RewardModelKind:
    """What the architecture says; `kind` decides where it says nothing."""
    architectures = [str(name) for name in config.architectures or ()]
    found = [kind for kind, head in _HEADS.items() if any(name.endswith(head) for name in architectures)]
    unrated = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    wanted = options.kind
    if unrated or (wanted is RewardModelKind.AUTO and len(found) != 1):
        raise ModelError(
            "it must be a sequence classifier with 1 label, or a token classifier with 2 (a process reward model), "
            f"got the architectures {architectures}. Train one with `trl-ray reward` or `trl-ray prm`"
            + ("." if unrated else ", or set kind.")
        )
    if wanted is not RewardModelKind.AUTO and found and wanted not in found:
        raise ModelError(f"kind must be {found[0]} for the architectures {architectures}, got {wanted}. Remove kind.")
    return found[0] if wanted is RewardModelKind.AUTO else wanted


def _kind_of_adapter(options: RewardModelOptions, adapter: str) -> RewardModelKind:
    task = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("task_type")
    found = _TASKS.get(str(task))
    if found is None and (options.kind is RewardModelKind.AUTO or task is not None):
        raise ModelError(
            f"the adapter in {adapter} must be for SEQ_CLS or TOKEN_CLS, its task_type is {task}. Give an adapter of a "
            "reward model" + (", or set kind." if task is None else ".")
        )
    if found is not None and options.kind not in (RewardModelKind.AUTO, found):
        raise ModelError(f"kind must be {found} for an adapter with task_type {task}, got {options.kind}. Remove kind.")
    return found or options.kind


def _check_labels(kind: RewardModelKind, config: PretrainedConfig, base: str) -> None:
    if config.num_labels != NUM_LABELS[kind]:
        what = "sequence classifier" if kind is RewardModelKind.SEQUENCE else "process reward model"
        raise ModelError(
            f"a {what} must have num_labels={NUM_LABELS[kind]} to be a reward, {base} has {config.num_labels}. Give "
            "another model."
        )


def _tokenizer(
    options: RewardModelOptions, base: str, revision: str | None, adapter: str | None
) -> PreTrainedTokenizerBase:
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    name, further = (cast(str, adapter), {}) if own else (base, _revision(revision))
    # Without any of its files transformers makes a tokenizer that knows no word.
    if Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"{name} must hold the model's tokenizer, but has none of its files. Save it there.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=options.trust_remote_code, **further
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"the tokenizer of {name} must load, but: {_first_line(error)}. Save it there.") from error
    return tokenizer


def _max_length(options: RewardModelOptions, config: PretrainedConfig) -> int | None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if options.max_length is None:
        return int(positions) if positions else None
    if positions and options.max_length > positions:
        raise ModelError(f"max_length must be at most its {positions} positions, got {options.max_length}. Lower it.")
    return options.max_length


def count_reward_parameters(options: RewardModelOptions, facts: RewardModelFacts) -> int:
    """Parameters of a reward model, counted without allocating them."""
    with torch.device("meta"):
        empty = _LOADERS[facts.kind].from_config(facts.config, trust_remote_code=options.trust_remote_code)
    return sum(parameter.numel() for parameter in empty.parameters())


def load_reward_model(
    options: RewardModelOptions, facts: RewardModelFacts, *, device: torch.device | str = "cpu"
) -> RewardModel:
    """Load the weights; an adapter is merged into them.

    Raises:
        ModelError: they cannot be read, or those of the head are missing.
    """
    try:
        model = _load(options, facts)
    except ModelError as error:
        raise ModelError(f"reward model {options.label}: {error}") from error
    return RewardModel(
        torch.nn.Module.to(model, device),
        kind=facts.kind,
        aggregation=options.aggregation,
        bf16=options.bf16,
        # The configuration beside an adapter is that of the language model, whose padding may be what ends texts.
        reads_last_token=facts.adapter is not None,
    )


def _load(options: RewardModelOptions, facts: RewardModelFacts) -> PreTrainedModel:
    try:
        loaded = _LOADERS[facts.kind].from_pretrained(
            facts.base,
            num_labels=NUM_LABELS[facts.kind],
            dtype=torch_dtype(options.dtype),
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **_revision(facts.revision),
        )
    except LOAD_ERRORS as error:
        raise ModelError(
            f"the model in {facts.base} must load, but: {type(error).__name__}: {_first_line(error)}. Copy it again."
        ) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    # The head that a language model lacks may come with its adapter.
    brought = () if facts.adapter is None else read_adapter_weights(Path(facts.adapter)).keys()
    missing = sorted(key for key in info["missing_keys"] if not any(name.endswith(f".{key}") for name in brought))
    if missing:
        raise ModelError(
            f"{facts.adapter or facts.base} must hold every weight, but {len(missing)} are missing, first "
            f"{missing[:3]}; they would be random. Save the model again or give another."
        )
    return model if facts.adapter is None else _with_adapter(model, facts.adapter)


def _with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The plain model that computes what model and adapter compute."""
    require_peft()
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(folder)
        wrapped: Any = peft.get_peft_model(model, config)
        loaded: Any = peft.set_peft_model_state_dict(wrapped, read_adapter_weights(Path(folder)))
    except LOAD_ERRORS as error:
        raise ModelError(f"the adapter in {folder} must fit its model, but: {_first_line(error)}.") from error
    if loaded.unexpected_keys:
        raise ModelError(f"the adapter in {folder} must fit its model, which has no {loaded.unexpected_keys[:3]}.")
    # It is never trained, so that rating with it should cost what the plain model does.
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged


class RewardModel:
    """A loaded reward model; rows are rated together, and each as if it were alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kind: RewardModelKind,
        aggregation: StepAggregation,
        bf16: bool = False,
        reads_last_token: bool = False,
    ) -> None:
        """Take a model that is on its device.

        Args:
            model: with one label for SEQUENCE, two for STEPS.
            kind: SEQUENCE or STEPS.
            aggregation: of steps.
            bf16: compute under bfloat16 autocast.
            reads_last_token: whatever its configuration takes for padding.
        """
        self._model = cast(Any, model)
        self._model.eval().requires_grad_(False)
        self._model.config.use_cache = False
        heed_soft_cap(self._model)  # as it was trained
        compute_by_sequence(self._model)
        self._kind, self._aggregation, self._bf16 = kind, aggregation, bf16
        self._text_config: Any = model.config.get_text_config()
        self._pad: int | None = None if reads_last_token else self._text_config.pad_token_id

    def rate(self, rows: Sequence[IntArray], positions: Sequence[IntArray]) -> list[float | None]:
        """One reward for each row, in one forward pass.

        Args:
            rows: [B][T] token ids, at least one row and one token each.
            positions: [B][S] where a process reward model reads its steps, counting up; unused otherwise.

        Returns:
            [B], which may hold NaN or infinity; None for a row without steps.
        """
        if self._kind is RewardModelKind.SEQUENCE:
            rewards: list[float | None] = self._logits(rows)[:, 0].tolist()
            return rewards
        return self._rate_steps(rows, positions)

    def _rate_steps(self, rows: Sequence[IntArray], positions: Sequence[IntArray]) -> list[float | None]:
        counts = [len(row) for row in positions]
        # Solutions without a step are not read at all: there is no place at which a reward stands.
        if not any(counts):
            return [None] * len(rows)
        index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
        where = torch.from_numpy(np.concatenate([np.asarray(row, np.int64) for row in positions]))
        logits = self._logits(rows)[index, where]
        steps = TokenSequences(sample_index=index, num_sequences=len(rows))
        joined = trajectory_rewards(step_rewards(logits), steps, self._aggregation).tolist()
        return [reward if count else None for reward, count in zip(joined, counts, strict=True)]

    @torch.inference_mode()
    def _logits(self, rows: Sequence[IntArray]) -> Tensor:
        """[B, 1] or [B, T, 2] in float32, on the CPU."""
        pad = self._padding(rows)
        width = max(len(row) for row in rows)
        ids: NDArray[np.int64] = np.full((len(rows), width), pad, np.int64)
        mask: NDArray[np.int64] = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        device = self._model.device
        inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
        if rope_regimes(self._model.config) is not None:  # padding must make no row longer than its sequence
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1) * inputs["attention_mask"]
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            output = self._model(**inputs)
        logits: Tensor = output.logits.float().cpu()
        return logits

    def _padding(self, rows: Sequence[IntArray]) -> int:
        """The id that fills rows up.

        transformers reads a sequence classifier at the last token that is not its configuration's padding. Where that
        names none, it is the last token, whatever that is: then no row may end with what stands for padding.
        """
        if self._pad is not None:
            return self._pad
        # Of B + 1 ids one at least ends none of B rows.
        ends = {int(row[-1]) for row in rows}
        pad = next(token for token in range(len(rows) + 1) if token not in ends)
        self._text_config.pad_token_id = pad
        return pad


def _revision(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
