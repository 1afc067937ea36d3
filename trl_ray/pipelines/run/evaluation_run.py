"""An evaluation by itself: a run of its own, in a folder of its own, that trains nothing.

options of the run --evaluation_config--> options of the evaluation        on_evaluate --> EvaluatedNumbers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from trl_ray.config.runs.run_config import RunConfig

ConfigT = TypeVar("ConfigT", bound=RunConfig)


class EvaluatedNumbers:
    """A callback that keeps what was evaluated last."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **payload: Any) -> None:
        """See the class."""
        self.numbers = {name.removeprefix("eval_"): value for name, value in metrics.items()}


def evaluation_config(config: ConfigT, folder: str) -> ConfigT:
    """The options of one evaluation in a folder of its own: no checkpoints, no services, no callbacks."""
    return config.replace(
        output_dir=folder,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=None,
        save_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
        resume_from_checkpoint=None,
        report_to=[],
        push_to_hub=False,
        callbacks=[],
        html_report=False,
    )
