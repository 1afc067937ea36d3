import importlib.util
import sys

import pytest

from trl_ray.config.sections import EngineChoice
from trl_ray.engines.factory import resolve_engine_kind
from trl_ray.errors import ConfigError


def test_auto_takes_vllm_where_it_is_installed_without_importing_it(monkeypatch):
    before = "vllm" in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert resolve_engine_kind("auto") is EngineChoice.VLLM
    assert ("vllm" in sys.modules) == before


def test_auto_takes_transformers_elsewhere_and_vllm_by_name_is_an_input_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_engine_kind(EngineChoice.AUTO) is EngineChoice.TRANSFORMERS
    with pytest.raises(ConfigError, match="not installed"):
        resolve_engine_kind("vllm")


def test_an_unknown_engine_names_those_there_are():
    with pytest.raises(ConfigError, match="transformers"):
        resolve_engine_kind("sglang")
