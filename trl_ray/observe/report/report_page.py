"""Builds report.html: one file that shows a whole run and opens offline.

    RUN_DIR -> read_run -> Page(header, tiles, ledger, ...) -> templates/page.html.jinja -> RUN_DIR/report.html

Completions, reward names, errors and options are hostile text: the templates escape all of it, and the page's content
security policy lets only its own style sheet and script run (by their hashes) and forbids every request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from trl_ray.observe.report.chart_layout import PlacedChart
from trl_ray.observe.report.report_curves import curves
from trl_ray.observe.report.report_data import RunData, read_run
from trl_ray.observe.report.report_events import EventLists, events
from trl_ray.observe.report.report_samples import StepSamples, step_samples
from trl_ray.observe.report.report_summary import Header, LedgerCard, Tile, header, ledger, tiles
from trl_ray.observe.report.report_timeline import Timeline, timeline
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import atomic_write_text, clean_text

# Control characters, which HTML forbids, become the pictures that Unicode has of them.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything the templates show; None and empty lists are what the run does not have."""

    header: Header
    tiles: Sequence[Tile]
    ledger: LedgerCard | None
    curves: Sequence[PlacedChart]
    timeline: Timeline | None
    events: EventLists | None
    samples: Sequence[StepSamples]
    options: int
    config: str
    """The resolved options as YAML."""


def build_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write the report of a finished, failed or running run.

    Returns:
        The path of report.html in the run directory.

    Raises:
        ConfigError: `run_dir` is no run directory.
        RunError: the report cannot be written.
    """
    run = RunDirectory.open_existing(run_dir)
    atomic_write_text(run.report, render(read_run(run)))
    return run.report


def render(run: RunData) -> str:
    """The page as text."""
    page = Page(
        header=header(run),
        tiles=tiles(run),
        ledger=ledger(run),
        curves=curves(run),
        timeline=timeline(run),
        events=events(run),
        samples=step_samples(run),
        options=len(run.config),
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100) if run.config else "",
    )
    style, script = template_source("report.css"), template_source("report.js")
    template = templates().get_template("page.html.jinja")
    return template.render(page=page, style=style, script=script, policy=_policy(style, script))


@functools.cache
def templates() -> Environment:
    """The templates: every value is escaped, and a name that is not there is an error."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def template_source(name: str) -> str:
    """The text of a file in templates/."""
    return (importlib.resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _printable(value: object) -> object:
    """Text that HTML and UTF-8 can hold; what is markup already, and what is no text, stays as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return clean_text(value.translate(_PICTURES))


def _policy(style: str, script: str) -> str:
    return f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
