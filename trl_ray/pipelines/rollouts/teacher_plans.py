"""Teachers of a run: checked before anything starts, and what rollout workers are told of them.

config, tokenizer, prompts --prepare_teachers--> vocabulary shared, contexts that fit --> TeachingPlan, TeacherArguments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.actors.teaching import TeacherSeat, TeachingPlan
from trl_ray.config.losses.distillation_options import DistillationMode, RepromptConfig
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.config.teacher_options import TeacherKind, TeacherOptions, TeacherSource
from trl_ray.data.prompts.prompt_source import PromptSource
from trl_ray.data.prompts.reprompts import require_user_turn
from trl_ray.errors import ConfigError, ModelError
from trl_ray.models.policy_loading import load_model_config, load_tokenizer, max_positions
from trl_ray.pipelines.rollouts.teacher_actors import TeacherArguments
from trl_ray.pipelines.run.memory import GIB, PROCESS, teacher_memory
from trl_ray.runtime.runtime import teacher_plan
from trl_ray.types import TeacherQuestion


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
    config: RolloutRunConfig, *, tokenizer: Any, vocab_size: int, prompts: PromptSource, max_model_len: int
) -> PreparedTeachers | None:
    """Check all teachers; None where nobody teaches.

    Args:
        config: names them.
        tokenizer: of the student.
        vocab_size: entries of the student's head.
        prompts: of the run.
        max_model_len: tokens of the student's prompt and completion.

    Raises:
        ConfigError: a teacher's vocabulary is another, or its context too short.
        DataError: hints cannot be put into a prompt, or a row names no teacher.
        ModelError: a teacher's model is not there.
    """
    if not config.teacher_sources:
        if isinstance(config, DistillConfig):
            raise ConfigError("there must be a teacher. Set teacher_model_name_or_path, or list teachers.")
        return None
    sources, shared = config.teacher_sources, vocab_size
    for source in sources:
        if source.kind is TeacherKind.EXTERNAL and source.model.model_name_or_path is not None:
            shared = min(shared, _shared_vocabulary(source, tokenizer, vocab_size))
            _check_context(source, max_model_len)
    check_taught_prompts(config, prompts)
    plan = _plan(config, vocab_size=shared)
    acting = tuple(TeacherArguments(source=source, vocab_size=shared) for source in config.acting_teachers)
    return PreparedTeachers(
        plan=plan,
        acting=acting,
        in_learner=sources[0] if config.teacher_in_learner else None,
        memory={teacher_plan(each.source.name): _memory(each.source) for each in acting},
    )


def check_taught_prompts(config: RolloutRunConfig, prompts: PromptSource) -> None:
    """See that teachers can be asked about every prompt, trained on or held out.

    Raises:
        DataError: hints cannot be put into a prompt, or a row names no teacher.
    """
    if isinstance(config, DistillConfig) and config.teacher_column is not None:
        names = [source.name for source in config.teacher_sources]
        prompts.require_values(config.teacher_column, names, option="teacher_column")
    if isinstance(config, SDPOConfig) and config.distils:
        for ordinal in range(len(prompts)):
            require_user_turn(prompts.prompt(ordinal))


def _plan(config: RolloutRunConfig, *, vocab_size: int) -> TeachingPlan:
    seat = TeacherSeat.ACTORS
    if config.teacher_in_learner:
        seat = TeacherSeat.LEARNER
    elif config.teacher_on_engines:
        seat = TeacherSeat.OWN_ENGINE
    patience = [source.options for source in config.teacher_sources]
    servers = [each.server for each in patience if isinstance(each, TeacherOptions) and each.server is not None]
    shared: dict[str, Any] = {
        "asks": seat,
        "chat_template_kwargs": config.chat_template_kwargs,
        "timeout_s": max(options.timeout_s for options in patience),
        "max_attempts": max(options.max_attempts for options in patience),
        "retry_delay_s": max((server.retry_delay_s for server in servers), default=0.0),
    }
    if isinstance(config, SDPOConfig):
        top_k = config.distillation_topk if config.distillation_mode is DistillationMode.TOPK_LOGITS else None
        question = TeacherQuestion(
            vocab_size=vocab_size,
            temperature=config.temperature,
            top_k=top_k or 0,
            tail=config.distillation_add_tail,
        )
        return TeachingPlan(question=question, reprompt=_reprompt(config), **shared)
    assert isinstance(config, DistillConfig), "no other pipeline has teachers"
    question = TeacherQuestion(
        vocab_size=vocab_size,
        temperature=config.temperature,
        top_k=config.teacher_top_k,
        tail=config.loss_add_tail and config.teacher_top_k > 0,
    )
    return TeachingPlan(question=question, column=config.teacher_column, **shared)


def _reprompt(config: SDPOConfig) -> RepromptConfig:
    """The rules, with prompts no longer than what the model, or the engine that stands in for it, can read."""
    options = config.part(RepromptConfig)
    limits = [max_positions(config.part(ModelConfig))]
    if config.use_teacher_server:
        limits.append(config.rollout.max_model_len)
    room = min((limit for limit in limits if limit is not None), default=None)
    if room is None:
        return options
    # An engine that scores samples one token more.
    left = room - config.max_completion_length - 1
    if left < 1:
        raise ConfigError(
            f"max_completion_length must leave the teacher room for a prompt within {room} tokens, got "
            f"{config.max_completion_length}. Lower it."
        )
    return options.replace(max_reprompt_len=min(options.max_reprompt_len, left))


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
    assert isinstance(source.options, TeacherOptions), "an external teacher has options of its own"
    given = source.options.max_model_len
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
