"""GRPO in one flat file: a language model learns "a + b" from a reward, with nothing but torch and transformers.

    prompts --generate--> 8 completions each --reward--> numbers --minus the group's mean--> advantages
       ^                                                                                        |
       +------------------- weights <-- AdamW <-- gradient <-- clipped token loss <-------------+

    python examples/grpo_flat.py --model models/SmolLM2-135M-Instruct --steps 24

What trl_ray has and this file deleted, so that the algorithm fits on three screens:

  Ray actors          here one process does everything in turn; there generation, rewards and training overlap
  vLLM                here transformers' generate, whose every sample computes the prompt anew
  bounded staleness   here each batch is sampled by the weights it trains, so no importance correction is needed
  the ledger          here a crash loses the run; there every prompt is trained once or dropped with a reason
  weight transport    here learner and sampler are one model; there weights are published, checked and pulled
  reward workers      here the reward is a function call; there it is a child process with a deadline
  memory savings      here logits of all completion tokens are held; there the LM head is computed in chunks
  everything around   configuration, checkpoints, resuming, metrics files, the report

What stayed is GRPO as trl_ray runs it by default: advantages scaled within the group (Shao et al. 2024, arXiv
2402.03300), the loss averaged over all tokens of the batch (DAPO, arXiv 2503.14476), no KL term.

Axes: N sequences of a batch, P prompt tokens (padded on the left), L completion tokens (padded on the right), V words.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS_PER_STEP = 8
GROUP_SIZE = 8
MICRO_BATCH = 32
MAX_NEW_TOKENS = 16
CLIP_LOW, CLIP_HIGH = 0.2, 0.2
MAX_GRAD_NORM = 1.0
SYSTEM_PROMPT = "Answer with the number only."


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question and its answer."""

    question: str
    answer: int


SHOWN = Problem(question="2 + 5 = ?", answer=7)
"""A solved problem in every prompt: a small model that never hits a bare number by chance has nothing to learn from."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One batch of completions and everything the loss needs of them."""

    ids: Tensor
    """[N, P+L] prompt and completion."""
    attention: Tensor
    """[N, P+L] 1 on tokens, 0 on padding."""
    mask: Tensor
    """[N, L] 1 up to and with the end-of-sequence token, 0 after it."""
    logprobs: Tensor
    """[N, L] log-probability of each token when it was sampled."""
    texts: list[str]
    """[N]"""


def problems(rng: random.Random) -> Iterator[Problem]:
    """Endless sums of two digits."""
    while True:
        left, right = rng.randint(0, 9), rng.randint(0, 9)
        yield Problem(question=f"{left} + {right} = ?", answer=left + right)


def reward(text: str, answer: int) -> float:
    """Half for nothing but a number, the other half when it is the right one."""
    bare = re.fullmatch(r"\s*(-?\d{1,9})\s*", text)
    if bare is None:
        return 0.0
    return 1.0 if int(bare[1]) == answer else 0.5


