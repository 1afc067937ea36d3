"""What is checked of teachers before a run, and what rollout workers and actors are told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from objectives import prepare
from tiny_models import MAX_POSITIONS, VOCAB_SIZE, build_tiny_model, build_tokenizer, random_model
from trl_ray.actors.teaching import TeacherSeat
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.config.teacher_options import TeacherKind
from trl_ray.errors import ConfigError, DataError, ModelError
from trl_ray.pipelines.rollouts.preparation import Inputs, Preparation
from trl_ray.pipelines.run.planning import PROCESS

TEXT = [{"prompt": f"count to {number}: "} for number in range(1, 11)]
CHAT = [{"prompt": [{"role": "user", "content": f"{number} + 1 = ?"}]} for number in range(1, 11)]
SERVER = {"server": {"url": "http://127.0.0.1:1"}}
TOP = {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_add_tail": True}

LLAMA_PARAMETERS = sum(each.numel() for each in random_model(family="llama").parameters())
QWEN_PARAMETERS = sum(each.numel() for each in random_model().parameters())


def score(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("teacher"), family="llama", seed=1)


def model_with(path: Path, *, entries: int = VOCAB_SIZE, positions: int = MAX_POSITIONS) -> str:
    """A tiny model with another head, or for shorter texts."""
    model = random_model(seed=2)
    model.resize_token_embeddings(entries)
    model.config.max_position_embeddings = positions
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def distilling(
    student: str, teacher: str | None, *, rows: Any = TEXT, held_out: Any = None, **changes: Any
) -> Preparation:
    base = {"model_name_or_path": student, "max_completion_length": 16, "max_steps": 1}
    config = DistillConfig(**{**base, "teacher_model_name_or_path": teacher, **changes})
    return prepare(config, Inputs(train_dataset=rows, eval_dataset=held_out))


def self_distilling(student: str, *, rows: Any = CHAT, **changes: Any) -> Preparation:
    base = {"model_name_or_path": student, "num_generations": 2, "max_completion_length": 16, "max_steps": 1}
    return prepare(SDPOConfig(**{**base, **changes}), Inputs(train_dataset=rows, reward_funcs=[score]))


def test_a_pipeline_without_teachers_has_none(student: str) -> None:
    config = GRPOConfig(model_name_or_path=student, num_generations=2, max_completion_length=16, max_steps=1)
    made = prepare(config, Inputs(train_dataset=TEXT, reward_funcs=[score]))
    assert made.teachers is None
    arguments = made.arguments(journal="j", checkpoint=None, resume_from=None, incarnation="i")
    assert (arguments.learner["teacher"], arguments.rollout["teaching"], arguments.teachers) == (None, None, ())


def test_held_out_answers_have_the_policys_log_probs_where_the_held_out_loss_reads_them(
    student: str, teacher: str
) -> None:
    def asked(**changes: Any) -> bool:
        made = distilling(student, teacher, top_p=0.9, **changes)
        arguments = made.arguments(journal="j", checkpoint=None, resume_from=None, incarnation="i")
        return bool(arguments.rollout["evaluates_with_policy"])

    assert asked(distillation_objective="iw_opd") and not asked()


def test_self_distillation_without_weight_asks_nobody_and_refuses_no_prompt(student: str) -> None:
    rows = [{"prompt": [*row["prompt"], {"role": "assistant", "content": "It is"}]} for row in CHAT]
    assert self_distilling(student, rows=rows, distillation_weight=0.0).teachers is None


def test_a_teacher_of_the_same_vocabulary_gets_actors_that_are_told_of_it(student: str, teacher: str) -> None:
    made = distilling(student, teacher, loss_support="teacher", loss_top_k=7, temperature=0.5, beta=0.5)
    prepared = made.teachers
    assert prepared is not None and prepared.in_learner is None
    [acting] = prepared.acting
    assert (acting.source.name, acting.source.kind, acting.vocab_size) == ("teacher", TeacherKind.EXTERNAL, VOCAB_SIZE)
    question = prepared.plan.question
    assert (question.vocab_size, question.temperature, question.top_k, question.tail) == (VOCAB_SIZE, 0.5, 7, True)
    assert (prepared.plan.asks, prepared.plan.reprompt, prepared.plan.column) == (TeacherSeat.ACTORS, None, None)
    assert prepared.memory == {"teacher teacher": 4 * LLAMA_PARAMETERS + PROCESS}
    arguments = made.arguments(journal="j", checkpoint=None, resume_from=None, incarnation="i")
    assert arguments.learner["teacher"] is None and arguments.rollout["teaching"] is prepared.plan
    assert arguments.teachers == prepared.acting and arguments.reward is None


def test_a_teacher_in_the_learner_has_no_actors(student: str, teacher: str) -> None:
    made = distilling(student, teacher, loss_support="full")
    assert made.teachers is not None
    assert (made.teachers.acting, made.teachers.memory, made.teachers.plan.asks) == ((), {}, TeacherSeat.LEARNER)
    arguments = made.arguments(journal="j", checkpoint=None, resume_from=None, incarnation="i")
    assert arguments.learner["teacher"].model.model_name_or_path == teacher
    # The learner's process holds it too: 4 bytes for each of its numbers.
    without = distilling(student, teacher).expected_memory()
    assert made.expected_memory()["learner"] == without["learner"] + 4 * LLAMA_PARAMETERS


@pytest.mark.parametrize(("of_student", "of_teacher"), [(VOCAB_SIZE, VOCAB_SIZE + 12), (VOCAB_SIZE + 12, VOCAB_SIZE)])
def test_vocabularies_padded_to_different_lengths_share_the_shorter(
    tmp_path: Path, of_student: int, of_teacher: int
) -> None:
    own, other = model_with(tmp_path / "own", entries=of_student), model_with(tmp_path / "other", entries=of_teacher)
    prepared = distilling(own, other).teachers
    assert prepared is not None
    assert (prepared.plan.question.vocab_size, prepared.acting[0].vocab_size) == (VOCAB_SIZE, VOCAB_SIZE)


def test_of_several_teachers_the_shortest_vocabulary_is_shared(student: str, teacher: str, tmp_path: Path) -> None:
    own = model_with(tmp_path / "own", entries=VOCAB_SIZE + 12)
    wide = model_with(tmp_path / "wide", entries=VOCAB_SIZE + 4)
    rows = [{**row, "who": "teacher"} for row in TEXT]
    teachers = [{"name": "wide", "model_name_or_path": wide}]
    prepared = distilling(own, teacher, teachers=teachers, teacher_column="who", rows=rows).teachers
    assert prepared is not None
    assert [each.vocab_size for each in prepared.acting] == [VOCAB_SIZE, VOCAB_SIZE]


def test_a_token_of_another_id_is_refused_by_name(student: str, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", seed=1)
    vocabulary = Path(other) / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("<|pad|>", "<|filler|>"))
    with pytest.raises(ConfigError, match=r"teacher teacher must have the student's vocabulary.*'<\|filler\|>'"):
        distilling(student, other)


def test_a_head_that_does_not_reach_all_tokens_is_refused(student: str, tmp_path: Path) -> None:
    short = model_with(tmp_path / "short", entries=VOCAB_SIZE - 1)
    with pytest.raises(ConfigError, match=r"must have the student's vocabulary.*259 entries; student: 260\)"):
        distilling(student, short)


def test_a_teacher_that_is_not_there_is_refused_by_its_name(student: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^teacher teacher: .*no such directory: .*nope"):
        distilling(student, str(tmp_path / "nope"))


def test_a_teacher_must_read_as_much_as_the_student_may_write(student: str, teacher: str, tmp_path: Path) -> None:
    short = model_with(tmp_path / "short", positions=100)
    with pytest.raises(ConfigError, match=r"must read the 512 tokens.*reads 100. Lower rollout.max_model_len to 100"):
        distilling(student, short)
    assert distilling(student, short, rollout={"max_model_len": 100}).max_model_len == 100
    told = [{"model_name_or_path": teacher, "max_model_len": 64}]
    with pytest.raises(ConfigError, match=r"must read the 512 tokens.*reads 64"):
        distilling(student, None, teachers=told)


def test_a_server_is_asked_for_the_students_vocabulary_and_costs_little_here(student: str) -> None:
    prepared = distilling(student, None, teachers=[SERVER]).teachers
    assert prepared is not None
    assert prepared.acting[0].vocab_size == VOCAB_SIZE
    assert prepared.memory == {"teacher teacher": 0.2 * 2**30}


def test_distillation_without_a_teacher_is_refused(student: str) -> None:
    with pytest.raises(ConfigError, match=r"there must be a teacher. Set teacher_model_name_or_path, or list teachers"):
        distilling(student, None)


def test_every_row_trained_on_or_held_out_must_name_a_teacher(student: str, teacher: str) -> None:
    teachers = [{"name": "first", "model_name_or_path": teacher}, {"name": "second", "model_name_or_path": student}]
    options = {"teachers": teachers, "teacher_column": "who"}
    rows = [{**row, "who": "second" if index else "first"} for index, row in enumerate(TEXT)]
    made = distilling(student, None, rows=rows, **options)
    assert made.teachers is not None and made.teachers.plan.column == "who"
    assert [each.source.name for each in made.teachers.acting] == ["first", "second"]
    with pytest.raises(DataError, match=r"Row 3 .*field 'who' .teacher_column.*got str 'secnd'. Did you mean 'second'"):
        distilling(student, None, rows=[*rows[:3], {**rows[3], "who": "secnd"}], **options)
    with pytest.raises(DataError, match=r"Row 0 .*field 'who' .teacher_column., must be one of first, second"):
        distilling(student, None, rows=TEXT, **options)
    with pytest.raises(DataError, match=r"Row 1 .*got str 'third'"):
        held_out = [rows[0], {**rows[1], "who": "third"}]
        distilling(student, None, rows=rows, held_out=held_out, eval_steps=1, **options)


def test_the_patience_of_a_group_is_that_of_the_most_patient_teacher(student: str, teacher: str) -> None:
    rows = [{**row, "who": "a"} for row in TEXT]
    teachers = [
        {"name": "a", "model_name_or_path": teacher, "timeout_s": 5.0, "max_attempts": 7},
        {"name": "b", "timeout_s": 9.0, "max_attempts": 1, **SERVER},
    ]
    prepared = distilling(student, None, teachers=teachers, teacher_column="who", rows=rows).teachers
    assert prepared is not None
    assert (prepared.plan.timeout_s, prepared.plan.max_attempts) == (9.0, 7)


@pytest.mark.parametrize(
    ("options", "seat", "actors"),
    [
        ({}, TeacherSeat.ACTORS, ["ema"]),
        ({"teacher_model_kind": "base"}, TeacherSeat.ACTORS, ["base"]),
        ({"teacher_model_kind": "live", "use_teacher_server": True}, TeacherSeat.OWN_ENGINE, []),
        ({"distillation_mode": "full_logits"}, TeacherSeat.LEARNER, []),
        (TOP, TeacherSeat.LEARNER, []),
    ],
)
def test_the_self_teacher_is_asked_where_it_stands(
    student: str, options: dict[str, Any], seat: TeacherSeat, actors: list[str]
) -> None:
    made = self_distilling(student, **options)
    prepared = made.teachers
    assert prepared is not None and prepared.plan.asks is seat
    assert [each.source.name for each in prepared.acting] == actors
    assert (prepared.in_learner is not None) is (seat is TeacherSeat.LEARNER)
    assert set(prepared.memory) == {f"teacher {name}" for name in actors}
    assert set(prepared.memory) <= set(made.actors()) and set(made.actors()) <= set(made.expected_memory())


def test_a_server_of_top_k_is_asked_for_as_many_tokens_and_the_tail(student: str) -> None:
    prepared = self_distilling(student, teacher_model_kind="live", use_teacher_server=True, **TOP).teachers
    assert prepared is not None
    assert (prepared.plan.question.top_k, prepared.plan.question.tail) == (5, True)


def test_the_teachers_prompt_is_no_longer_than_what_its_model_reads_beside_a_completion(student: str) -> None:
    def limit(**options: Any) -> int:
        prepared = self_distilling(student, **options).teachers
        assert prepared is not None and prepared.plan.reprompt is not None
        return prepared.plan.reprompt.max_reprompt_len

    # 512 positions, 16 of the completion, and one that an engine samples when it scores.
    assert limit() == 495
    assert limit(max_reprompt_len=100) == 100
    assert limit(max_completion_length=200) == 311
    engine = {"teacher_model_kind": "live", "use_teacher_server": True, "rollout": {"max_model_len": 128}}
    assert limit(**engine) == 111
    # The engine's own limit binds no other teacher.
    assert limit(rollout={"max_model_len": 128}) == 495


def test_a_completion_that_leaves_the_teacher_no_prompt_is_refused(student: str) -> None:
    with pytest.raises(ConfigError, match=r"max_completion_length must leave the teacher room .* 512 tokens, got 511"):
        self_distilling(student, rows=[{"prompt": "x"}], max_completion_length=511)


def test_prompts_of_self_distillation_must_end_with_the_users_turn(student: str) -> None:
    rows = [*CHAT, {"prompt": [*CHAT[0]["prompt"], {"role": "assistant", "content": "It is"}]}]
    with pytest.raises(DataError, match=r"must end with the user's turn.*'assistant'"):
        self_distilling(student, rows=rows)


def test_longer_prompts_of_the_student_lose_their_head(student: str, teacher: str) -> None:
    rows = [{"prompt": "abcdefghij"}]
    # A token is a byte.
    assert self_distilling(student, rows=rows, max_prompt_length=4).prompts.longest == 4
    assert distilling(student, teacher, rows=rows, max_prompt_length=4).prompts.longest == 4
    assert distilling(student, teacher, rows=rows).prompts.longest == 10


@pytest.mark.parametrize(
    ("kind", "dtype", "number"),
    # An average of bfloat16 weights is summed up in float32 beside them.
    [("ema", "float32", 4), ("ema", "bfloat16", 6), ("live", "bfloat16", 2), ("base", "float32", 4)],
)
def test_a_self_teacher_is_expected_to_hold_its_weights_and_an_average_of_them(
    student: str, kind: str, dtype: str, number: int
) -> None:
    made = self_distilling(student, teacher_model_kind=kind, dtype=dtype)
    assert made.expected_memory()[f"teacher {kind}"] == number * QWEN_PARAMETERS + PROCESS
    if kind != "live":
        resident = self_distilling(student, teacher_model_kind=kind, dtype=dtype, teacher={"placement": "learner"})
        more = resident.expected_memory()["learner"] - made.expected_memory()["learner"]
        assert more == number * QWEN_PARAMETERS


def test_a_teacher_on_vllm_needs_its_cache_too(student: str, teacher: str) -> None:
    teachers = [{"model_name_or_path": teacher, "engine": "vllm", "kv_cache_memory_gib": 0.5}]
    made = distilling(student, None, teachers=teachers)
    assert made.expected_memory()["teacher teacher"] == 4 * LLAMA_PARAMETERS + 2**29 + PROCESS


def test_the_plan_names_teachers_and_who_holds_them(student: str, teacher: str) -> None:
    described = [
        self_distilling(student).describe(),
        self_distilling(student, distillation_mode="full_logits").describe(),
        self_distilling(student, teacher_model_kind="live", use_teacher_server=True).describe(),
        distilling(student, teacher).describe(),
    ]
    assert [each["teachers"] for each in described] == [
        "ema, held by actors",
        "ema, held by the learner",
        "live, held by the rollout engines",
        f"teacher ({teacher}), held by actors",
    ]
