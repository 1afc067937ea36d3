"""Reward models of a run: told apart from reward functions, checked before anything starts, and started as actors.

reward_funcs --separate_reward_models--> functions | models        options --find--> facts --spawn--> ScoringModel
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from trl_ray.actors.reward_model_worker import RewardModelWorker, open_reader
from trl_ray.actors.reward_worker import ScoringModel
from trl_ray.config.reward_model_options import RewardModelOptions, check_reward_models
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.errors import ConfigError, ModelError
from trl_ray.models.adapters.adapter_config import is_adapter_folder
from trl_ray.models.given_model import is_model
from trl_ray.models.scoring.reward_model import RewardModelFacts, count_reward_parameters, find_reward_model
from trl_ray.pipelines.run.given_objects import GivenFolders
from trl_ray.pipelines.run.planning import PROCESS, dtype_bytes
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime, reward_model_plan
from trl_ray.types import Prompt

GivenReward: TypeAlias = Any
"""A name, a function, a folder of a model, or a model."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARE_OF_LEASE = 0.9
"""A reward worker gives up on a model before the rollout worker, which waits for a lease, gives up on the reward
worker; so the failure has the model's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparatedRewards:
    """What was given as `reward_funcs`, functions apart from models."""

    functions: list[str | Callable[..., Any]]
    given: list[str | Callable[..., Any]] | None
    """The same, or None where Python gave none."""
    changes: dict[str, Any]
    """Options of `RolloutRunConfig` that take the models in; without `reward_funcs`."""


def name_reward_models(
    given: GivenReward | Sequence[GivenReward] | None,
    tokenizers: object | Sequence[object] | None,
    folders: GivenFolders,
) -> tuple[list[GivenReward] | None, frozenset[str]]:
    """Reward functions with the folders of models that were given as objects in their place, and those folders.

    Raises:
        ConfigError: something that is neither name, function nor model of transformers.
    """
    if given is None:
        return None, frozenset()
    every = list(given) if isinstance(given, list | tuple) else [given]
    readers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(every)
    if len(readers) != len(every):
        raise ConfigError(
            f"reward_processing_classes must have one entry for each of the {len(every)} reward_funcs, got "
            f"{len(readers)}. Write None for functions."
        )
    written: set[str] = set()
    for place, (each, reader) in enumerate(zip(every, readers, strict=True)):
        if is_model(each):
            folder = folders.add(f"reward{place}", each, reader)
            every[place] = folder
            written.add(folder)
        elif not isinstance(each, str) and (not callable(each) or hasattr(each, "state_dict")):
            raise ConfigError(
                f"reward_funcs must be names, functions or models of transformers, got a {type(each).__name__}. Wrap "
                "it in a function, or name a folder written by save_pretrained."
            )
    return every, frozenset(written)


def separate_reward_models(
    reward_funcs: Sequence[GivenReward] | None, args: RolloutRunConfig, *, models: Collection[str] = ()
) -> SeparatedRewards:
    """Tell reward functions from folders of models, which TRL takes in the same list; weights go along.

    A model that `args` holds already, as those of a run that is resumed do, is not taken twice.

    Args:
        reward_funcs: as Python gave them; None takes those of `args`.
        args: as Python gave them, or the pipeline's defaults.
        models: folders that are yet to be written.
    """
    given = list(args.reward_funcs) if reward_funcs is None else list(reward_funcs)
    folders = [isinstance(each, str) and (each in models or names_model(each)) for each in given]
    functions = [each for each, is_model in zip(given, folders, strict=True) if not is_model]
    as_given = None if reward_funcs is None else functions
    if not any(folders):
        return SeparatedRewards(functions=functions, given=as_given, changes={})
    weights = args.reward_weights
    split = weights is not None and len(weights) == len(given)
    each_weight = weights if weights is not None and split else [1.0] * len(given)
    known = {model.model_name_or_path for model in args.scoring_models}
    named = [
        RewardModelOptions(model_name_or_path=str(each), weight=weight)
        for each, is_model, weight in zip(given, folders, each_weight, strict=True)
        if is_model and each not in known
    ]
    changes: dict[str, Any] = {"reward_models": [*args.reward_models, *named]}
    if split:
        left = [weight for weight, is_model in zip(each_weight, folders, strict=True) if not is_model]
        changes["reward_weights"] = left or None
    return SeparatedRewards(functions=functions, given=as_given, changes=changes)


def names_model(name: str) -> bool:
    """Whether a string is a model's, by its folder or its name on the Hub, and so no name of a function."""
    folder = Path(name).expanduser()
    if _HUB_NAME.fullmatch(name) and not folder.exists():
        # A file of functions, or one in a folder that is here, is misspelt rather than elsewhere.
        return folder.suffix != ".py" and not folder.parent.is_dir()
    return folder.is_dir() and ((folder / "config.json").is_file() or is_adapter_folder(folder))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedRewardModel:
    """A reward model that was found fit."""

    options: RewardModelOptions
    facts: RewardModelFacts

    @property
    def memory(self) -> float:
        """Bytes that one copy is expected to hold."""
        return count_reward_parameters(self.options, self.facts) * dtype_bytes(self.options.dtype) + PROCESS

    @property
    def plan(self) -> str:
        """The key of its actors' plan."""
        return reward_model_plan(self.options.label)