def render(tokenizer: Any, problem: Problem) -> str:
    """The prompt as the model reads it: a conversation where the tokenizer knows conversations."""
    if not tokenizer.chat_template:
        return f"{SYSTEM_PROMPT}\n{SHOWN.question} {SHOWN.answer}\n{problem.question} "
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": SHOWN.question},
        {"role": "assistant", "content": str(SHOWN.answer)},
        {"role": "user", "content": problem.question},
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[str]) -> Rollout:
    """Sample GROUP_SIZE completions of each prompt; those of one prompt stand next to each other."""
    model.eval()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        num_return_sequences=GROUP_SIZE,
        max_new_tokens=MAX_NEW_TOKENS,
        # The log-probs below are those of the plain softmax: nothing may reshape the distribution.
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    completions = output.sequences[:, inputs.input_ids.shape[1] :]  # [N, L]
    ended = (completions == tokenizer.eos_token_id).int().cumsum(dim=1)
    # The end-of-sequence token is trained on as well: how else would the model learn to stop?
    mask = ((ended == 0) | ((ended == 1) & (completions == tokenizer.eos_token_id))).long()  # [N, L]
    attention = torch.cat([inputs.attention_mask.repeat_interleave(GROUP_SIZE, dim=0), mask], dim=1)
    return Rollout(
        ids=output.sequences,
        attention=attention,
        mask=mask,
        logprobs=gather_logprobs(torch.stack(output.logits, dim=1), completions),
        texts=tokenizer.batch_decode(completions, skip_special_tokens=True),
    )


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """[N, L, V] logits and [N, L] tokens -> [N, L] log-probability of each token."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def completion_logprobs(model: Any, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """[N, L] log-probability of the last `length` tokens, with gradients."""
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    # Token t is predicted at position t-1: one more position is kept, and the last one predicts nothing we have.
    logits = model(
        input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False, logits_to_keep=length + 1
    ).logits[:, :-1]
    return gather_logprobs(logits, ids[:, -length:])


def group_advantages(rewards: Tensor) -> Tensor:
    """[N] rewards -> [N] how much better than its group each completion is, in the group's standard deviations."""
    groups = rewards.view(-1, GROUP_SIZE)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def clipped_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The sum over tokens of PPO's clipped objective, negated.

    Args:
        new: [N, L] log-probs under the weights being trained.
        old: [N, L] log-probs when the tokens were sampled.
        advantages: [N] the same for every token of a completion.
        mask: [N, L] 1 on completion tokens.
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    weights = advantages.unsqueeze(1)
    # The smaller of the two: moving further than the clip allows earns nothing, moving back always does.
    return -(torch.min(ratio * weights, clipped * weights) * mask).sum()


def train_on(model: Any, optimizer: Any, rollout: Rollout, advantages: Tensor) -> float:
    """One optimizer step over the whole batch, a micro-batch at a time; returns the loss.

    Every micro-batch is divided by the tokens of the *whole* batch: dividing by its own would give the tokens of
    short micro-batches more weight.
    """
    model.train()
    tokens, length, total = rollout.mask.sum(), rollout.mask.shape[1], 0.0
    optimizer.zero_grad()
    for start in range(0, len(rollout.ids), MICRO_BATCH):
        part = slice(start, start + MICRO_BATCH)
        new = completion_logprobs(model, rollout.ids[part], rollout.attention[part], length)
        loss = clipped_loss(new, rollout.logprobs[part], advantages[part], rollout.mask[part]) / tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return total


def train(model_path: str, *, steps: int, seed: int, learning_rate: float, passes: int) -> list[float]:
    """Train and return the mean reward of every step."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    source, history = problems(random.Random(seed)), []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        batch = [next(source) for _ in range(PROMPTS_PER_STEP)]
        rollout = generate(model, tokenizer, [render(tokenizer, problem) for problem in batch])
        answers = [problem.answer for problem in batch for _ in range(GROUP_SIZE)]
        rewards = torch.tensor([reward(text, answer) for text, answer in zip(rollout.texts, answers, strict=True)])
        advantages = group_advantages(rewards)
        # In the first pass every ratio is 1 and nothing is clipped; later passes move away from what was sampled.
        loss = sum(train_on(model, optimizer, rollout, advantages) for _ in range(passes)) / passes
        history.append(rewards.mean().item())
        seconds = time.perf_counter() - began
        tokens = int(rollout.mask.sum())
        print(
            f"step {step:3d}  reward {history[-1]:.3f}  loss {loss:+.4f}  tokens {tokens}  {seconds:.1f} s  "
            f"{batch[0].question} -> {rollout.texts[0]!r}",
            flush=True,
        )
    return history


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=24, help="batches to train on")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--passes", type=int, default=1, help="optimizer steps on each batch; clipping acts from 2 on")
    args = parser.parse_args()
    history = train(args.model, steps=args.steps, seed=args.seed, learning_rate=args.learning_rate, passes=args.passes)
    edge = min(5, len(history))
    first, last = sum(history[:edge]) / edge, sum(history[-edge:]) / edge
    print(f"mean reward of the first {edge} steps: {first:.3f}, of the last {edge}: {last:.3f}")


if __name__ == "__main__":
    main()
