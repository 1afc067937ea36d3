"""Texts of data that look like templates stay as they are, and templates reach nothing of what they are given (S16)."""

from __future__ import annotations

import pytest

from trl_ray.config.losses.literal_templates import fill

HOSTILE = (
    "{prompt}",
    "{feedback}",
    "{0.__class__}",
    "{prompt.__class__.__mro__}",
    "{{",
    "}",
    "{",
    "%s",
    "$prompt",
    "{!r}",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_data_say_is_never_filled_in(text: str) -> None:
    assert fill("{prompt}|{feedback}", {"prompt": text, "feedback": "SECRET"}) == f"{text}|SECRET"


@pytest.mark.parametrize(
    ("template", "filled"),
    [("{{prompt}}", "{prompt}"), ("{{{prompt}}}", "{a}"), ("", ""), ("a {prompt}{prompt} b", "a aa b"), ("}}{{", "}{")],
)
def test_templates_mean_what_they_meant(template: str, filled: str) -> None:
    assert fill(template, {"prompt": "a"}) == filled == template.format(prompt="a")


@pytest.mark.parametrize(
    "template",
    ["{other}", "{prompt.__class__}", "{prompt[0]}", "{prompt!r}", "{prompt:>9}", "{", "}", "{}", "{0}"],
)
def test_fields_that_reach_into_a_value_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        fill(template, {"prompt": "a"})
