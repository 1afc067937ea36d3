"""What configurations have in common whose rows may be a stream.

RunConfig + StreamConfig ─► StreamedRunConfig ─┬─► SupervisedRunConfig: rows are examples
                                               └─► RolloutRunConfig: rows are prompts
"""

from __future__ import annotations

from trl_ray.config.base import rule
from trl_ray.config.example_options import StreamConfig
from trl_ray.config.runs.cadence_options import Strategy
from trl_ray.config.runs.run_config import RunConfig


class StreamedRunConfig(RunConfig, StreamConfig):
    """A run whose length cannot follow from its rows where these are a stream."""

    @rule
    def _check_streaming(self) -> None:
        if self.dataset_streaming and self.max_steps < 1:
            raise ValueError(
                f"max_steps must be at least 1 with dataset_streaming=true, got {self.max_steps}: a stream does not "
                "say how long it is. Set max_steps."
            )

    @rule
    def _check_epochs_of_a_stream(self) -> None:
        if self.dataset_streaming and self.logging_strategy is Strategy.EPOCH:
            raise ValueError(
                "logging_strategy must be steps or no with dataset_streaming=true, got epoch: a stream does not say "
                "how long it is. Set logging_strategy=steps."
            )
