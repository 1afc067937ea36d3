"""What draws random numbers inside leaves no trace outside."""

from __future__ import annotations

import pytest
import torch

from trl_ray.actors.random_state import keep_random_state, random_state, set_random_state


def test_it_is_as_if_nothing_had_been_drawn_also_after_an_error() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError), keep_random_state():
        assert torch.equal(torch.rand(4), expected)
        raise ZeroDivisionError
    assert torch.equal(torch.rand(4), expected)


def test_a_state_goes_on_where_it_was_taken() -> None:
    torch.manual_seed(6)
    torch.rand(3)
    state = random_state()
    expected = torch.rand(4)
    set_random_state(state)
    assert torch.equal(torch.rand(4), expected)
