"""The rule by which a teacher follows the policy: an average, or what a dotted path in teacher_model_kind names.

TeacherSource --find_rule--> class derived from WeightAverage --the teacher's own parameters--> what follows the policy
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor

from trl_ray.config.object_paths import find_object
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.errors import ConfigError
from trl_ray.models.companions.averaging import Pace, WeightAverage

FOLDER = "teacher"
"""Below a checkpoint."""
AVERAGE = "the teacher's average"
"""As messages call it."""


def find_rule(source: TeacherSource) -> type[WeightAverage]:
    """The class of a teacher that keeps an average, checked before anything starts.

    Raises:
        ConfigError: there is none of that name, it is no such class, or it takes no such options.
    """
    weights = source.weights
    assert weights is not None and source.keeps_average, "only a teacher that follows the policy has a rule"
    if source.rule is None:
        return WeightAverage
    found = find_object(source.rule, what="teacher_model_kind")
    if not (isinstance(found, type) and issubclass(found, WeightAverage)):
        raise ConfigError(
            f"teacher_model_kind must be ema, live, base or a class derived from {WeightAverage.__module__}."
            f"{WeightAverage.__name__}, got {source.rule!r}, {found!r}. Derive it and say `blend`."
        )
    try:
        inspect.signature(found).bind({}, pace_of(source), **weights.teacher_kind_kwargs)
    except TypeError as error:
        raise ConfigError(
            f"teacher_kind_kwargs must be options of {source.rule}, got {sorted(weights.teacher_kind_kwargs)}: "
            f"{error}. Correct them, or the class's __init__(weights, pace, **options)."
        ) from error
    return found


def teacher_average(source: TeacherSource, weights: Mapping[str, Tensor]) -> WeightAverage:
    """What moves a teacher's own parameters, by name; they are changed in place.

    Raises:
        ConfigError: as `find_rule`.
    """
    assert source.weights is not None, "a teacher of the policy's own weights is told how to follow them"
    return find_rule(source)(weights, pace_of(source), **source.weights.teacher_kind_kwargs)


def pace_of(source: TeacherSource) -> Pace:
    """How fast a teacher follows."""
    assert source.weights is not None, "a teacher of the policy's own weights is told how to follow them"
    return Pace(rate=source.weights.teacher_update_rate, every=source.weights.teacher_sync_steps)
