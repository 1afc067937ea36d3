"""What TRL's trainers take as Python objects, as options of the configuration that stand for it.

model, processing_class --GivenFolders--> a folder beside the run directory, whose name is model_name_or_path
optimizers              --optimizer_options--> optim, learning_rate, ...   quantization_config --> load_in_4bit, ...
"""

from __future__ import annotations

import re
import shutil
import uuid
import weakref
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from trl_ray.config.messages import unknown_key
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ConfigError
from trl_ray.models.backends.given_optimizer import optimizer_options
from trl_ray.models.given_model import given_options, quantization_options, write_given

ConfigT = TypeVar("ConfigT", bound=RunConfig)


class GivenFolders:
    """Folders beside a run directory for what was given as objects; gone again unless the run starts.

    Args:
        output_dir: of the run.
    """

    def __init__(self, output_dir: str) -> None:
        self._run = Path(output_dir).expanduser().absolute()
        self._waiting: list[tuple[Path, object, object | None]] = []
        self._written: list[Path] = []
        self._remove = weakref.finalize(self, _remove_all, self._written)

    def add(self, what: str, model: object, tokenizer: object | None) -> str:
        """The folder that an object will be written to."""
        folder = self._run.with_name(f"{self._run.name}-{what}-{uuid.uuid4().hex[:8]}")
        self._waiting.append((folder, model, tokenizer))
        return str(folder)

    def write(self, options: ModelConfig) -> None:
        """Write all that is not yet written.

        Raises:
            ModelError: an object is no tokenizer, or none can be found.
        """
        while self._waiting:
            folder, model, tokenizer = self._waiting[0]
            self._written.append(folder)
            write_given(folder, model=model, tokenizer=tokenizer, options=options)
            self._waiting.pop(0)

    def as_recorded(self, config: ConfigT, before: RunConfig) -> ConfigT:
        """The options with the folders of the run that goes on, where both name folders of objects that were given."""
        pattern = re.compile(re.escape(f"{self._run.name}-") + r"(model|reference|teacher)-[0-9a-f]{8}")

        def is_given(value: object) -> bool:
            folder = Path(value) if isinstance(value, str) else None
            return (
                folder is not None and folder.parent == self._run.parent and pattern.fullmatch(folder.name) is not None
            )

        named = [name for name in type(config).model_fields if name.endswith("model_name_or_path")]
        same = {
            name: getattr(before, name)
            for name in named
            if is_given(getattr(config, name)) and is_given(getattr(before, name))
        }
        return config.replace(**same) if same else config

    def keep(self) -> None:
        """The run has started: it needs the folders from now on, also when it is resumed."""
        self._remove.detach()


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainerObjects:
    """Arguments of TRL's trainers beside the model, its data and its callbacks."""

    processing_class: object | None = None
    """A tokenizer."""
    ref_model: object | None = None
    """As the model."""
    quantization_config: object | None = None
    optimizers: tuple[Any, Any] = (None, None)
    """An optimizer and a schedule of torch's."""
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None
    preprocess_logits_for_metrics: object | None = None
    compute_loss_func: object | None = None
    data_collator: object | None = None
    teacher_model: object | None = None
    """Of distillation, as the model."""
    model_init: object | None = None
    """Makes the model, where none is given."""
    tools: object | None = None
    rollout_func: object | None = None
    environment_factory: object | None = None
    rollout_worker: object | None = None
    weight_transfer: object | None = None

    def made_model(self, model: object | None) -> object | None:
        """The model that is given, or made by `model_init`.

        Raises:
            ConfigError: both are given, or `model_init` is no function.
        """
        if self.model_init is None:
            return model
        if model is not None or not callable(self.model_init):
            raise ConfigError(
                f"model_init must be a function that makes the model, without a model beside it, got "
                f"{type(self.model_init).__name__} and {type(model).__name__}. Remove one of the two."
            )
        return cast(object, self.model_init())

    def options(self, *, model: object, folders: GivenFolders) -> dict[str, Any]:
        """The options that stand for them and for the model.

        Raises:
            ConfigError: one of them cannot be had here.
            ModelError: the model or the quantisation cannot.
        """
        self._refuse()
        options: dict[str, Any] = {}
        if model is not None and not isinstance(model, str):
            options |= given_options(model)
        if model is not None and (not isinstance(model, str) or self.processing_class is not None):
            options["model_name_or_path"] = folders.add("model", model, self.processing_class)
        elif self.processing_class is not None:
            raise ConfigError("processing_class needs a model beside it, got none. Give model or model_name_or_path.")
        if isinstance(self.ref_model, str):
            options["ref_model_name_or_path"] = self.ref_model
        elif self.ref_model is not None:
            given_options(self.ref_model)
            options["ref_model_name_or_path"] = folders.add("reference", self.ref_model, self.processing_class)
        if isinstance(self.teacher_model, str):
            options["teacher_model_name_or_path"] = self.teacher_model
        elif self.teacher_model is not None:
            given_options(self.teacher_model)
            options["teacher_model_name_or_path"] = folders.add("teacher", self.teacher_model, self.processing_class)
        if self.quantization_config is not None:
            options |= quantization_options(self.quantization_config)
        return options | optimizer_options(self.optimizers, self.optimizer_cls_and_kwargs)

    def _refuse(self) -> None:
        instead = {
            "preprocess_logits_for_metrics": "only pipelines on datasets have logits and labels. Remove it",
            "compute_loss_func": "a loss divides by totals of a whole update. Write a Loss and name it: "
            "loss=package.module:Class",
            "data_collator": "micro-batches are packed without padding. Remove it",
            "tools": "a completion is sampled in one go, and nothing calls a tool. Describe tools in the dataset's "
            "column `tools`",
            "rollout_func": "completions are sampled by the engines of the rollout workers. Name one: rollout.engine",
            "environment_factory": "a completion is sampled in one go, and there is no environment. Remove it",
            "rollout_worker": "rollout workers are actors of the run's own. Set rollout.num_workers",
            "weight_transfer": "weights travel to the rollout workers by the run's own means. Remove it",
        }
        for name, why in instead.items():
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} must be None here, got a {type(getattr(self, name)).__name__}: {why}.")


def trainer_objects(**given: Any) -> TrainerObjects:
    """The objects that a pipeline was given by keyword; one that is None is not given.

    Raises:
        ConfigError: TRL's trainers have no such argument.
    """
    known = [each.name for each in fields(TrainerObjects)]
    for name in given:
        if name not in known:
            raise ConfigError(unknown_key(name, known))
    return TrainerObjects(**{name: value for name, value in given.items() if value is not None})
