"""Has vLLM's workers report the policy's log-probs where sampling is reshaped; `engines.sampling` has the reason.

    logits [B, V] --kept--> temperature --> log-softmax --> log-prob of the drawn token, in the place of vLLM's
           `--grammar--> sampler: bans, biases, penalties, filters --> the drawn token

vLLM reports log-probs either before the temperature or after everything. Its sampler is told here to report those in
between, of requests that are marked with `MARK` among their `extra_args`. It is told with the first of them, so that
runs without any compute what they did. Both of vLLM's model runners are known. B rows of one step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

MARK = "policy_logprobs"
_TOLD = "reports_policy_logprobs"
_GREEDY = 1e-5
"""vLLM's: a temperature below it is greedy, whose log-probs are those at temperature 1."""


def report_policy_logprobs(worker: Any) -> None:
    """From now on a worker reports the policy's log-probs of marked requests; runs inside the worker, before them."""
    runner = worker.model_runner
    sampler = getattr(runner, "sampler", None)
    if sampler is None or getattr(sampler, _TOLD, False):
        return
    setattr(sampler, _TOLD, True)
    if hasattr(sampler, "sampling_states"):
        _tell_second(runner, sampler)
    else:
        _tell_first(runner, sampler)


class _Kept:
    """The logits of a step, as they were before a grammar masked them; taken once."""

    def __init__(self) -> None:
        self._logits: torch.Tensor | None = None

    def keep(self, logits: torch.Tensor | None) -> None:
        """Hold a copy, as the mask is written into the logits [B, V] themselves."""
        self._logits = None if logits is None else logits.clone()

    def take(self, logits: torch.Tensor, marked: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A float32 copy of the raw logits [B, V] and which rows count [B, 1]; None where none does."""
        found, self._logits = logits if self._logits is None else self._logits, None
        # As many rows as requests: of drafted tokens there are more, which runs do not have together with marks.
        if not any(marked) or len(marked) != len(found):
            return None
        return found.to(torch.float32, copy=True), torch.tensor(marked, device=found.device).unsqueeze(1)


def _is_marked(params: Any) -> bool:
    return bool((getattr(params, "extra_args", None) or {}).get(MARK))


def _tell_first(runner: Any, sampler: Any) -> None:
    """The runner whose sampler is a module, and gives log-probs back."""
    kept, draw, sample_tokens = _Kept(), sampler.forward, runner.sample_tokens

    def forward(logits: torch.Tensor, sampling_metadata: Any, *others: Any, **named: Any) -> Any:
        requests = [runner.requests.get(key) for key in runner.input_batch.req_ids]
        taken = kept.take(logits, [request is not None and _is_marked(request.sampling_params) for request in requests])
        output = draw(logits, sampling_metadata, *others, **named)
        found = output.logprobs_tensors
        if taken is None or found is None:
            return output
        scores, rows = taken
        temperature = sampling_metadata.temperature
        if temperature is not None:
            scores.div_(torch.where(temperature < _GREEDY, 1.0, temperature).unsqueeze(1))
        values = scores.log_softmax(dim=-1, dtype=torch.float32).gather(1, found.logprob_token_ids.long())
        output.logprobs_tensors = found._replace(logprobs=torch.where(rows, values, found.logprobs))
        return output

    def sample_all(grammar_output: Any) -> Any:
        state = runner.execute_model_state
        if grammar_output is not None and state is not None:
            kept.keep(state.logits)
        return sample_tokens(grammar_output)

    sampler.forward = forward
    runner.sample_tokens = sample_all


def _tell_second(runner: Any, sampler: Any) -> None:
    """The runner whose sampler computes log-probs from the logits that its `sample` gives back."""
    kept, draw, add = _Kept(), sampler.sample, sampler.add_request
    structured = getattr(runner, "structured_outputs_worker", None)
    marks = dict[int, bool]()

    def add_request(place: int, params: Any) -> None:
        marks[int(place)] = _is_marked(params)
        add(place, params)

    def sample(logits: torch.Tensor, expanded: Any, places: Any, places_np: Any, *others: Any, **named: Any) -> Any:
        taken = kept.take(logits, [marks.get(int(place), False) for place in places_np])
        sampled, processed = draw(logits, expanded, places, places_np, *others, **named)
        if taken is None:
            return sampled, processed
        scores, rows = taken
        sampler.sampling_states.apply_temperature(scores, expanded, places_np)
        return sampled, torch.where(rows, scores, processed)

    sampler.add_request, sampler.sample = add_request, sample
    if structured is None:
        return
    mask = structured.apply_grammar_bitmask

    def apply_grammar_bitmask(logits: torch.Tensor, *others: Any, **named: Any) -> Any:
        kept.keep(logits)
        return mask(logits, *others, **named)

    structured.apply_grammar_bitmask = apply_grammar_bitmask
