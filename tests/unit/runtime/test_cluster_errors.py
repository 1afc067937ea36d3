"""What a constructor raised on purpose arrives as that, though Ray keeps its text alone."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from trl_ray.errors import ActorLostError, EngineError, ResourceError, StartError, TrlRayError
from trl_ray.runtime.cluster import RayHandle
from trl_ray.runtime.runtime import Role


def told(error: BaseException) -> TrlRayError:
    handle = RayHandle.__new__(RayHandle)
    handle._name = "rollout-0"
    made: Any = handle
    found: TrlRayError = made._translate(error, "health")
    return found


def died(last_line: str, *, in_constructor: bool = True) -> RayActorError:
    text = (
        f"The actor died because of an error raised in its creation task, ray::RolloutWorker()\n  File x\n{last_line}"
    )
    return RayActorError(error_msg=text, actor_init_failed=in_constructor)


@pytest.mark.parametrize("kind", [ResourceError, EngineError])
def test_an_error_of_ours_keeps_its_kind_and_its_sentence(kind: type[TrlRayError]) -> None:
    found = told(died(f"trl_ray.errors.{kind.__name__}: the KV cache must hold one: it holds none."))
    assert type(found) is kind
    assert str(found) == "the KV cache must hold one: it holds none."


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (died("ValueError: something else"), StartError),
        (died("trl_ray.errors.ResourceError: of a method", in_constructor=False), ActorLostError),
        (ActorDiedError(), ActorLostError),
    ],
)
def test_all_else_is_a_lost_actor(error: BaseException, kind: type[ActorLostError]) -> None:
    assert type(told(error)) is kind


def test_the_name_of_a_role_is_no_error() -> None:
    assert type(told(died(f"errors.{Role.ROLLOUT}: x"))) is StartError
