"""Adapters (LoRA and its kin) inside a policy: made, read, written, and set aside for the reference.

ModelConfig --attach_adapter--> policy with trainable A, B beside frozen weights
step-N/adapter_config.json + adapter_model.safetensors  --load_adapter-->  the same      <--save_adapter--

The policy stays the transformers model it was, with some of its linear layers replaced; there is no wrapper around it.
`models.merging` turns it back into plain weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.adapters.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_lora_config,
    lora_config,
    read_adapter_weights,
    require_peft,
)
from trl_ray.models.scoring.head import class_head_name, is_classifier
from trl_ray.models.vocabulary import has_new_rows

if TYPE_CHECKING:
    from peft import LoraConfig, TaskType

TRAINED = "default"
"""The name of the adapter that is trained, PEFT's own."""
REFERENCE = "ref"
"""The name of the frozen adapter that a run started from, TRL's own."""
_PREFIX = "base_model.model."
"""Before every name in an adapter file: PEFT wraps models where this package does not."""
_LINEAR = frozenset({"Linear", "Linear4bit", "Linear8bitLt", "ParamWrapper"})
"""PEFT's layers that stand in for a linear one, or for a module of experts with all their weights in one parameter."""


def attach_adapter(policy: PreTrainedModel, model: ModelConfig, *, seed: int) -> None:
    """Freeze the policy and give it a new adapter, which at first changes nothing.

    Args:
        policy: changed in place, before an optimizer or anything else looks at its parameters.
        model: the adapter's options.
        seed: of its random weights; ranks that train together must give the same. The global random state stays.

    Raises:
        ModelError: the options cannot be used with this model.
    """
    config = lora_config(model)
    if is_classifier(policy):
        config.task_type = _task(policy)
        # A new head must be trained whatever else is.
        config.modules_to_save = sorted({*(config.modules_to_save or ()), class_head_name(policy)})
    config.base_model_name_or_path = _address(policy)
    config.revision = None if _is_folder(policy) else model.model_revision
    if has_new_rows(policy):
        # Frozen, they would stay random: TRL trains them, too.
        ends = [end.rpartition(".")[2] for end in _ends(policy)]
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *ends})
    policy.requires_grad_(False)
    _tie(policy, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(policy, config, TRAINED)


def load_adapter(policy: PreTrainedModel, folder: str | Path, *, name: str = TRAINED, trainable: bool = True) -> None:
    """Freeze the policy and give it the adapter in a folder.

    Args:
        policy: changed in place; with `name` ``ref`` it has the trained adapter already, which stays the active one.
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: what it is called inside the policy.
        trainable: False freezes it, too.

    Raises:
        ModelError: it cannot be read, does not fit the policy, or is of a kind that cannot be used.
    """
    require_peft()
    import peft

    path = Path(folder).expanduser()
    weights = read_adapter_weights(path)
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"an adapter folder must hold {ADAPTER_CONFIG} as PEFT writes it, but {path}: {type(error).__name__}: "
            f"{error}. Save the adapter again."
        ) from error
    if not isinstance(config, peft.LoraConfig):
        raise ModelError(f"the adapter in {path} must be LoRA or DoRA, but is {config.peft_type}. Merge it first.")
    check_lora_config(config)
    _check_task(policy, config, path)
    if name == TRAINED:
        config.base_model_name_or_path = _address(policy)
        policy.requires_grad_(False)
    config.inference_mode = not trainable
    # Weights are overwritten below; drawing them must not move the global random state.
    with torch.random.fork_rng(devices=[]), _same_training(policy):
        _inject(policy, config, name)
    _fill(policy, {key.removeprefix(_PREFIX): value for key, value in weights.items()}, name=name, path=path)
    for parameter in _adapter_parameters(policy, name):
        parameter.requires_grad_(trainable)
    if name != TRAINED:
        _activate(policy, TRAINED)


