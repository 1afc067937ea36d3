"""Reward models and process reward models: a base model with a linear head of one or two classes.

    C = 1   AutoModelForSequenceClassification    a reward, read at the last token that is no padding
    C = 2   AutoModelForTokenClassification       logits of wrong and right, read where a step ends

language model --load_classifier--> the same base model with a new head        classifier, step-N --> its own head
[R,T] --base model--> [R,T,H] --predictors--> [N,H] --head--> logits [N,C]            ClassifierModule

A checkpoint loads with transformers' `from_pretrained` and gives the same logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_ray.algorithms.batches.layout import Segment
from trl_ray.algorithms.head.head_problem import ExtraOutputs
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.policy_loading import (
    ParameterCount,
    count_parameters,
    find_source,
    load_base,
    load_model_config,
    load_tokenizer,
    prepare_model,
    refuse_missing,
)
from trl_ray.models.scoring.head import causal_model, class_head, class_head_name, hidden_states
from trl_ray.models.scoring.scoring_module import PredictorModule

AUTO_CLASSES: dict[int, Any] = {1: AutoModelForSequenceClassification, 2: AutoModelForTokenClassification}
ENDINGS = {1: "ForSequenceClassification", 2: "ForTokenClassification"}
"""What the names of such architectures end in, by the number of labels."""
_CHANGES: dict[int, dict[str, Any]] = {
    1: {"num_labels": 1},
    2: {"id2label": {0: "wrong", 1: "right"}, "label2id": {"wrong": 0, "right": 1}},
}
"""Of the configuration of a model that gets a new head."""
_PADDING_NAMES = ("pad", "reserved", "unused", "unk", "start")
"""What special tokens are called that do not end texts, best first."""


class ClassifierModule(PredictorModule):
    """A classifier as one module from token ids to logits; it takes what a `ScoringModule` takes.

    Args:
        model: from `load_classifier`.
        bf16: run matrix products in bfloat16, but for the head's.
    """

    def __init__(self, model: PreTrainedModel, *, bf16: bool = False) -> None:
        super().__init__(model, bf16=bf16)
        class_head(model)
        if _is_pooling(model):
            self.pooling_pad = model.config.get_text_config().pad_token_id

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        predictors: Tensor,
        targets: Tensor,
        temperature: float,
        segments: tuple[Segment, ...] | None = None,
        extras: ExtraOutputs | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Logits [N, C] float32 (float64 where the head is) at `predictors` [N] of the [R, T] inputs.

        What is asked of language-model heads (`targets`, `temperature`, `extras`) means nothing here.
        """
        del targets, temperature, extras
        chosen = self.states(input_ids, position_ids, attention_mask, predictors, segments, noise)
        # A reward is one number, of which bfloat16 would leave three digits.
        with torch.autocast(input_ids.device.type, enabled=False):
            logits = _classify(self.policy, chosen)
        return (logits.float() if logits.dtype in {torch.bfloat16, torch.float16} else logits,)


def _is_pooling(model: PreTrainedModel) -> bool:
    return type(causal_model(model)).__name__.endswith(ENDINGS[1])


