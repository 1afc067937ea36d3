"""Builds the sinks of a run: what every pipeline calls once.

RunDirectory + options -> open_observer -> Observer(metrics, events, trace, completions, services, console)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

from trl_ray.observe.completions import CompletionsFiles
from trl_ray.observe.console import ConsoleSink
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.services.service_sinks import MLflowSink, TensorBoardSink, TrackioSink, services_of
from trl_ray.observe.services.wandb_sink import WandbSink
from trl_ray.observe.sinks import EventsFile, MetricsFile, Observer, Sink
from trl_ray.observe.trace import TraceFile


def open_observer(
    run: RunDirectory,
    *,
    total_steps: int | None,
    config: Mapping[str, Any],
    logging_steps: int = 1,
    logging_first_step: bool = False,
    log_completions: bool = True,
    print_completions: int = 0,
    report_to: Sequence[str] = (),
    wandb_project: str = "trl_ray",
    wandb_entity: str | None = None,
    wandb_run_group: str | None = None,
    trackio_space_id: str | None = None,
    trackio_bucket_id: str | None = None,
    private: bool | None = None,
    run_name: str | None = None,
    console_stream: IO[str] | None = None,
) -> Observer:
    """Open every sink the run asks for; files first, so that they hold what a later sink fails on.

    Args:
        run: where files go; must exist.
        total_steps: optimizer steps of the run, for progress; None when unknown.
        config: resolved options as plain values; secrets are taken out before they leave the machine.
        logging_steps: steps between console lines and points of services; files take every step.
        logging_first_step: console and services take the first step, too.
        log_completions: write completions/*.parquet.
        print_completions: completions to print with each console line.
        report_to: services, see `SERVICES`.
        wandb_project: project there.
        wandb_entity: user or team in Weights & Biases.
        wandb_run_group: group of runs there.
        trackio_space_id: where Trackio writes; None is this machine.
        trackio_bucket_id: where that Space keeps its numbers.
        private: whether a Space that is made for it is.
        run_name: name there.
        console_stream: where the console writes; standard output by default.

    Raises:
        ConfigError: a service is unknown, not installed, or refuses the run.
        RunError: a file cannot be opened.
    """
    sinks: list[Sink] = [MetricsFile(run.metrics), EventsFile(run.events), TraceFile(run.trace)]
    if log_completions:
        sinks.append(CompletionsFiles(run.completions))
    name = run_name or run.path.name
    points: dict[str, Any] = {"every": logging_steps, "first": logging_first_step}
    for service in services_of(report_to):
        match service:
            case "wandb":
                sinks.append(
                    WandbSink(
                        run.path,
                        project=wandb_project,
                        entity=wandb_entity,
                        group=wandb_run_group,
                        run_name=name,
                        config=config,
                        **points,
                    )
                )
            case "tensorboard":
                sinks.append(TensorBoardSink(run.path, config=config, **points))
            case "mlflow":
                sinks.append(MLflowSink(run.path, project=wandb_project, run_name=name, config=config, **points))
            case "trackio":
                sinks.append(
                    TrackioSink(
                        project=wandb_project,
                        run_name=name,
                        config=config,
                        space_id=trackio_space_id,
                        bucket_id=trackio_bucket_id,
                        private=private,
                        **points,
                    )
                )
    sinks.append(
        ConsoleSink(total_steps=total_steps, **points, print_completions=print_completions, stream=console_stream)
    )
    return Observer(sinks)
