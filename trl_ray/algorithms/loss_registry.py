"""From the options of any objective to its `Loss`: the learner runs one, the driver asks another for totals.

options --loss_class: the one they name, or the section's own--> class --its own options--> Loss

A loss is found by its section (`LossSection.built_in`): nothing here knows which losses there are.
"""

from __future__ import annotations

from typing import Any

from trl_ray.algorithms.loss import Loss
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.object_paths import find_plug_in
from trl_ray.errors import ConfigError

ENTRY_POINTS = "trl_ray.losses"
"""Group of installed packages' entry points: ``name = package.module:Class``."""
_PROTOCOL = ("__call__", "needs", "totals", "has_gradient", "joined", "after_update", "state_dict", "load_state_dict")


def loss_class(options: LossSection) -> type[Loss]:
    """The class of the loss that the options ask for.

    Raises:
        ConfigError: there is none of that name, or what is there is no loss.
    """
    path = options.loss or options.built_in
    found = find_plug_in(path, group=ENTRY_POINTS, what="loss")
    # In the classes themselves: every class can be called, to make one.
    known = {name for each in getattr(found, "__mro__", ()) for name in vars(each)}
    missing = [name for name in _PROTOCOL if name not in known]
    if not isinstance(found, type) or missing:
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise ConfigError(
            f"loss must name a class with everything that trl_ray.algorithms.loss.Loss asks for, got {path!r}, "
            f"{found!r}{lacks}. Derive it from trl_ray.algorithms.loss.FixedLoss, or from the loss that it changes."
        )
    return found


def resolve_options(options: LossSection) -> LossSection:
    """The options as the loss itself takes them: those of a loss from outside may be of a class of its own.

    What is resolved already stays as it is.

    Raises:
        ConfigError: there is no such loss, or it has no such options.
    """
    return _own_options(loss_class(options), options)


def _own_options(made: type[Loss], options: LossSection) -> LossSection:
    own: type[LossSection] | None = getattr(made, "options_class", None)
    if own is None:
        if options.loss_kwargs:
            raise ConfigError(
                f"loss_kwargs must be left out where the loss has no options_class, got {sorted(options.loss_kwargs)} "
                f"with loss={options.loss}. Give it one, a LossSection with these fields, or remove loss_kwargs."
            )
        return options
    twice = sorted(options.loss_kwargs.keys() & type(options).model_fields.keys())
    if twice:
        raise ConfigError(
            f"loss_kwargs must hold the loss's own options only, got {', '.join(twice)}, which the run has itself. Set "
            "them beside loss_kwargs."
        )
    shared = {name: getattr(options, name) for name in type(options).model_fields if name in own.model_fields}
    return own(**{**shared, **options.loss_kwargs, "loss_kwargs": {}})


def build_loss(options: LossSection, *, max_completion_length: int | None = None) -> Loss:
    """The objective that the options describe.

    Args:
        options: of the run; those of a loss from outside are resolved.
        max_completion_length: the fixed length of dr_grpo, in tokens; only the policy loss reads it.

    Raises:
        ConfigError: there is no such loss, or it has no such options.
    """
    made: Any = loss_class(options)
    built: Loss = made(_own_options(made, options), max_completion_length=max_completion_length)
    return built
