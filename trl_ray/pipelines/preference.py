"""Preference optimisation on datasets: DPO and its family, KTO, and CPO, SimPO and ORPO without a reference."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.preference_options import (
    CPOLossConfig,
    ORPOLossConfig,
    PreferenceLossConfig,
    UnpairedLossConfig,
)
from trl_ray.config.runs.dataset_config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.errors import ConfigError
from trl_ray.pipelines.supervised.dataset_pipeline import SupervisedPipeline
from trl_ray.types import PredictionForm


def _is_options(given: object) -> bool:
    """Whether it is a configuration, rather than a model or rows."""
    return hasattr(given, "output_dir")


class _ReferencePipeline(SupervisedPipeline):
    """Learns in comparison with a reference, which TRL's trainers take as their second argument."""

    __signature__ = inspect.signature(SupervisedPipeline)

    def __init__(self, model: object | None = None, *given: Any, **named: Any) -> None:
        """See `SupervisedPipeline`; what follows the model may also stand as in TRL: ref_model, args.

        Raises:
            ConfigError, ModelError: see there.
        """
        places = list(inspect.signature(SupervisedPipeline).parameters)[1:6]  # args, train_dataset, ...
        if given and not _is_options(given[0]):
            as_in_trl = given[0] is not None or "args" in named or any(map(_is_options, given))
            # What follows there stands in another order than ours.
            places = ["ref_model", places[0]] if as_in_trl else places
        if len(given) > len(places):
            raise ConfigError(
                f"At most {', '.join(places)} may follow the model without their names, got {len(given)} arguments. "
                "Name the others: train_dataset=..., eval_dataset=..., processing_class=..."
            )
        super().__init__(model, **dict(zip(places, given, strict=False)), **named)


class DPOPipeline(_ReferencePipeline):
    """Prefers chosen to rejected answers, against a reference (Rafailov et al. 2023, arXiv 2305.18290)."""

    config_class: ClassVar[type[RunConfig]] = DPOConfig
    loss_class: ClassVar[type[LossSection]] = PreferenceLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.PAIRS
    prediction_form: ClassVar[PredictionForm] = PredictionForm.COMPARED
    name: ClassVar[str] = "dpo"


class KTOPipeline(_ReferencePipeline):
    """Learns from answers that were found good or bad (Ethayarajh et al. 2024, arXiv 2402.01306)."""

    config_class: ClassVar[type[RunConfig]] = KTOConfig
    loss_class: ClassVar[type[LossSection]] = UnpairedLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.UNPAIRED
    prediction_form: ClassVar[PredictionForm] = PredictionForm.RATED
    name: ClassVar[str] = "kto"

    def _task(self) -> ExampleTask:
        needs_kl = self.config.part(UnpairedLossConfig).needs_kl
        return ExampleTask.UNPAIRED_WITH_KL if needs_kl else ExampleTask.UNPAIRED


class CPOPipeline(SupervisedPipeline):
    """Prefers chosen to rejected answers without a reference: CPO and SimPO (arXiv 2401.08417, 2405.14734)."""

    config_class: ClassVar[type[RunConfig]] = CPOConfig
    loss_class: ClassVar[type[LossSection]] = CPOLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.PAIRS
    prediction_form: ClassVar[PredictionForm] = PredictionForm.MEANS
    name: ClassVar[str] = "cpo"


class ORPOPipeline(SupervisedPipeline):
    """Learns chosen answers and the odds against rejected ones at once (Hong et al. 2024, arXiv 2403.07691)."""

    config_class: ClassVar[type[RunConfig]] = ORPOConfig
    loss_class: ClassVar[type[LossSection]] = ORPOLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.LIKELIHOOD_PAIRS
    prediction_form: ClassVar[PredictionForm] = PredictionForm.SHIFTED_MEANS
    name: ClassVar[str] = "orpo"
