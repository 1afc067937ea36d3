"""The self-teacher's prompts, masks, metrics and warnings against TRL's SDPO trainer, on random groups."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import CHAT_TEMPLATE, build_tokenizer
from trl_ray.algorithms.distillation.self_distillation_diagnostics import (
    Degeneracy,
    SelfDistillationDiagnostics,
    SelfDistillationGroup,
    self_distillation_group,
    self_distillation_metrics,
)
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.data.chat.chat_rendering import ChatFormat
from trl_ray.data.prompts.reprompts import Attempt, reprompt_group
from trl_ray.types import GroupTicket, Prompt, Reward, RolloutGroup

pytestmark = pytest.mark.parity
trainer_module = pytest.importorskip("trl.experimental.sdpo.sdpo_trainer", reason="the reference is TRL")

TOKENIZER = build_tokenizer()
G = 3
TOLERANCE = 1e-8

configs = st.builds(
    RepromptConfig,
    use_successful_as_teacher=st.booleans(),
    success_reward_threshold=st.sampled_from([0.5, 1.0]),
    dont_reprompt_on_self_success=st.booleans(),
    max_reprompt_len=st.sampled_from([1, 20, 60, 10240]),
    include_environment_feedback=st.booleans(),
    environment_feedback_only_without_solution=st.booleans(),
    remove_thinking_from_demonstration=st.booleans(),
)
words = st.text("ab{} \n", max_size=6)
contents = words | st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, words) | st.just({"type": "image"}), max_size=3
)
conversations = st.builds(
    lambda system, content: [
        *([{"role": "system", "content": "s{}"}] if system else []),
        {"role": "user", "content": content},
    ],
    st.booleans(),
    contents,
)
thoughts = st.lists(st.sampled_from(["<think>", "</think>", "b{x}", " ", "\n"]), max_size=6).map("".join)
feedbacks = st.none() | st.just("  ") | st.sampled_from(["too {late}", "wrong", 3])
rewards = st.sampled_from([0.0, 0.5, 0.75, 1.0, 2.0])


@st.composite
def batches(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """Groups of G rows, all conversations or all plain texts."""
    prompts = draw(st.lists(draw(st.sampled_from([words, conversations])), min_size=1, max_size=3))
    row = st.fixed_dictionaries({"text": thoughts, "reward": rewards, "feedback": feedbacks})
    # An empty plain prompt is a tokenizer's corner case, not a dataset's.
    return [[{"prompt": prompt or "q", **draw(row)} for _ in range(G)] for prompt in prompts]


def tokens_of(prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return TOKENIZER(text=[prompt])["input_ids"][0]
    return TOKENIZER.apply_chat_template(conversation=[prompt], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ][0]


def theirs(
    batch: list[list[dict[str, Any]]], config: RepromptConfig
) -> tuple[list[list[int]], list[float], dict[str, float]]:
    """TRL's builder: teacher's prompts, mask, metrics."""
    rows = [row for group in batch for row in group]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device="cpu", process_index=0, gather=lambda value: value, pad_across_processes=lambda value, **_: value
        ),
        model=SimpleNamespace(training=True),
        num_generations=G,
        num_generations_eval=G,
        args=SimpleNamespace(**{name: getattr(config, name) for name in type(config).model_fields}),
        processing_class=TOKENIZER,
        _tokenizer=TOKENIZER,
        chat_template_kwargs={},
    )
    trainer._tokenize_prompts_untruncated = lambda prompts: trainer_module.SDPOTrainer._tokenize_prompts_untruncated(
        trainer, prompts
    )
    completions = [TOKENIZER(row["text"])["input_ids"] for row in rows]
    width = max(1, *(len(ids) for ids in completions))
    ids = torch.tensor([each + [TOKENIZER.pad_token_id] * (width - len(each)) for each in completions])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in completions])
    builder = trainer_module.SuccessfulRolloutTeacherContextBuilder(trainer)
    built = builder.build(
        {"completion_ids": ids.long(), "completion_mask": mask},
        [row["prompt"] for row in rows],
        torch.tensor([row["reward"] for row in rows]),
        feedbacks=[row["feedback"] for row in rows],
    )
    kept = built["teacher_attention_mask"][:, : -width or None].bool()
    prompts = [row[keep].tolist() for row, keep in zip(built["teacher_input_ids"][:, :-width], kept, strict=True)]
    return prompts, built["self_distillation_mask"].tolist(), builder.last_metrics


def ours(batch: list[list[dict[str, Any]]], config: RepromptConfig) -> list[RolloutGroup]:
    groups = []
    for rows in batch:
        shown = rows[0]["prompt"]
        is_text = isinstance(shown, str)
        prompt = Prompt(
            prompt_id="0:0",
            token_ids=np.array(tokens_of(shown), np.int32),
            messages=None if is_text else tuple(shown),
            text=shown if is_text else None,
        )
        attempts = [
            Attempt(
                token_ids=np.array(TOKENIZER(row["text"])["input_ids"], np.int32),
                reward=row["reward"],
                feedback=row["feedback"],
            )
            for row in rows
        ]
        chat = ChatFormat(template=CHAT_TEMPLATE)
        contexts = reprompt_group(prompt, attempts, config=config, tokenizer=TOKENIZER, chat=chat)
        groups.append(
            RolloutGroup(
                ticket=GroupTicket(group_id=0, attempt=0, prompt=prompt, admitted_at_version=0),
                completions=(),
                rewards=tuple(Reward(total=row["reward"], parts=row.get("parts", {})) for row in rows),
                worker="rollout-0",
                contexts=contexts,
            )
        )
    return groups


def facts_of(groups: list[RolloutGroup], config: RepromptConfig) -> list[SelfDistillationGroup]:
    return [self_distillation_group(group, threshold=config.success_reward_threshold) for group in groups]


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TRL warns of. It gathers objects, and logs, over processes that are not there."""
    said: list[str] = []
    logger = SimpleNamespace(warning_once=lambda *_: None, warning=lambda form, *values: said.append(form % values))
    monkeypatch.setattr(trainer_module, "gather_object", lambda value: value)
    monkeypatch.setattr(trainer_module, "logger", logger)
    return said


