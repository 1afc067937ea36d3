"""Loading policies and tokenizers, and saying plainly why one cannot be used.

ModelConfig --find_source--> frozen or trained base model [+ adapter, models.adapters] --check_head--> policy
            --load_tokenizer--> tokenizer
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_ray.config.messages import nearest
from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.adapters.adapter_config import adapter_size, base_of_adapter, is_adapter_folder
from trl_ray.models.adapters.lora import REFERENCE, attach_adapter, load_adapter
from trl_ray.models.dropout import check_without_dropout, switch_off_dropout
from trl_ray.models.generation_settings import mend_generation
from trl_ray.models.quantised_checkpoints import dequantising, make_plain
from trl_ray.models.scoring.head import check_head
from trl_ray.models.scoring.rope_regimes import compute_by_sequence, rope_regimes
from trl_ray.models.scoring.segment_attention import heed_soft_cap
from trl_ray.models.vocabulary import add_rows, adopt_template, missing_rows, names_tokenizer, template_text

Policy: TypeAlias = PreTrainedModel
_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16}
_ROPE_BASE = ("rope_theta", "partial_rotary_factor")
_WEIGHTS = ("*.safetensors", "*.bin")
# What transformers raises for a model it cannot build: SafetensorError and torch's loader are no OSErrors.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, SafetensorError)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype of a configured one."""
    return _DTYPES[dtype]


def check_model_path(name: str | None) -> str:
    """Check what can be checked of a model's name or folder without loading it.

    Raises:
        ModelError: no name, no such directory, or a directory without config.json or weights.
    """
    if not name:
        raise ModelError("model_name_or_path must name a model, got none. Set it to a local folder or a hub name.")
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            raise ModelError(f"model_name_or_path must exist, but there is no such directory: {name}. Check the path.")
        return name
    if not path.is_dir():
        raise ModelError(f"model_name_or_path must be a directory, but {name} is a file. Give the folder it lies in.")
    if not (path / "config.json").is_file():
        raise ModelError(
            f"a model directory must hold config.json, but {name} does not. Give a folder written by save_pretrained."
        )
    return str(path)


