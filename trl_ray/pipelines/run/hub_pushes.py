"""When a run's model goes to the Hub: with checkpoints, by a callback of the run's own, and when it ends.

save -> HubCallback -> push_run -> models.hub          train() -> push_run
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trl_ray.config.runs.cadence_options import HubStrategy
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import RunError
from trl_ray.models.checkpoint import list_checkpoints
from trl_ray.models.hub import HubPlace, model_card, push_model

_LOG = logging.getLogger(__name__)
_WHOLE = {HubStrategy.CHECKPOINT: 1, HubStrategy.ALL_CHECKPOINTS: 1_000_000}
_TOLD = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "optim", "lr_scheduler_type")


def hub_place(config: RunConfig, revision: str | None = None) -> HubPlace:
    """Where the model of a run goes."""
    return HubPlace(
        repo_id=config.hub_model_id or Path(config.output_dir).expanduser().absolute().name,
        token=config.hub_token,
        private=config.hub_private_repo,
        revision=revision or config.hub_revision,
    )


def run_card(
    config: RunConfig,
    *,
    pipeline: str,
    model_name: str | None = None,
    dataset: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The model card of a run.

    Args:
        config: of the run.
        pipeline: its name.
        model_name: None takes the one on the Hub.
        dataset: None takes that of the configuration.
        tags: of the user's.
    """
    return model_card(
        repo_id=model_name or hub_place(config).repo_id,
        base_model=config.model_name_or_path,
        pipeline=pipeline,
        dataset=dataset or config.dataset_name,
        options={name: str(getattr(config, name)) for name in _TOLD},
        tags=tags,
    )


def push_run(
    config: RunConfig,
    model: Path,
    *,
    pipeline: str,
    message: str,
    revision: str | None = None,
    card: str | None = None,
) -> str:
    """Upload the model of a checkpoint, with a card that says how it was trained.

    Args:
        config: of the run.
        model: folder of the checkpoint.
        pipeline: its name.
        message: of the commit.
        revision: a branch; None takes the configuration's.
        card: None writes the usual one.

    Returns:
        The address of the commit.

    Raises:
        RunError: the Hub cannot be reached, or refuses.
    """
    place = hub_place(config, revision)
    whole = _WHOLE.get(config.hub_strategy, 0)
    card = card or run_card(config, pipeline=pipeline)
    return push_model(model, place, card=card, message=message, with_checkpoints=whole)


class HubCallback:
    """Pushes beside training, one checkpoint at a time; a failure is a warning, and the next one is tried again.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        self._last: Future[None] | None = None

    def on_save(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
        """Begin with the newest checkpoint, unless an older one is still under way."""
        del args, control, payload
        busy = self._last is not None and not self._last.done()
        if busy and not self._config.hub_always_push:
            return
        path = list_checkpoints(Path(self._config.output_dir) / "checkpoints")[-1]
        self._last = self._thread.submit(self._push, path, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
        """Wait for what is under way: the last model follows it."""
        del args, state, control, payload
        self._thread.shutdown(wait=True)

    def _push(self, path: Path, step: int) -> None:
        try:
            push_run(self._config, path, pipeline=self._config.pipeline, message=f"Training in progress, step {step}")
        except RunError as error:
            _LOG.warning("%s", error)