def prepare_reward_models(
    config: RolloutRunConfig, *, functions: Collection[str], prompt: Prompt
) -> tuple[PreparedRewardModel, ...]:
    """Find all reward models and see that they can read the data.

    Args:
        config: names them.
        functions: names of the reward functions.
        prompt: one of the dataset.

    Raises:
        ConfigError: two parts of one name, or a step separator that is no token.
        ModelError: a model is not there or cannot rate, or its chat template is missing or refuses the prompt.
    """
    try:
        check_reward_models(config.scoring_models, tuple(functions))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return tuple(_prepare(options, config, prompt) for options in config.scoring_models)


def _prepare(options: RewardModelOptions, config: RolloutRunConfig, prompt: Prompt) -> PreparedRewardModel:
    facts = find_reward_model(options)
    try:
        open_reader(options, facts, template_kwargs=config.chat_template_kwargs).check(prompt)
    except (ConfigError, ModelError) as error:
        raise type(error)(f"reward model {options.label}: {error}") from error
    return PreparedRewardModel(options=options, facts=facts)


def reward_model_arguments(config: RolloutRunConfig) -> tuple[Mapping[str, Any], ...]:
    """Constructor arguments of the actors of each reward model, without their names."""
    return tuple(
        {
            "options": options,
            "template_kwargs": config.chat_template_kwargs,
            "join_groups": config.joins_groups if options.join_groups is None else options.join_groups,
        }
        for options in config.scoring_models
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRewardModel:
    """The actors of one reward model."""

    handles: tuple[ActorHandle, ...]
    scoring: ScoringModel
    """The same for reward workers."""


async def spawn_reward_models(
    runtime: Runtime, arguments: Sequence[Mapping[str, Any]], *, lease_s: float
) -> tuple[StartedRewardModel, ...]:
    """Start every copy of every reward model; each has yet to read its weights."""
    models = []
    for each in arguments:
        options: RewardModelOptions = each["options"]
        handles: list[ActorHandle] = []
        for slot in range(options.num_workers):
            name = f"reward-model-{options.label}-{slot}"
            plan = reward_model_plan(options.label)
            handles.append(
                await runtime.spawn(Role.REWARD_MODEL, name, RewardModelWorker, slot=slot, plan=plan, name=name, **each)
            )
        scoring = ScoringModel(
            name=options.label,
            weight=options.weight,
            handles=tuple(handles),
            deadline_s=_SHARE_OF_LEASE * lease_s,
        )
        models.append(StartedRewardModel(handles=tuple(handles), scoring=scoring))
    return tuple(models)
