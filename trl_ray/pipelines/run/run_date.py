"""What chat templates take for today is the day on which a run began, so that it goes on with the same tokens later.

config, tokenizer ─► chat_template_kwargs: {strftime_now: 2026-11-30} where the template asks for a date ─► config.yaml
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from trl_ray.config.load import read_yaml
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.data.chat.chat_rendering import DATE_FUNCTION

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def with_date(config: ConfigT, tokenizer: Any) -> ConfigT:
    """The options with a date for a chat template that asks for one: as given, that of the run that goes on, or today.

    Raises:
        ConfigError: the run that is to go on has no configuration that can be read.
    """
    values = config.chat_template_kwargs
    if DATE_FUNCTION in values or DATE_FUNCTION not in str(getattr(tokenizer, "chat_template", None)):
        return config
    began = Path(config.output_dir) / "config.yaml"
    known = config.resume_from_checkpoint and began.is_file()
    before = (read_yaml(began).get("chat_template_kwargs") or {}) if known else {}
    day = before.get(DATE_FUNCTION, date.today().isoformat())
    return config.replace(chat_template_kwargs={**values, DATE_FUNCTION: str(day)})
