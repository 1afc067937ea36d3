"""The head of a model and the hidden states it is applied to, and the proof that both give the model's logits.

hidden states [R,T,H] --head_module--> [R,T,V] --logit_transform: scale, soft-capping--> the model's logits [R,T,V]
hidden states [R,T,H] --class_head---> [R,T,C]                                      a classifier's logits [R,T,C]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_ray.algorithms.head.head_problem import LogitTransform
from trl_ray.errors import ModelError

_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names in model configurations of what logits are multiplied by: Cohere, Muse Glimmer, Falcon-H1."""
_DIVISORS = ("logits_scaling",)
"""Of what they are divided by: Granite, MiniCPM3."""
_MULTIPLYING_TYPES = frozenset({"hyperclovax"})
"""Model types that multiply by what others of that name divide by."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Of the soft cap: Gemma, RecurrentGemma, xLSTM."""


_CANNOT_COMPUTE = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, IndexError)
"""What models raise that cannot be given tokens alone, or have no kernel for their dtype."""
_LOOKS_AHEAD = 0.05
"""Share of the difference between two places that rounding never makes."""


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself, without a PeftModel around it; its layers hold the adapters all the same."""
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    assert isinstance(inner, PreTrainedModel), f"a policy is a transformers model, got {type(inner).__name__}"
    return inner


def head_module(model: nn.Module) -> nn.Linear:
    """The language-model head that computes at the moment: weight [V, H], bias [V] or None.

    Raises:
        ModelError: the model has no linear head.
    """
    inner = causal_model(model)
    head: Any = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    copies = getattr(head, "modules_to_save", None)
    if copies is not None:  # trained in full beside an adapter
        head = head.original_module if head.disable_adapters else copies[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"the model must end in a linear head, but {type(inner).__name__} ends in {type(head).__name__}. "
            "Use a causal language model."
        )
    return head


def head_modules(model: nn.Module) -> list[nn.Linear]:
    """Every head that `head_module` may give: one, or with an adapter that trains a copy of it the frozen one, too.

    Raises:
        ModelError: the model has no linear head.
    """
    head: Any = causal_model(model).get_output_embeddings()  # type: ignore[no-untyped-call]
    copies = getattr(head, "modules_to_save", None)
    return [head_module(model)] if copies is None else [head.original_module, *copies.values()]


def trains_head_copy(model: nn.Module) -> bool:
    """Whether an adapter trains a copy of the head, so that the policy and what it began with have different ones."""
    return len(head_modules(model)) > 1


CLASS_HEADS = ("score", "classifier")
"""Names of the heads of transformers' classifiers."""


def is_classifier(model: nn.Module) -> bool:
    """True for a model that ends in classes rather than in the vocabulary."""
    return type(causal_model(model)).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))


def class_head_name(model: nn.Module) -> str:
    """The name of a classifier's head.

    Raises:
        ModelError: it has none of a known name.
    """
    inner = causal_model(model)
    names = [name for name in CLASS_HEADS if isinstance(getattr(inner, name, None), nn.Module)]
    if len(names) != 1:
        raise ModelError(
            f"a classifier must end in a linear layer named {' or '.join(CLASS_HEADS)}, but {type(inner).__name__} has "
            f"{names or 'none'}. Use another model."
        )
    return names[0]


def class_head(model: nn.Module) -> nn.Module:
    """A classifier's head: weight [C, H], bias [C] or None; PEFT's stand-in for it where it is trained with an adapter.

    Raises:
        ModelError: the model has none.
    """
    head: nn.Module = getattr(causal_model(model), class_head_name(model))
    return head


def head_weight(model: nn.Module) -> Tensor:
    """The weight of whatever head the model has: [V, H] or [C, H].

    Raises:
        ModelError: it has none.
    """
    weight: Tensor = (class_head(model) if is_classifier(model) else head_module(model)).weight  # type: ignore[assignment]
    return weight