@given(batch=batches(), config=configs)
def check_prompts(batch: list[list[dict[str, Any]]], config: RepromptConfig) -> None:
    prompts, mask, metrics = theirs(batch, config)
    groups = ours(batch, config)
    assert [context.prompt_ids.tolist() for group in groups for context in group.contexts] == prompts
    assert [float(context.is_distilled) for group in groups for context in group.contexts] == mask
    found = self_distillation_metrics(facts_of(groups, config), flat_tolerance=TOLERANCE)
    assert {name: found[name] for name in metrics} == pytest.approx(metrics, abs=1e-6)


def test_prompts_masks_and_metrics_are_trls() -> None:
    check_prompts()


def test_the_defaults_are_trls() -> None:
    config_class = pytest.importorskip("trl.experimental.sdpo").SDPOConfig
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    own = RepromptConfig()
    assert {name: getattr(own, name) for name in RepromptConfig.model_fields} == {
        name: defaults[name] for name in RepromptConfig.model_fields
    }


class TheirDiagnostics:
    """What TRL's trainer keeps for its diagnostics."""

    def __init__(self, interval: int) -> None:
        self.args = SimpleNamespace(diagnostics_flat_tolerance=TOLERANCE, diagnostics_warning_interval=interval)
        self.accelerator = SimpleNamespace(device="cpu", gather=lambda value: value)
        self.reward_func_names = ["right", "short"]
        self._metrics: Any = defaultdict(lambda: defaultdict(list))
        self._diagnostic_counters = {"train": dict.fromkeys([kind.value for kind in Degeneracy], 0)}
        self.teacher_context_builder = SimpleNamespace(last_metrics={})

    def _warn_on_degenerate_diagnostics(self, **kwargs: Any) -> None:
        trainer_module.SDPOTrainer._warn_on_degenerate_diagnostics(self, **kwargs)

    def observe(self, rewards: torch.Tensor, parts: torch.Tensor, built: dict[str, float]) -> dict[str, float]:
        deviations = rewards.view(-1, G).std(dim=1)
        trainer_module.SDPOTrainer._record_reward_diagnostics(self, "train", rewards, parts, deviations)
        self.teacher_context_builder.last_metrics = built
        trainer_module.SDPOTrainer._warn_on_inactive_self_distillation(self, "train")
        return {name: values[-1] for name, values in self._metrics["train"].items()}


@pytest.mark.parametrize("interval", [0, 1, 3])
def test_metrics_of_rewards_and_warnings_are_trls(interval: int, warnings: list[str]) -> None:
    rng = np.random.default_rng(interval)
    their = TheirDiagnostics(interval)
    own = SelfDistillationDiagnostics(warning_interval=interval, flat_tolerance=TOLERANCE)
    longest = 0
    for step in range(40):
        # Long rows of degenerate steps of each kind, and healthy ones between them.
        choices = [[0.0], [0.0, 0.5], [1.0], [0.0, 1.0]][step // 10] if step % 9 else [0.0, 1.0, 2.0]
        parts = rng.choice([*choices, np.nan] if step % 2 else choices, (2 * G, 2)).astype(np.float32)
        rewards = rng.choice(choices, 2 * G)
        known_parts = [
            {name: None if np.isnan(part) else float(part) for name, part in zip(("right", "short"), row, strict=True)}
            for row in parts
        ]
        rows = [
            {"prompt": "q", "text": "a", "feedback": None, "reward": float(reward), "parts": each}
            for reward, each in zip(rewards, known_parts, strict=True)
        ]
        config = RepromptConfig()
        facts = facts_of(ours([rows[:G], rows[G:]], config), config)
        metrics = self_distillation_metrics(facts, flat_tolerance=TOLERANCE)
        warnings.clear()
        wanted = their.observe(torch.tensor(rewards, dtype=torch.float32), torch.tensor(parts), metrics)
        known = {name: value for name, value in wanted.items() if not np.isnan(value)}
        assert {name: metrics[name] for name in known} == pytest.approx(known, abs=1e-6)
        assert len(own.observe(metrics)) == len(warnings)
        assert own.state() == their._diagnostic_counters["train"]
        longest = max(longest, *own.counts.values())
    assert longest > 3 or interval == 0
