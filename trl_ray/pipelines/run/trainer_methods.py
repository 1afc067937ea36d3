"""What scripts for TRL ask of a trainer around `train` and `evaluate`; no training depends on it.

last checkpoint --save_model--> a folder of its own     --push_to_hub--> the Hub, with create_model_card's text
metrics --log_metrics--> standard output     --save_metrics--> RUN_DIR/train_results.json, all_results.json
        --save_state--> RUN_DIR/trainer_state.json             create_model_card --> README.md in the run directory
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import ConfigError
from trl_ray.models.checkpoint import export_model, latest_checkpoint
from trl_ray.models.policy_loading import load_tokenizer
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import atomic_write_json, atomic_write_text
from trl_ray.observe.run_lock import in_use, is_free, living_holder
from trl_ray.pipelines.callbacks.callback_loading import specs_with
from trl_ray.pipelines.callbacks.hooks import CallbackList, TrainerState
from trl_ray.pipelines.callbacks.shown_objects import ShownLoader, ShownModel
from trl_ray.pipelines.run.given_objects import TrainerObjects
from trl_ray.pipelines.run.hub_pushes import push_run, run_card

_LIVES_IN_ACTORS = {
    "optimizer": "the optimizer lives in the learner. Name it by optim and optim_args, or pass optimizers",
    "lr_scheduler": "the schedule lives in the learner. Name it by lr_scheduler_type, or pass optimizers",
    "model_wrapped": "the model lives in the learner. Load the folder that `model` names",
    "get_train_dataloader": "there is no loader: the learner is given packed micro-batches. Iterate the dataset itself",
    "get_eval_dataloader": "there is no loader: the learner is given packed micro-batches. Iterate the dataset itself",
    "training_step": "steps are done by the learner. Write a Loss and name it: loss=package.module:Class",
    "compute_loss": "losses are computed by the learner. Write a Loss and name it: loss=package.module:Class",
    "hyperparameter_search": "a run has one configuration. Start one run for each",
    "remove_callback": "a list of callbacks is given at the start. Leave it out of callbacks=[...]",
    "pop_callback": "a list of callbacks is given at the start. Leave it out of callbacks=[...]",
}
"""Attributes of transformers' trainer that cannot be had, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverProcess:
    """What scripts ask of `trainer.accelerator`: a pipeline is driven by one process, whatever ranks there are."""

    is_main_process: bool = True
    is_local_main_process: bool = True
    process_index: int = 0
    num_processes: int = 1
    print: Callable[..., None] = print

    def wait_for_everyone(self) -> None:
        """Nobody is waited for."""