def _task(policy: PreTrainedModel) -> TaskType:
    """PEFT's name for what the model does."""
    from peft import TaskType

    if not is_classifier(policy):
        return TaskType.CAUSAL_LM
    return TaskType.SEQ_CLS if type(policy).__name__.endswith("ForSequenceClassification") else TaskType.TOKEN_CLS


def _check_task(policy: PreTrainedModel, config: LoraConfig, path: Path) -> None:
    """A classifier's adapter holds the classifier's head; without it, the head would be random."""
    if is_classifier(policy) and class_head_name(policy) not in (config.modules_to_save or ()):
        raise ModelError(
            f"the adapter in {path} must hold the head of {type(policy).__name__}, but is of task {config.task_type}. "
            "Merge it into its model first (trl_ray.models.adapters.merging.export_merged), and start from that."
        )


def _fill(policy: PreTrainedModel, weights: dict[str, Tensor], *, name: str, path: Path) -> None:
    import peft

    expected = peft.get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape]
    if missing or unknown or wrong:
        raise ModelError(
            f"the adapter in {path} must fit {type(policy).__name__}; missing: {missing[:3]}, unknown: {unknown[:3]}, "
            f"of another shape: {sorted(wrong)[:3]}. Give the model it was trained on."
        )
    peft.set_peft_model_state_dict(policy, weights, adapter_name=name)


def _inject(policy: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Replace layers by PEFT's, with float32 adapters; refuse what the rest of the package cannot handle."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        try:
            peft.inject_adapter_in_model(config, policy, name)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, KeyError) as error:
            raise ModelError(
                f"the adapter must fit {type(policy).__name__}, but: {error}. Check lora_target_modules (all-linear "
                "takes every linear layer but the head); lora_target_parameters needs lora_dropout=0."
            ) from error
    _check_layers(policy)
    for layer in lora_layers(policy).values():
        for key, parameter in layer.named_parameters():
            if not key.startswith("base_layer.") and parameter.dtype in {torch.bfloat16, torch.float16}:
                parameter.data = parameter.data.float()


def _check_layers(policy: PreTrainedModel) -> None:
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    layers = lora_layers(policy)
    wrappers = {name: m for name, m in policy.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    touched = sorted(end for end in _ends(policy) for name in layers if f"{end}.".startswith(f"{name}."))
    if touched:
        raise ModelError(
            f"embeddings and language-model head must have no low-rank adapter, got one for {touched}: log-probs are "
            "computed from the head's weights directly. Take them out of lora_target_modules; lora_modules_to_save "
            "trains them in full."
        )
    _check_tied(policy)
    odd = [
        name for name, layer in layers.items() if type(layer).__name__ not in _LINEAR or not _is_plain_or_dora(layer)
    ]
    odd += [name for name, wrapper in wrappers.items() if not isinstance(wrapper, ModulesToSaveWrapper)]
    if odd:
        raise ModelError(
            f"adapters must stand beside linear layers, got {sorted(odd)[:3]}. Change lora_target_modules or "
            "lora_modules_to_save; parameters of experts are named in lora_target_parameters."
        )


def _ends(policy: PreTrainedModel) -> list[str]:
    """The names of embeddings and head."""
    ends = (policy.get_input_embeddings(), policy.get_output_embeddings())  # type: ignore[no-untyped-call]
    return [name for name, module in policy.named_modules() if module in ends]


def _is_tied(policy: PreTrainedModel) -> bool:
    embeddings, head = policy.get_input_embeddings(), policy.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None and head.weight is embeddings.weight


def _tie(policy: PreTrainedModel, config: LoraConfig) -> None:
    """Let tied embeddings and head be trained as the one weight they are, whichever of the two is named."""
    ends = _ends(policy)
    named = [each for each in config.modules_to_save or () if any(end.endswith(each) for end in ends)]
    if named and _is_tied(policy):
        others = [each for each in config.modules_to_save or () if each not in named]
        config.modules_to_save = [*others, ends[0].rpartition(".")[2]]
        config.ensure_weight_tying = True


def _check_tied(policy: PreTrainedModel) -> None:
    if policy.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        return
    copied = [end for end in _ends(policy) if hasattr(policy.get_submodule(end), "modules_to_save")]
    if copied and policy.config.get_text_config().tie_word_embeddings and not _is_tied(policy):
        raise ModelError(
            f"embeddings and head of {type(policy).__name__} are one weight, which PEFT cannot train in full beside an "
            f"adapter, got lora_modules_to_save with {copied}. Take it out, or train the whole model."
        )


def _is_plain_or_dora(layer: Any) -> bool:
    """PEFT has more ways to compute a layer, which cannot be merged here."""
    return {type(variant).__name__ for variant in layer.lora_variant.values()} <= {"DoraLinearVariant"}


def lora_layers(policy: nn.Module) -> dict[str, Any]:
    """PEFT's layers with an adapter, by the name of the layer each stands in for."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}


def has_adapter(policy: nn.Module) -> bool:
    """True for a policy that was given an adapter."""
    return bool(getattr(policy, "peft_config", None))


def _switchable(policy: PreTrainedModel) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return [module for module in policy.modules() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))]


def _activate(policy: PreTrainedModel, name: str) -> None:
    """Let an adapter take part in forward passes; which parameters are trained stays as it is."""
    with _same_training(policy):
        for module in _switchable(policy):
            module.set_adapter(name)


@contextmanager
def _same_training(policy: PreTrainedModel) -> Iterator[None]:
    """Undo what PEFT's switches do to `requires_grad`."""
    trained = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in trained:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)


