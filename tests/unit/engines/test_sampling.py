import math

import pytest
import torch

from trl_ray.engines.sampling import (
    BatchSampling,
    check_sampling,
    draw,
    policy_logprobs,
    processed_logprobs,
    reshapes,
    sample_seed,
)
from trl_ray.errors import DataError
from trl_ray.types import SamplingParams

CPU = torch.device("cpu")


def processed(logits, *params, lengths=None, stop_ids=(), seen=None):
    rows = torch.tensor(logits).log()
    sampling = BatchSampling.of(params, vocab_size=rows.shape[1], device=CPU)
    return processed_logprobs(
        rows,
        sampling,
        lengths=torch.tensor(lengths or [[0]] * len(rows)),
        stop_ids=torch.tensor(stop_ids, dtype=torch.int64),
        seen=seen,
    ).exp()


def params(**changes):
    return SamplingParams(max_tokens=4, **changes)


def test_temperature_one_half_squares_the_odds():
    assert torch.allclose(processed([[0.2, 0.8]], params(temperature=0.5)), torch.tensor([[1 / 17, 16 / 17]]))


def test_each_row_has_its_own_filters_and_what_is_left_sums_to_one():
    row = [0.4, 0.3, 0.2, 0.1]
    got = processed([row] * 4, params(), params(top_k=2), params(top_p=0.65), params(min_p=0.45))
    want = [row, [4 / 7, 3 / 7, 0, 0], [4 / 7, 3 / 7, 0, 0], [4 / 9, 3 / 9, 2 / 9, 0]]
    assert torch.allclose(got, torch.tensor(want), atol=1e-6)


def test_top_p_keeps_the_best_token_whatever_its_share():
    assert torch.allclose(processed([[0.9, 0.1]], params(top_p=0.01)), torch.tensor([[1.0, 0.0]]))


def test_stop_ids_are_barred_until_min_tokens_are_there():
    rows = [[0.5, 0.25, 0.25]] * 2
    got = processed(rows, params(min_tokens=2), params(min_tokens=2), lengths=[[1], [2]], stop_ids=(0,))
    assert torch.allclose(got, torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.25, 0.25]]))


def test_the_repetition_penalty_halves_the_score_of_seen_tokens():
    # Scores are log 0.25 and log 0.75; a negative score is multiplied: log 0.25 becomes log 0.0625.
    got = processed([[0.25, 0.75]], params(repetition_penalty=2.0), seen=torch.tensor([[True, False]]))
    assert torch.allclose(got, torch.tensor([[0.0625, 0.75]]) / 0.8125)


def test_the_policys_log_probs_know_the_temperature_and_nothing_else():
    rows = [params(temperature=0.5, top_k=1), params(repetition_penalty=2.0, min_tokens=3), params(temperature=0.0)]
    sampling = BatchSampling.of(rows, vocab_size=2, device=CPU)
    got = policy_logprobs(torch.tensor([[0.2, 0.8]] * 3).log(), sampling).exp()
    assert sampling.of_policy is None
    assert torch.allclose(got, torch.tensor([[1 / 17, 16 / 17], [0.2, 0.8], [0.2, 0.8]]))


def test_where_nothing_is_reshaped_they_are_the_bits_of_what_is_drawn_from():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampling = BatchSampling.of([params(temperature=0.7)] * 4, vocab_size=300, device=CPU)
    lengths, none = torch.zeros(4, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    drawn = processed_logprobs(logits, sampling, lengths=lengths, stop_ids=none, seen=None)
    assert torch.equal(policy_logprobs(logits, sampling), drawn)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"temperature": 0.3, "stop": ("a",)}, False),
        ({"fields": {"stop_token_ids": [3], "repetition_detection": {}}}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"min_tokens": 1}, True),
        ({"fields": {"bad_words": ["a"]}}, True),
        ({"fields": {"of_tomorrow": 1}}, True),
    ],
    ids=str,
)
def test_what_reshapes_sampling(changes, expected):
    assert reshapes(params(**changes)) is expected


def test_greedy_rows_take_the_best_token_and_report_its_probability_at_temperature_one():
    logprobs = torch.tensor([[0.3, 0.7]]).log()
    sampling = BatchSampling.of([params(temperature=0.0)], vocab_size=2, device=CPU)
    assert draw(logprobs, sampling, torch.tensor([[0.0]], dtype=torch.float64)).item() == 1
    assert processed([[0.3, 0.7]], params(temperature=0.0, top_k=1))[0, 1].item() == pytest.approx(0.7)


def test_a_draw_inverts_the_cumulative_distribution_and_never_takes_a_filtered_token():
    logprobs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    sampling = BatchSampling.of([params()], vocab_size=5, device=CPU)
    draws = [
        draw(logprobs, sampling, torch.tensor([[u]], dtype=torch.float64)).item()
        for u in (0.0, 0.499, 0.5, math.nextafter(1.0, 0.0))
    ]
    assert draws == [1, 1, 3, 3]


def test_seeds_of_neighbouring_requests_and_samples_differ():
    assert len({sample_seed(seed, index) for seed in range(20) for index in range(20)}) == 400
    assert 0 <= sample_seed(-1, 0) < 2**63


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"min_tokens": 5},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_an_input_error(wrong):
    with pytest.raises(DataError):
        check_sampling(params(**wrong))