def require_weights(name: str) -> None:
    """Check that a model's directory holds weights; a hub name is not looked at.

    Raises:
        ModelError: it does not.
    """
    if Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in _WEIGHTS):
        raise ModelError(f"a model directory must hold weights (*.safetensors), but {name} has none. Save it again.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a policy's weights come from."""

    base: str
    """Folder or hub name of the whole model: what tokenizers, engines and configurations are read from."""
    revision: str | None
    """Of a hub name; None for a folder."""
    adapter: str | None = None
    """Folder of the adapter to go on with; None for a new one, or none."""
    initial_adapter: str | None = None
    """Folder of the adapter that training started from, which is part of the reference; None where it was new."""


def find_source(model: ModelConfig, *, path: str | None = None) -> ModelSource:
    """Tell whole models from adapters and check what can be checked without loading.

    Args:
        model: names a whole model, or an adapter's folder; then its base model is what the adapter says.
        path: a checkpoint that takes the place of the model's own weights or adapter.

    Raises:
        ModelError: a folder is missing or incomplete, or holds an adapter where there must be none, or the reverse.
    """
    name = model.model_name_or_path if model.model_name_or_path is not None else path
    initial = str(Path(name).expanduser()) if name is not None and is_adapter_folder(name) else None
    found = path if path is not None else name
    adapter = str(Path(found).expanduser()) if found is not None and is_adapter_folder(found) else None
    if adapter is not None and not model.use_peft:
        raise ModelError(
            f"use_peft must be true for {adapter}, which holds an adapter, got false. Set use_peft=true to train it "
            "on, or merge it first (trl_ray.models.adapters.merging.export_merged)."
        )
    if path is not None and adapter is None and model.use_peft:
        raise ModelError(
            f"use_peft must be false for {path}, which holds a whole model, got true. Resume with the configuration of "
            "the run that wrote it."
        )
    if initial is not None:
        base, revision = base_of_adapter(initial)
        try:
            base = check_model_path(base)
        except ModelError as error:
            raise ModelError(f"the adapter in {initial} must name its base model, but: {error}") from error
    else:
        base, revision = check_model_path(path if adapter is None and path is not None else name), model.model_revision
    return ModelSource(
        base=base,
        revision=None if Path(base).is_dir() else revision or "main",
        adapter=adapter,
        initial_adapter=initial,
    )


def load_policy(
    model: ModelConfig,
    *,
    path: str | None = None,
    device: torch.device | str = "cpu",
    disable_dropout: bool = True,
    trainable: bool = True,
    seed: int = 0,
    with_reference: bool = False,
) -> Policy:
    """Load a causal language model in the dtype whose weights are updated.

    Args:
        model: name or folder, revision, dtype, attention implementation, gradient checkpointing, adapter.
        path: a checkpoint to read weights or adapter from instead of the model's own folder.
        device: where its weights live.
        disable_dropout: set every dropout probability to 0, the adapter's too.
        trainable: False for a reference: frozen, and in evaluation mode.
        seed: of a new adapter's weights; the same on all ranks.
        with_reference: where training started from an adapter, hold it a second time, frozen (`as_reference`).

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has a head this package cannot compute log-probs from.
    """
    source = find_source(model, path=path)
    policy, missing = load_base(model, source, device=device)
    refuse_missing(source.base, missing)
    prepare_model(
        policy,
        model,
        source,
        device=device,
        disable_dropout=disable_dropout,
        trainable=trainable,
        seed=seed,
        with_reference=with_reference,
    )
    check_head(policy)
    if disable_dropout and trainable:
        check_without_dropout(policy)
    return policy


def load_base(
    model: ModelConfig,
    source: ModelSource,
    *,
    device: torch.device | str,
    auto: Any = AutoModelForCausalLM,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Policy, set[str]]:
    """Load a whole model.

    Args:
        model: its dtype, attention implementation and quantisation.
        source: where it is.
        device: where quantised weights live.
        auto: which of transformers' classes to ask for the architecture.
        changes: of its configuration.

    Returns:
        The model, and the names of parameters it has and the source has not; those are random.

    Raises:
        ModelError: it cannot be loaded.
    """
    name = source.base
    require_weights(name)
    options: dict[str, Any] = {"dtype": torch_dtype(model.dtype), "trust_remote_code": model.trust_remote_code}
    options |= {**config_changes(model), **(changes or {})}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if source.revision is not None:
        options["revision"] = source.revision
    if _is_quantised(model):
        options |= {"quantization_config": quantization(model, torch.device(device)), "device_map": {"": device}}
    try:
        plain = None if _is_quantised(model) else dequantising(name, source.revision)
        options |= {} if plain is None else {"quantization_config": plain}
        loaded = auto.from_pretrained(name, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise ModelError(_why_not(name, error)) from error
    policy, info = cast("tuple[Policy, dict[str, Any]]", loaded)
    if plain is not None:
        make_plain(policy, torch_dtype(model.dtype))
    mend_generation(policy)
    policy.config.use_cache = False
    if model.attn_implementation is None:
        heed_soft_cap(policy)
    compute_by_sequence(policy)
    _follow_tokenizer(policy, model, source)
    return policy, set(info["missing_keys"])


def _follow_tokenizer(policy: Policy, model: ModelConfig, source: ModelSource) -> None:
    """A row for each token, and the end token that the options ask for."""
    path = source.adapter or (source.base if model.model_name_or_path is None else None)
    asked = model.eos_token is not None or (model.chat_template is not None and names_tokenizer(model.chat_template))
    try:
        tokenizer = load_tokenizer(model, path=path)
    except ModelError:
        if asked:
            raise
        return  # teachers and references are given token ids, and may come without a tokenizer
    embeddings: Any = policy.get_input_embeddings()
    rows = missing_rows(tokenizer, int(embeddings.weight.shape[0]))
    if rows is not None:
        add_rows(policy, rows)
    if asked:
        set_end_token(policy, int(cast(Any, tokenizer.eos_token_id)))
    generation: Any = getattr(policy, "generation_config", None)
    if generation is not None and knows_padding_token(tokenizer, model):
        generation.pad_token_id = tokenizer.pad_token_id


def set_end_token(policy: Policy, token_id: int) -> None:
    """Let configuration and generation configuration, and the checkpoints that keep them, end sequences with a token.

    Tokens that ended a completion before still do.
    """
    policy.config.get_text_config().eos_token_id = token_id
    generation: Any = getattr(policy, "generation_config", None)  # classifiers have none
    if generation is not None and token_id not in _ids(generation.eos_token_id):
        generation.eos_token_id = [token_id, *_ids(generation.eos_token_id)]


def ends_with(policy: Policy, token_id: int) -> bool:
    """Whether the configuration says that a token ends a sequence."""
    generation: Any = getattr(policy, "generation_config", None)
    return token_id in _ids(policy.config.get_text_config().eos_token_id) and (
        generation is None or token_id in _ids(generation.eos_token_id)
    )


def _ids(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def refuse_missing(name: str, missing: Iterable[str]) -> None:
    """Refuse a model some of whose weights would be random.

    Raises:
        ModelError: there are missing ones.
    """
    missing = sorted(missing)
    if missing:
        raise ModelError(
            f"{name} must hold every weight of its model, but {len(missing)} are missing, first {missing[:3]}; they "
            "would be random. Save the model again or give another."
        )


def prepare_model(
    policy: Policy,
    model: ModelConfig,
    source: ModelSource,
    *,
    device: torch.device | str,
    disable_dropout: bool,
    trainable: bool,
    seed: int,
    with_reference: bool = False,
) -> None:
    """Do to a loaded model what training, or scoring with it, asks for; see `load_policy` for the arguments.

    Raises:
        ModelError: its adapter or its kernels cannot be used.
    """
    if model.use_liger_kernel:
        _apply_liger(policy, device=torch.device(device))
    if not model.use_peft:
        policy.requires_grad_(trainable)
    elif source.adapter is None:
        attach_adapter(policy, model, seed=seed)
    else:
        load_adapter(policy, source.adapter)
    if with_reference and source.initial_adapter is not None:
        load_adapter(policy, source.initial_adapter, name=REFERENCE, trainable=False)
    if not trainable:
        policy.requires_grad_(False)
    if disable_dropout:
        switch_off_dropout(policy)
    if model.gradient_checkpointing:
        # Reentrant checkpointing would lose gradients: the embeddings are the first to have one, or frozen.
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not _is_quantised(model):
        nn.Module.to(policy, device)
    policy.train(trainable)


def _is_quantised(model: ModelConfig) -> bool:
    return model.load_in_4bit or model.load_in_8bit


def quantization(model: ModelConfig, device: torch.device) -> BitsAndBytesConfig:
    """How bitsandbytes stores the frozen weights (QLoRA, https://arxiv.org/abs/2305.14314).

    Raises:
        ModelError: bitsandbytes is not installed, or there is no GPU.
    """
    option = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if device.type == "cpu":
        # bitsandbytes 0.50 has kernels for CPUs, but its 4-bit ones give no gradients, without an error.
        raise ModelError(f"{option}=true needs a GPU, but the model is on {device.type}. Set {option}=false.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{option}=true needs the package bitsandbytes, which is not installed. pip install bitsandbytes, or set "
            f"{option}=false."
        )
    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if model.bf16 else torch_dtype(model.dtype),
        bnb_4bit_quant_type=model.bnb_4bit_quant_type.value,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
    )


def _apply_liger(policy: Policy, *, device: torch.device) -> None:
    """Liger's kernels for norms, rotary embeddings and MLPs; head and loss stay this package's."""
    if device.type != "cuda":
        raise ModelError(f"use_liger_kernel=true needs a GPU, but the model is on {device.type}. Set it to false.")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError(
            "use_liger_kernel=true needs the package liger-kernel, which is not installed. pip install liger-kernel, "
            "or set it to false."
        )
    from transformers.integrations.liger import apply_liger_kernel

    try:
        kernels = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        apply_liger_kernel(policy, kernels)  # type: ignore[no-untyped-call]
    except (ImportError, TypeError, AttributeError) as error:
        raise ModelError(
            f"Liger must know {type(policy).__name__}, but: {error}. Set use_liger_kernel=false."
        ) from error


def _why_not(name: str, error: BaseException) -> str:
    first_line = str(error).strip().split("\n")[0].rstrip(". ")
    if "custom code" in first_line:
        return (
            f"trust_remote_code must be true for {name}, whose model is code of its own, which runs here. Look at it, "
            "then set trust_remote_code=true."
        )
    if Path(name).is_dir():
        damaged = isinstance(error, SafetensorError) or "safetensors" in first_line.lower()
        hint = "A weight file is truncated or damaged: copy the model again." if damaged else "Check its config.json."
        return f"the model in {name} must load, but: {type(error).__name__}: {first_line}. {hint}"
    return (
        f"model_name_or_path must be a local directory or a model on the hub; {name} is no directory here, and the "
        f"hub gave: {type(error).__name__}: {first_line}. Check the name, or that the hub can be reached."
    )


def load_model_config(model: ModelConfig, *, path: str | None = None) -> PretrainedConfig:
    """The model's own configuration, or that of a checkpoint of it, without the weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    return _read_config(model, find_source(model, path=path), config_changes(model))


def _read_config(model: ModelConfig, source: ModelSource, changes: Mapping[str, Any]) -> PretrainedConfig:
    name = source.base
    options = {} if source.revision is None else {"revision": source.revision}
    try:
        config, unknown = AutoConfig.from_pretrained(
            name, trust_remote_code=model.trust_remote_code, return_unused_kwargs=True, **options, **changes
        )
    except LOAD_ERRORS as error:
        raise ModelError(_why_not(name, error)) from error
    wrong = sorted(unknown.keys() & changes.keys())
    if wrong:
        guess = nearest(wrong[0], config.to_dict())
        raise ModelError(
            f"model_init_kwargs must hold options of the configuration of {config.model_type}, got {', '.join(wrong)}. "
            + (f"Did you mean {guess!r}?" if guess else "Remove it.")
        )
    return cast(PretrainedConfig, config)


def config_changes(model: ModelConfig) -> dict[str, Any]:
    """What `model_init_kwargs` changes in the model's configuration, under the names that the configuration has.

    Raises:
        ModelError: it cannot be loaded, or has no such option.
    """
    if not model.model_init_kwargs:
        return {}
    source = find_source(model)
    before, after = (_read_config(model, source, each).to_dict() for each in ({}, model.model_init_kwargs))
    changes = {name: value for name, value in after.items() if value != before.get(name)}
    for name in ("rope_parameters", "rope_scaling"):
        given, own = changes.get(name), before.get(name)
        if isinstance(given, dict) and isinstance(own, dict):
            # How positions are scaled was once told apart from the base that they turn with.
            changes[name] = {key: own[key] for key in _ROPE_BASE if own.get(key) is not None} | {
                key: value for key, value in given.items() if value is not None
            }
    return changes


def load_shape(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The configuration of the text model with the vocabulary that it is loaded with, a row for each token.

    Raises:
        ModelError: it cannot be loaded.
    """
    shape = load_model_config(model).get_text_config()
    shape.vocab_size = missing_rows(tokenizer, int(shape.vocab_size)) or shape.vocab_size
    return shape


def checkpoint_dtype(model: ModelConfig) -> Dtype:
    """The number format of the checkpoint's weights; float32 for one that is not trained in here, like float16.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    written = getattr(load_model_config(model).get_text_config(), "dtype", None)
    return Dtype.BFLOAT16 if written is torch.bfloat16 else Dtype.FLOAT32


def max_positions(model: ModelConfig) -> int | None:
    """Tokens a model allows in prompt plus completion; None where its configuration does not say.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    return positions_of(load_model_config(model).get_text_config())


def positions_of(text: Any) -> int | None:
    """Positions that a text configuration allows; None where there is no limit."""
    value = getattr(text, "max_position_embeddings", None)
    return int(value) if value else None


def unscaled_positions(model: ModelConfig) -> int | None:
    """Tokens up to which engines and learner compute a model alike, where its rotary frequencies depend on lengths.

    Beyond, vLLM keeps to one set of frequencies, and keys in a cache keep those that they were computed with. One token
    below the original context, as engines have a place to spare.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    regimes = rope_regimes(load_model_config(model))
    return None if regimes is None else regimes.original - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters of a policy."""

    base: int
    """Of the model itself."""
    adapter: int
    """Of the adapter and of layers trained in full beside it; 0 without one."""

    @property
    def trained(self) -> int:
        """Those that have gradients and optimizer state."""
        return self.adapter or self.base


def count_parameters(
    model: ModelConfig, *, auto: Any = AutoModelForCausalLM, changes: Mapping[str, Any] | None = None
) -> ParameterCount:
    """Parameters of the model, counted without allocating them; `auto` and `changes` as for `load_base`.

    Raises:
        ModelError: its configuration cannot be loaded or used, or its adapter does not fit.
    """
    source, config = find_source(model), load_model_config(model)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    with torch.device("meta"):
        try:
            empty = auto.from_config(config, trust_remote_code=model.trust_remote_code)
        except LOAD_ERRORS as error:
            raise ModelError(_why_not(source.base, error)) from error
        base = sum(parameter.numel() for parameter in empty.parameters())
        if not model.use_peft:
            return ParameterCount(base=base, adapter=0)
        if source.adapter is None:
            attach_adapter(empty, model, seed=0)
    if source.adapter is not None:
        return ParameterCount(base=base, adapter=adapter_size(source.adapter))
    return ParameterCount(base=base, adapter=sum(p.numel() for p in empty.parameters() if p.requires_grad))


def knows_padding_token(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> bool:
    """Whether the options name a padding token, and the tokenizer has it."""
    return model.pad_token is not None and model.pad_token in tokenizer.get_vocab()


def load_tokenizer(model: ModelConfig, *, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a padding token and, where configured, another chat template or that of another
    tokenizer, whose added tokens come along.

    Raises:
        ModelError: it cannot be loaded, has no end-of-sequence token or not the one that `eos_token` names, or the
            template file cannot be read.
    """
    source = find_source(model, path=path)
    # An adapter's folder has a tokenizer only if whoever saved it put one there.
    own = source.adapter is not None and (Path(source.adapter) / "tokenizer_config.json").is_file()
    name = cast(str, source.adapter) if own else source.base
    options = {} if own or source.revision is None else {"revision": source.revision}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=model.trust_remote_code, **options
        )
    except LOAD_ERRORS as error:
        first_line = str(error).strip().split("\n")[0].rstrip(". :")
        raise ModelError(
            f"the tokenizer of {name} must load, but: {first_line}. Copy its files (tokenizer.json, "
            "tokenizer_config.json) from the model that it belongs to."
        ) from error
    clones = model.chat_template is not None and names_tokenizer(model.chat_template)
    if clones:
        adopt_template(tokenizer, cast(str, model.chat_template))
    if model.eos_token is not None:
        if model.eos_token not in tokenizer.get_vocab():
            raise ModelError(
                f"eos_token must be a token of the tokenizer of {name}, got {model.eos_token!r}. Take the token that "
                "the chat template writes at the end of a turn."
            )
        tokenizer.eos_token = model.eos_token
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {name} must have an end-of-sequence token: completions could not end. "
            "Set eos_token to the token that ends a turn."
        )
    if knows_padding_token(tokenizer, model):
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template is not None and not clones:
        tokenizer.chat_template = template_text(model.chat_template)
    return tokenizer