@contextmanager
def as_reference(policy: PreTrainedModel) -> Iterator[None]:
    """Compute with the weights that training started from: those of the adapter ``ref``, or with none at all."""
    with _same_training(policy):
        modules = _switchable(policy)
        frozen = REFERENCE in policy.peft_config
        for module in modules:
            module.set_adapter(REFERENCE) if frozen else module.enable_adapters(False)
        try:
            yield
        finally:
            for module in modules:
                module.set_adapter(TRAINED) if frozen else module.enable_adapters(True)


def _adapter_parameters(policy: PreTrainedModel, name: str) -> Iterator[nn.Parameter]:
    for module in _switchable(policy):
        for key, parameter in module.named_parameters():
            if f".{name}." in f".{key}." and not key.startswith("base_layer."):
                yield parameter


def save_adapter(policy: PreTrainedModel, directory: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the trained adapter as PEFT does: it loads with `AutoPeftModelForCausalLM` and with `load_adapter`.

    Args:
        policy: with an adapter.
        directory: exists.
        weights: the policy's trained parameters by its own names, when they are not whole in this process.
    """
    import peft

    state = peft.get_peft_model_state_dict(
        policy,
        state_dict=None if weights is None else _with_tied(policy, weights),
        adapter_name=TRAINED,
        save_embedding_layers=False,
    )
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, Path(directory) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(policy.peft_config[TRAINED])
    config.inference_mode = True
    config.save_pretrained(str(directory))


def _with_tied(policy: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under all the names that the policy has for them."""
    places = {id(parameter): name for name, parameter in policy.named_parameters()}
    every = policy.named_parameters(remove_duplicate=False)
    names = {name: places[id(parameter)] for name, parameter in every}
    return {name: weights[place] for name, place in names.items() if place in weights}


def _is_folder(policy: PreTrainedModel) -> bool:
    return Path(str(policy.name_or_path)).is_dir()


def _address(policy: PreTrainedModel) -> str:
    """Where the frozen weights came from; folders absolute, so that the adapter finds them from anywhere."""
    return str(Path(str(policy.name_or_path)).resolve()) if _is_folder(policy) else str(policy.name_or_path)
