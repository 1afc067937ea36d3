"""Has vLLM's workers report the policy's log-probs where sampling is reshaped; `engines.sampling` has the reason.

    logits [B, V] --kept--> temperature --> log-softmax --> log-prob of the drawn token, in the place of vLLM's
           `--grammar--> sampler: bans, biases, penalties, filters --> the drawn token

vLLM reports log-probs either before the temperature or after everything. Its sampler is told here to report those in
between, once a request needs it, and computes as before until then. Both of vLLM's model runners are known.
"""

from __future__ import annotations

from typing import Any

import torch

_TOLD = "reports_policy_logprobs"
_GREEDY = 1e-5
"""vLLM's: a temperature below it is greedy, whose log-probs are those at temperature 1."""


class _Kept:
    """The logits of a step, as they were before a grammar masked them; taken once."""

    def __init__(self) -> None:
        self._logits: torch.Tensor | None = None

    def keep(self, logits: torch.Tensor | None) -> None:
        """Hold a copy, as the mask is written into the logits [B, V] themselves."""
        self._logits = None if logits is None else logits.clone()

    def take(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] float32 raw logits, a copy."""
        found, self._logits = logits if self._logits is None else self._logits, None
        return found.to(torch.float32, copy=True)


def report_policy_logprobs(worker: Any) -> None:
    """From now on a worker reports the policy's log-probs, of every request; runs inside the worker.

    Where a request reshapes nothing these are the bits that vLLM reports.
    """
    runner = worker.model_runner
    sampler = getattr(runner, "sampler", None)
    if sampler is None or getattr(sampler, _TOLD, False):
        return
    setattr(sampler, _TOLD, True)
    kept = _Kept()
    if hasattr(sampler, "sampling_states"):
        _tell_second(runner, sampler, kept)
    else:
        _tell_first(runner, sampler, kept)


def _tell_first(runner: Any, sampler: Any, kept: _Kept) -> None:
    """The runner whose sampler is a module."""
    draw, sample_tokens = sampler.forward, runner.sample_tokens

    def forward(logits: torch.Tensor, sampling_metadata: Any, *others: Any, **named: Any) -> Any:
        scores = kept.take(logits)
        output = draw(logits, sampling_metadata, *others, **named)
        if output.logprobs_tensors is None:
            return output
        temperature = sampling_metadata.temperature
        if temperature is not None:
            scores.div_(torch.where(temperature < _GREEDY, 1.0, temperature).unsqueeze(1))
        found = output.logprobs_tensors
        values = scores.log_softmax(dim=-1, dtype=torch.float32).gather(1, found.logprob_token_ids.long())
        output.logprobs_tensors = found._replace(logprobs=values)
        return output

    def sample_all(grammar_output: Any) -> Any:
        state = runner.execute_model_state
        if grammar_output is not None and state is not None:
            kept.keep(state.logits)
        return sample_tokens(grammar_output)

    sampler.forward = forward
    runner.sample_tokens = sample_all


def _tell_second(runner: Any, sampler: Any, kept: _Kept) -> None:
    """The runner whose sampler computes log-probs from the logits that its `sample` gives back."""
    draw, structured = sampler.sample, getattr(runner, "structured_outputs_worker", None)

    def sample(logits: torch.Tensor, expanded: Any, places: Any, places_np: Any, *others: Any, **named: Any) -> Any:
        scores = kept.take(logits)
        sampled, _ = draw(logits, expanded, places, places_np, *others, **named)
        sampler.sampling_states.apply_temperature(scores, expanded, places_np)
        return sampled, scores

    sampler.sample = sample
    if structured is None:
        return
    mask = structured.apply_grammar_bitmask

    def apply_grammar_bitmask(logits: torch.Tensor, *others: Any, **named: Any) -> Any:
        kept.keep(logits)
        return mask(logits, *others, **named)

    structured.apply_grammar_bitmask = apply_grammar_bitmask