def _classify(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Dropout, where the architecture has it before its head, and the head: [..., H] to [..., C]."""
    head, dropout = class_head(model), getattr(causal_model(model), "dropout", None)
    weight: Any = head.weight
    # Under autocast the base model gives bfloat16, and the head may be float32.
    states = states.to(weight.dtype)
    logits: Tensor = head(dropout(states) if isinstance(dropout, nn.Dropout) else states)
    return logits


def load_classifier(
    model: ModelConfig,
    *,
    num_labels: int,
    path: str | None = None,
    device: torch.device | str = "cpu",
    disable_dropout: bool = True,
    seed: int = 0,
    trainable: bool = True,
) -> PreTrainedModel:
    """Load a classifier, or a language model with a new head in place of its own.

    Args:
        model: names a language model or a classifier; its other options as for `load_policy`.
        num_labels: C, 1 for a reward model and 2 for a process reward model.
        path: a checkpoint to read weights or adapter from instead of the model's own folder.
        device: where its weights live.
        disable_dropout: set every dropout probability to 0, the adapter's and the head's too.
        seed: of a new head and of a new adapter; the same on all ranks. The global random state stays.
        trainable: False freezes it, and puts it in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, lacks weights other than a head, or is a classifier of another kind.
    """
    assert num_labels in AUTO_CLASSES, "a classifier has one label or two"
    source, config = find_source(model, path=path), load_model_config(model, path=path)
    is_new = not has_class_head(source.base, config, num_labels)
    with torch.random.fork_rng(devices=[]):  # transformers draws the missing head before it is drawn by its seed
        loaded, missing = load_base(
            model,
            source,
            device=device,
            auto=AUTO_CLASSES[num_labels],
            changes=_CHANGES[num_labels] if is_new else None,
        )
    name = class_head_name(loaded)
    # A new head is missing on purpose; anything else would be random without a word.
    refuse_missing(source.base, (key for key in missing if not is_new or not key.startswith(f"{name}.")))
    if is_new:
        _draw_head(class_head(loaded), std=_initial_std(config), seed=seed)
        _set_padding(loaded, _padding_id(load_tokenizer(model, path=path)))
    prepare_model(loaded, model, source, device=device, disable_dropout=disable_dropout, trainable=trainable, seed=seed)
    check_classifier(loaded)
    return loaded


def has_class_head(name: str, config: PretrainedConfig, num_labels: int) -> bool:
    """Whether the model is a classifier of the wanted kind already; an error where it is of another or can be none."""
    if type(config) not in AUTO_CLASSES[num_labels]._model_mapping and not hasattr(config, "auto_map"):
        raise ModelError(
            f"transformers must have a {ENDINGS[num_labels]} of the model type {config.model_type}, but has none. Use "
            "a model of another family."
        )
    architecture = next(iter(config.architectures or ()), "")
    if not architecture.endswith(tuple(ENDINGS.values())):
        return False
    if not architecture.endswith(ENDINGS[num_labels]) or config.num_labels != num_labels:
        raise ModelError(
            f"{name} must be a language model or a {ENDINGS[num_labels]} of num_labels {num_labels}, but is a "
            f"{architecture} of num_labels {config.num_labels}. Give another model."
        )
    return True


def _initial_std(config: PretrainedConfig) -> float:
    return float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)


@torch.no_grad()
def _draw_head(head: nn.Module, *, std: float, seed: int) -> None:
    # Drawn on the CPU by a generator of its own: the same on every rank and device.
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        drawn = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            drawn.normal_(0.0, std, generator=generator)
        parameter.copy_(drawn)


def _set_padding(model: PreTrainedModel, pad: int) -> None:
    """Let transformers find the ends of padded sequences."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad


def load_classifier_tokenizer(model: ModelConfig, *, path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a classifier: it pads with what the classifier takes for padding.

    That is another token than the end of a sequence wherever there is one, so that the end is read.

    Raises:
        ModelError: it cannot be loaded.
    """
    tokenizer, config = load_tokenizer(model, path=path), load_model_config(model, path=path)
    architecture = next(iter(config.architectures or ()), "")
    pad = config.get_text_config().pad_token_id if architecture.endswith(tuple(ENDINGS.values())) else None
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(_padding_id(tokenizer) if pad is None else pad)
    return tokenizer


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or where that ends sequences too, another special token's."""
    pad: int = tokenizer.pad_token_id
    # With one token for both, the end would be taken for padding and not be read.
    if pad != tokenizer.eos_token_id:
        return pad
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    special = {
        number: str(token).lower()
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and number not in used
    }
    for name in _PADDING_NAMES:
        for number, token in special.items():
            if name in token:
                return number
    return pad


@torch.no_grad()
def check_classifier(model: PreTrainedModel) -> None:
    """Prove on two tokens that the head makes the model's logits of its hidden states.

    Raises:
        ModelError: it does not.
    """
    weight: Any = class_head(model).weight
    training = model.training
    model.train(False)
    pad = model.config.get_text_config().pad_token_id
    # A pooling model reads at the last token that is no padding, which must be the last one here.
    ids = torch.tensor([[number for number in (1, 2, 3) if number != pad][:2]], device=weight.device)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    actual = _classify(model, hidden_states(model, input_ids=ids)).float()
    model.train(training)
    if _is_pooling(model):
        actual = actual[:, -1]
    if expected.shape != actual.shape or not torch.allclose(expected, actual, rtol=1e-2, atol=1e-3):
        raise ModelError(
            f"logits must be the head times the hidden states, but {type(causal_model(model)).__name__} computes them "
            "otherwise. Use another model."
        )


def count_classifier_parameters(model: ModelConfig, *, num_labels: int) -> ParameterCount:
    """Parameters of the classifier, counted without allocating them.

    Raises:
        ModelError: its configuration cannot be loaded, it is a classifier of another kind, or its adapter does not fit.
    """
    has_class_head(str(model.model_name_or_path), load_model_config(model), num_labels)
    return count_parameters(model, auto=AUTO_CLASSES[num_labels], changes=_CHANGES[num_labels])