def logit_transform(model: nn.Module) -> LogitTransform:
    """What the model's configuration says it does to the output of its head; `check_head` proves it.

    Raises:
        ModelError: a scale or a cap is not positive.
    """
    config = causal_model(model).config.get_text_config()
    values: dict[str, float] = {}
    for name in (*_MULTIPLIERS, *_DIVISORS, *_CAPS):
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            if value <= 0:
                raise ModelError(f"{name} of the model's configuration must be positive, got {value}. Correct it.")
            values[name] = float(value)
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= values.get(name, 1.0)
    for name in _DIVISORS:
        divisor = values.get(name, 1.0)
        scale *= divisor if config.model_type in _MULTIPLYING_TYPES else 1.0 / divisor
    return LogitTransform(scale=scale, softcap=next((values[name] for name in _CAPS if name in values), None))


def body(model: nn.Module) -> Any:
    """The model without its head."""
    inner: Any = causal_model(model)
    # Llama 4 names a prefix that its text model does not have, and gives itself.
    return getattr(inner, "model", inner) if inner.base_model is inner else inner.base_model


def hidden_states(model: nn.Module, **inputs: Tensor | None) -> Tensor:
    """Final hidden states [R, T, H], after the last norm and before the head."""
    states: Tensor = body(model)(**inputs, use_cache=False).last_hidden_state
    dtype = head_weight(model).dtype
    # State-space models keep float32 between their layers; their heads, as all, read what they compute in.
    is_narrower = states.dtype is torch.float32 and dtype in {torch.bfloat16, torch.float16}
    return states.to(dtype) if is_narrower else states


def _check_causal(model: nn.Module, logits: Tensor, changed: Tensor) -> None:
    """What is said after the first token [1, 2, V] must not depend on the second, which differs."""
    difference = float((logits[:, 0] - changed[:, 0]).abs().mean())
    spread = float((logits[:, 0] - logits[:, 1]).abs().mean())
    if difference > _LOOKS_AHEAD * spread:  # NaN passes here, and is told with its cause
        raise ModelError(
            f"a language model must not see the tokens that come after, but in {type(causal_model(model)).__name__} "
            f"the second token changes the logits of the first by {difference:.3g} on average (it is an encoder, or "
            "its configuration says is_decoder=false). Use a causal language model."
        )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Prove on two tokens that head, scale and soft-capping make the model's logits of its hidden states.

    Raises:
        ModelError: they do not, and log-probs computed from the head would be wrong; or the logits are NaN, or those of
            a token change with what follows it, or the model cannot be computed in its dtype.
    """
    head, transform = head_module(model), logit_transform(model)
    training = model.training
    model.train(False)
    # In evaluation mode, as dropout would make the two differ.
    ids, others = (torch.tensor([pair], device=head.weight.device) for pair in ([1, 2], [1, 3]))
    try:
        expected, changed = (model(input_ids=each, use_cache=False).logits for each in (ids, others))
        actual = torch.nn.functional.linear(hidden_states(model, input_ids=ids), head.weight, head.bias).float()
    except _CANNOT_COMPUTE as error:
        first_line = str(error).strip().split("\n")[0].rstrip(". ")
        raise ModelError(
            f"the learner must be able to compute {type(causal_model(model)).__name__} of two tokens in "
            f"{str(head.weight.dtype).removeprefix('torch.')}, but: {type(error).__name__}: {first_line}. Set another "
            "dtype (dtype=float32), or use another model."
        ) from error
    finally:
        model.train(training)
    _check_causal(model, expected.float(), changed.float())
    actual = actual * transform.scale
    if transform.softcap is not None:
        actual = transform.softcap * torch.tanh(actual / transform.softcap)
    # NaN fails every comparison, and would be blamed on the head.
    if expected.isnan().any():
        damaged = next((name for name, weight in model.named_parameters() if weight.isnan().any()), None)
        raise ModelError(
            f"the weights of {causal_model(model).config.name_or_path or type(model).__name__} must be numbers, but "
            f"{f'{damaged} holds' if damaged else 'its logits are'} NaN. Fetch or save them again."
        )
    if not torch.allclose(expected.float(), actual, rtol=1e-2, atol=1e-3):
        raise ModelError(
            f"logits must be the head times the hidden states, scaled by {transform.scale:g} and soft-capped at "
            f"{transform.softcap} as its configuration says, but {type(causal_model(model)).__name__} changes them "
            "otherwise (a soft-capping or logit scale of another name, for instance). Use another model."
        )
