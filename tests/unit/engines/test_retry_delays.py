"""Delays between attempts, and what is left after the last, by hand."""

import pytest
from tenacity import Retrying, retry_if_result, stop_after_attempt

from trl_ray.engines.retry_delays import doubling_delays, last_result


@pytest.mark.parametrize(
    ("first_s", "delays"), [(0.0, [0.0, 0.0, 0.0]), (0.75, [0.75, 1.5, 3.0, 6.0, 10.0, 10.0]), (20.0, [10.0, 10.0])]
)
def test_delays_double_up_to_ten_seconds_and_the_last_answer_is_the_result(first_s: float, delays: list[float]) -> None:
    waited: list[float] = []
    answers = iter(range(99))
    again = Retrying(
        retry=retry_if_result(lambda answer: True),
        stop=stop_after_attempt(len(delays) + 1),
        wait=doubling_delays(first_s),
        sleep=waited.append,
        retry_error_callback=last_result,
    )
    assert again(next, answers) == len(delays)
    assert waited == delays
