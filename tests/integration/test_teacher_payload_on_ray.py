"""A teacher's frame goes through Ray's object store as it is: what is decoded lies in shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from teacher_batches import make_requests, make_scores
from trl_ray.types import TeacherQuestion
from trl_ray.wire.teacher_payload import decode_scores, encode_scores

pytestmark = pytest.mark.integration


def test_scores_are_read_in_the_object_store_without_copying(ray_local: Any) -> None:
    question = TeacherQuestion(vocab_size=50, top_k=20, tail=True)
    # Beyond 100 KiB, below which Ray copies small objects around.
    requests = make_requests([400] * 4)
    scores = make_scores(requests, question)
    frame = ray_local.get(ray_local.put(encode_scores(scores, question=question)))
    assert not frame.flags.owndata and not frame.flags.writeable
    again = decode_scores(frame, teacher="big", requests=requests, question=question)
    for one, other in zip(again, scores, strict=True):
        for name in ("logprobs", "top_ids", "top_logprobs", "tail"):
            assert np.shares_memory(getattr(one, name), frame)
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