class TrainerMethods:
    """Methods and attributes of transformers' trainer that have a meaning for any pipeline."""

    config: RunConfig
    name: ClassVar[str]
    _inputs: Any
    _callbacks: CallbackList
    _given_callbacks: Sequence[Any] | None
    _objects: TrainerObjects
    _trained: Any
    """The `TrainOutput` of a run that has ended."""
    _resume: bool

    def __getattr__(self, name: str) -> Any:
        if name in _LIVES_IN_ACTORS:
            raise AttributeError(f"{type(self).__name__} has no {name}: {_LIVES_IN_ACTORS[name]}.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def model(self) -> Path | None:
        """Folder of the run's model: the one it ended with, else its last checkpoint; None before there is one."""
        if self._trained is not None:
            return Path(self._trained.model)
        if not self._resume:
            return None
        directory = RunDirectory.open_existing(self.config.output_dir)
        # Read beside a run that lives nothing may be moved: what looks half-replaced may be just being replaced.
        found = latest_checkpoint(directory.checkpoints, mend=is_free(directory.path)).path
        return None if found is None else Path(found)

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> Path:
        """Copy the run's model, with its tokenizer, to a folder of its own; None: ``model`` in the run directory.

        Returns:
            The folder.

        Raises:
            ConfigError: there is no model yet, or another process writes the run directory now.
            CheckpointError: the folder cannot be written.
        """
        return export_model(self._require_model("saved"), output_dir or _folder(self.config) / "model")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> str:
        """Upload the run's model with its card to `hub_model_id`.

        Args:
            commit_message: of the commit.
            blocking: must be true; `hub_strategy` pushes beside training.
            token: None takes `hub_token`.
            revision: a branch; None takes `hub_revision`.
            card: `dataset_name`, `model_name` and `tags` of the model card; other words are not looked at.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: there is no model yet.
            RunError: the Hub cannot be reached, or refuses.
        """
        if not blocking:
            raise ConfigError("blocking must be true here. Set push_to_hub=true to push beside training.")
        model = self._require_model("pushed")
        tags = card.get("tags") or ()
        text = run_card(
            self.config,
            pipeline=self.name,
            model_name=card.get("model_name"),
            dataset=card.get("dataset_name"),
            tags=[tags] if isinstance(tags, str) else list(tags),
        )
        config = self.config if token is None else self.config.replace(hub_token=token)
        message = commit_message or "End of training"
        return push_run(config, model, pipeline=self.name, message=message, revision=revision, card=text)

    def _require_model(self, what: str) -> Path:
        if (model := self.model) is None:
            raise ConfigError(
                f"a model must be trained before it is {what}, but there is none yet. Call train() first."
            )
        return model

    @property
    def args(self) -> RunConfig:
        """The resolved options."""
        return self.config

    @property
    def state(self) -> TrainerState:
        """As callbacks see it."""
        return self._callbacks.state

    @property
    def accelerator(self) -> DriverProcess:
        """The process that drives the run."""
        return DriverProcess()

    def is_world_process_zero(self) -> bool:
        """Always: there is one driver."""
        return True

    is_local_process_zero = is_world_process_zero

    @property
    def train_dataset(self) -> Any:
        """As it was given; None where the configuration names it."""
        return self._inputs.train_dataset

    @property
    def eval_dataset(self) -> Any:
        """As it was given; None where the configuration names it."""
        return self._inputs.eval_dataset

    @property
    def processing_class(self) -> Any:
        """The tokenizer that rows are made into tokens with.

        Raises:
            ModelError: it cannot be loaded.
        """
        given = self._objects.processing_class
        return given if given is not None else load_tokenizer(self.config)

    def _shown_objects(self, steps_per_epoch: float | None) -> dict[str, Any]:
        """What callbacks are shown beside options, state and control."""
        config, inputs = self.config, self._inputs
        batches = None if steps_per_epoch is None else math.ceil(steps_per_epoch * config.gradient_accumulation_steps)
        eval_size = int(getattr(config, "per_device_eval_batch_size", 1))
        return {
            "model": ShownModel(config),
            "processing_class": self.processing_class,
            "train_dataloader": ShownLoader(
                "train_dataloader",
                dataset=inputs.train_dataset,
                batch_size=config.per_device_train_batch_size,
                batches=batches,
            ),
            "eval_dataloader": ShownLoader(
                "eval_dataloader", dataset=inputs.eval_dataset, batch_size=eval_size, batches=None
            ),
        }

    def add_callback(self, callback: Any) -> None:
        """As one more of `callbacks`, before `train`; an object, or a class that is made without arguments."""
        given = [*(self._given_callbacks or ()), callback]
        self.config = self.config.replace(callbacks=specs_with(self.config.callbacks, given))
        self._given_callbacks = given

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print numbers, one a line."""
        print(f"***** {split} metrics *****")
        width = max(map(len, metrics), default=0)
        for name in sorted(metrics):
            value = metrics[name]
            print(f"  {name:{width}} = {value:.4f}" if isinstance(value, float) else f"  {name:{width}} = {value}")

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write numbers to ``<split>_results.json`` in the run directory, and into ``all_results.json``.

        Raises:
            RunError: the files cannot be written.
        """
        folder = _folder(self.config)
        atomic_write_json(folder / f"{split}_results.json", dict(metrics))
        if combined:
            every = folder / "all_results.json"
            known = json.loads(every.read_text(encoding="utf-8")) if every.is_file() else {}
            atomic_write_json(every, {**known, **metrics})

    def save_state(self) -> None:
        """Write what callbacks see of the run's state to ``trainer_state.json`` in the run directory.

        Raises:
            RunError: the file cannot be written.
        """
        atomic_write_json(_folder(self.config) / "trainer_state.json", asdict(self._callbacks.state))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **more: Any
    ) -> None:
        """Write a model card, README.md in the run directory.

        Args:
            model_name: None takes the one that the Hub would get.
            dataset_name: None takes that of the configuration.
            tags: one, or several.
            more: further words of transformers' cards, not looked at.

        Raises:
            RunError: the file cannot be written.
        """
        del more
        given = [tags] if isinstance(tags, str) else list(tags or ())
        card = run_card(self.config, pipeline=self.name, model_name=model_name, dataset=dataset_name, tags=given)
        atomic_write_text(_folder(self.config) / "README.md", card)


def _folder(config: RunConfig) -> Path:
    folder = Path(config.output_dir).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"the run directory {folder} must be there, but there is none yet. Call train() first.")
    if holder := living_holder(folder, other=True):
        raise in_use(folder, holder)
    return folder
