"""Builds report.html: one file that shows a whole run and opens offline.

    RUN_DIR -> read_run -> sections, curves -> page -> RUN_DIR/report.html

Completions, reward names and options are hostile text: all of it is escaped, and the page's content security policy
lets only its own style sheet and script run (by their hashes) and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from trl_ray.observe.report.report_curves import draw_curves
from trl_ray.observe.report.report_data import RunData, read_run
from trl_ray.observe.report.report_sections import completions, configuration, events, header, ledger, tiles, timeline
from trl_ray.observe.report.report_style import SCRIPT, STYLE
from trl_ray.observe.report.svg import escape
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import atomic_write_text

_SECTIONS = (
    ("ledger", "Sample ledger"),
    ("curves", "Curves"),
    ("timeline", "Timeline"),
    ("events", "Events"),
    ("completions", "Completions"),
    ("config", "Configuration"),
)


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
    curves = draw_curves(run)
    bodies = {
        "ledger": ledger(run),
        "curves": f'<div class="charts">{curves}</div>' if curves else '<p class="empty">No step was finished.</p>',
        "timeline": timeline(run),
        "events": events(run),
        "completions": completions(run),
        "config": configuration(run),
    }
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in _SECTIONS)
    sections = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{bodies[name]}</section>'
        for name, title in _SECTIONS
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run.name)} · run report</title><style>{STYLE}</style></head><body>"
        f'{header(run)}<nav aria-label="Sections"><div>{links}</div></nav><main>{tiles(run)}{sections}'
        f"<footer>trl_ray run report</footer></main><script>{SCRIPT}</script></body></html>\n"
    )


def _policy() -> str:
    return f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; base-uri 'none'"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
