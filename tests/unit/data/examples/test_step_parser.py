"""Solutions are split into steps by headings, numbers or lines, and nothing of them is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ray.config.reward_model_options import StepFormat
from trl_ray.data.examples.step_parser import recognise_steps, split_steps

PIECES = ["Step 1:", "Step 2:", "step 3.", "**Step 4**:", "1.", "2)", "3.5", "4. ", "\n", "\n\n", " ", "x = 2", ". "]


@pytest.mark.parametrize(
    ("text", "form", "steps"),
    [
        ("Step 1: add\nStep 2: carry\nover", StepFormat.STEP, ("Step 1: add", "Step 2: carry\nover")),
        ("Step 1: add. Step 2: carry.", StepFormat.STEP, ("Step 1: add.", "Step 2: carry.")),
        ("So:\n## Step 1 - a\n\n## step 2 - b", StepFormat.STEP, ("So:\n## Step 1 - a", "## step 2 - b")),
        (
            "Step 1: as Step 1: says\nStep 3: no\nStep 2: yes",
            StepFormat.STEP,
            ("Step 1: as Step 1: says\nStep 3: no", "Step 2: yes"),
        ),
        ("Step 4: from the middle\nStep 5: on", StepFormat.STEP, ("Step 4: from the middle", "Step 5: on")),
        ("1. add\n2) carry\n2. twice\n3. end", StepFormat.NUMBERED, ("1. add", "2) carry\n2. twice", "3. end")),
        ("1.5 is\n2.5 less one", StepFormat.NEWLINE, ("1.5 is", "2.5 less one")),
        ("a\n\nb\nc\n \n d", StepFormat.NEWLINE, ("a", "b\nc", "d")),
        ("a\nb\r\n\nc", StepFormat.NEWLINE, ("a\nb", "c")),
        ("a\nb\n\n", StepFormat.NEWLINE, ("a", "b")),
        ("one", StepFormat.NEWLINE, ("one",)),
        (" \n ", StepFormat.NEWLINE, ()),
    ],
)
def test_a_solution_is_recognised_and_split(text: str, form: StepFormat, steps: tuple[str, ...]) -> None:
    assert recognise_steps(text) is form
    assert split_steps(text) == split_steps(text, form) == steps


def test_a_form_that_is_told_is_not_recognised_again() -> None:
    text = "Step 1: a\nb\nStep 2: c"
    assert split_steps(text, StepFormat.NEWLINE) == ("Step 1: a", "b", "Step 2: c")
    assert split_steps(text, StepFormat.NUMBERED) == (text,)
    assert split_steps("2. a\n3. b") == ("2. a", "3. b")
    assert split_steps("2. a\nso\n3. b", StepFormat.NUMBERED) == ("2. a\nso", "3. b")


@given(st.lists(st.sampled_from(PIECES)).map("".join) | st.text(), st.sampled_from(StepFormat))
def test_nothing_but_white_space_is_lost_and_no_step_is_blank(text: str, form: StepFormat) -> None:
    steps = split_steps(text, form)
    assert "".join("".join(steps).split()) == "".join(text.split())
    assert all(step and step == step.strip() for step in steps)


@given(st.lists(st.text("abc =+", min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_steps_that_are_put_together_come_apart_again(steps: list[str]) -> None:
    steps = [step.strip() for step in steps]
    for form, text in {
        StepFormat.STEP: "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, start=1)),
        StepFormat.NUMBERED: "\n".join(f"{i}) {step}" for i, step in enumerate(steps, start=1)),
        StepFormat.NEWLINE: "\n\n".join(steps),
    }.items():
        found = split_steps(text)
        assert recognise_steps(text) is form
        assert [step.split(")")[-1].split(":")[-1].strip() for step in found] == steps
