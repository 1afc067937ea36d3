"""Teachers of a run: checked before anything starts, and what rollout workers are told of them.

config, tokenizer --prepare_teachers--> vocabulary shared, contexts that fit --> TeachingPlan, TeacherArguments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.actors.teaching import TeacherSeat, TeachingPlan
from trl_ray.config.sections import ModelConfig
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.errors import ConfigError, ModelError
from trl_ray.models.companions.teacher_rules import find_rule
from trl_ray.models.policy_loading import load_model_config, load_tokenizer, max_positions
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.teacher_actors import TeacherArguments
from trl_ray.pipelines.run.planning import GIB, PROCESS, teacher_memory
from trl_ray.runtime.runtime import teacher_plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedTeachers:
    """Teachers that were found fit."""

    plan: TeachingPlan
    """For rollout workers."""
    acting: tuple[TeacherArguments, ...]
    """Those with actors of their own."""
    in_learner: TeacherSource | None
    """The one that the learner holds."""
    memory: Mapping[str, float]
    """Bytes that one copy is expected to hold, by `teacher_plan`."""


def prepare_teachers(
    objective: Objective[Any], *, tokenizer: Any, vocab_size: int, max_model_len: int
) -> PreparedTeachers | None:
    """Check all teachers; None where nobody teaches.

    Args:
        objective: of the run; its configuration names them.
        tokenizer: of the student.
        vocab_size: entries of the student's head.
        max_model_len: tokens of the student's prompt and completion.

    Raises:
        ConfigError: a teacher's vocabulary is another, or its context too short.
        ModelError: a teacher's model is not there.
    """
    config = objective.config
    objective.check_teachers()
    if not config.teacher_sources:
        return None
    sources, shared = config.teacher_sources, vocab_size
    for source in sources:
        if source.keeps_average:
            find_rule(source)
        if source.external is not None and source.model.model_name_or_path is not None:
            shared = min(shared, _shared_vocabulary(source, tokenizer, vocab_size))
            _check_context(source, max_model_len)
    plan = _plan(objective, vocab_size=shared)
    acting = tuple(TeacherArguments(source=source, vocab_size=shared) for source in config.acting_teachers)
    return PreparedTeachers(
        plan=plan,
        acting=acting,
        in_learner=sources[0] if config.teacher_in_learner else None,
        memory={teacher_plan(each.source.name): _memory(each.source) for each in acting},
    )


def _plan(objective: Objective[Any], *, vocab_size: int) -> TeachingPlan:
    config = objective.config
    asks = TeacherSeat.ACTORS
    if config.teacher_in_learner:
        asks = TeacherSeat.LEARNER
    elif config.teacher_on_engines:
        asks = TeacherSeat.OWN_ENGINE
    patience = [source.options for source in config.teacher_sources]
    servers = [source.server for source in config.teacher_sources if source.server is not None]
    return TeachingPlan(
        question=objective.teacher_question(vocab_size=vocab_size),
        reprompt=objective.reprompting(),
        column=objective.teacher_column,
        asks=asks,
        chat_template_kwargs=config.chat_template_kwargs,
        timeout_s=max(options.timeout_s for options in patience),
        max_attempts=max(options.max_attempts for options in patience),
        retry_delay_s=max((server.retry_delay_s for server in servers), default=0.0),
    )


def _shared_vocabulary(source: TeacherSource, tokenizer: Any, vocab_size: int) -> int:
    """Entries that both heads have; models of one family pad their vocabularies differently."""
    theirs = _of_teacher(source, load_model_config).get_text_config().vocab_size
    own, other = tokenizer.get_vocab(), _of_teacher(source, load_tokenizer).get_vocab()
    different = [token for token in own.keys() | other.keys() if own.get(token) != other.get(token)]
    if different or max(own.values()) >= min(theirs, vocab_size):
        example = f", for example {min(different)!r}" if different else ""
        raise ConfigError(
            f"teacher {source.name} must have the student's vocabulary, as distributions are compared token by token, "
            f"but {len(different)} tokens have another id or none ({source.model.model_name_or_path}, "
            f"{theirs} entries; student: {vocab_size}{example}). Take a teacher of the student's family, or let it "
            "write completions and train on them with the pipeline sft."
        )
    return int(min(theirs, vocab_size))


def _of_teacher(source: TeacherSource, load: Callable[[ModelConfig], Any]) -> Any:
    """What is loaded of a teacher's model, or an error that says whose it is."""
    try:
        return load(source.model)
    except ModelError as error:
        raise ModelError(f"teacher {source.name}: {error}") from error


def _check_context(source: TeacherSource, max_model_len: int) -> None:
    positions = max_positions(source.model)
    assert source.external is not None, "an external teacher has options of its own"
    given = source.external.max_model_len
    room = min((limit for limit in (positions, given) if limit is not None), default=None)
    if room is not None and room < max_model_len:
        raise ConfigError(
            f"teacher {source.name} must read the {max_model_len} tokens of prompt and completion that the student may "
            f"have, but reads {room}. Lower rollout.max_model_len to {room}, or take another teacher."
        )


def _memory(source: TeacherSource) -> float:
    if source.model.model_name_or_path is None:
        return 0.2 * GIB
    return teacher_memory(source) + PROCESS
