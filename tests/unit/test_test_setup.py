"""The shared test set-up does what it says."""

from __future__ import annotations

import os
from typing import Any

import pytest


def test_tests_run_offline_on_one_thread_and_see_no_gpu_unless_asked(pytestconfig: pytest.Config) -> None:
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["OMP_NUM_THREADS"]) == ("1", "1")
    if "gpu" not in pytestconfig.option.markexpr:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.integration
def test_ray_workers_of_the_session_import_the_package_and_hold_four_cpus(ray_local: Any) -> None:
    def where() -> str:
        import trl_ray

        return str(trl_ray.__file__)

    assert ray_local.get(ray_local.remote(where).remote(), timeout=120).endswith("trl_ray/__init__.py")
    assert ray_local.cluster_resources()["CPU"] == 4
