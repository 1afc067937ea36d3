"""An engine that cannot start says which option of ours is wrong, on one line, as an error of the input."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from trl_ray.engines.start.start_errors import start_error
from trl_ray.errors import ConfigError, EngineError, ModelError, ResourceError

# What vLLM 0.32 was seen to say.
SMALL_CACHE = (
    "To serve at least one request with the model's max seq len (513), (0.0 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum model length "
    "is 224. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or decreasing "
    "`max_model_len` when initializing the engine. See https://docs.vllm.ai for more details."
)
NO_BLOCKS = (
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine."
)
NUMA = (
    "Available memory on node 0 (21.72/23.54 GiB) on kv cache allocation is less than requested memory for kv (16384.0 "
    "GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes."
)
ARGUMENTS: dict[str, Any] = {"max_model_len": 513, "kv_cache_memory_bytes": 1 << 29, "gpu_memory_utilization": 0.85}


class SchedulerConfig(BaseModel):
    """Stands for vLLM's."""

    max_num_seqs: int = Field(default=1, ge=1)
    block_size: int = 16
    mode: Literal["a", "b"] = "a"
    max_num_batched_tokens: int = 4096

    @model_validator(mode="after")
    def check(self) -> SchedulerConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be greater than or equal to max_num_seqs "
                f"({self.max_num_seqs})."
            )
        return self


def refused(given: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        SchedulerConfig(**{**options, **given})
    error = start_error("vllm", caught.value, arguments={**ARGUMENTS, **options, **given}, given=given)
    assert isinstance(error, ConfigError)
    return str(error)


def test_a_cache_that_holds_no_sequence_names_its_option_and_what_it_holds() -> None:
    error = start_error("vllm", ValueError(SMALL_CACHE), arguments=ARGUMENTS)
    assert isinstance(error, ResourceError)
    assert str(error) == (
        "the KV cache must hold one sequence of rollout.max_model_len=512 tokens, but has room for 223 tokens with "
        "rollout.kv_cache_memory_gib=0.5. Raise rollout.kv_cache_memory_gib, or lower rollout.max_model_len."
    )


@pytest.mark.parametrize(
    ("arguments", "given", "option"),
    [
        ({**ARGUMENTS, "kv_cache_memory_bytes": None}, {}, "rollout.gpu_memory_utilization=0.85"),
        (ARGUMENTS, {"kv_cache_memory_bytes": 1 << 29}, "rollout.engine_kwargs.kv_cache_memory_bytes=536870912"),
    ],
)
def test_the_option_is_the_one_that_sized_the_cache(arguments: Any, given: Any, option: str) -> None:
    error = start_error("vllm", ValueError(NO_BLOCKS), arguments=arguments, given=given)
    assert f"room for none with {option}. Raise" in str(error)


@pytest.mark.parametrize(
    "error",
    [ValueError(NUMA), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")],
)
@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_a_lack_of_memory_is_one_of_the_machine_whatever_the_engine(name: str, error: Exception) -> None:
    found = start_error(name, error, arguments=ARGUMENTS if name == "vllm" else None)
    assert isinstance(found, ResourceError)
    assert "rollout.kv_cache_memory_gib" in str(found) and "rollout.max_num_seqs" in str(found)


def test_a_wrong_argument_is_told_under_the_name_it_was_given_by() -> None:
    assert refused({"block_size": "many"}) == (
        "rollout.engine_kwargs.block_size must be what vLLM accepts, got 'many': input should be a valid integer, "
        "unable to parse string as an integer. Correct it."
    )
    assert refused({}, max_num_seqs=0).startswith("rollout.max_num_seqs must be what vLLM accepts, got 0")
    assert refused({"max_num_seqs": 0}).startswith("rollout.engine_kwargs.max_num_seqs must be")
    assert "rollout.engine_kwargs.mode must be" in refused({"mode": "c"})
    with pytest.raises(ValidationError) as caught:
        SchedulerConfig(mode="c")  # type: ignore[arg-type]
    inside = start_error("vllm", caught.value, arguments=ARGUMENTS, given={"scheduler_config": {"mode": "c"}})
    assert str(inside).startswith("rollout.engine_kwargs.scheduler_config.mode must be what vLLM accepts, got 'c'")


def test_options_that_contradict_each_other_are_told_in_our_names() -> None:
    text = refused({"max_num_batched_tokens": 8}, max_num_seqs=9)
    assert text == (
        "vLLM must accept its options, but: rollout.engine_kwargs.max_num_batched_tokens (8) must be greater than or "
        "equal to rollout.max_num_seqs (9). Correct them."
    )


def test_what_an_argument_was_set_to_tells_it_where_vllm_names_none() -> None:
    error = ValueError("Load format `nonsense` is not supported")
    found = start_error("vllm", error, arguments=ARGUMENTS, given={"load_format": "nonsense"})
    assert isinstance(found, ConfigError)
    assert "rollout.engine_kwargs.load_format must be what vLLM can start with, got 'nonsense'" in str(found)


def test_an_argument_that_vllm_does_not_have_is_told_with_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing vLLM takes seconds.
    fields = dataclasses.make_dataclass("EngineArgs", [("max_num_seqs", int), ("block_size", int)])
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.engine", ModuleType("vllm.engine"))
    module: Any = ModuleType("vllm.engine.arg_utils")
    module.EngineArgs = fields
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)
    error = TypeError("EngineArgs.__init__() got an unexpected keyword argument 'max_num_seq'")
    found = start_error("vllm", error, arguments=ARGUMENTS, given={"max_num_seq": 3})
    assert isinstance(found, ConfigError)
    assert "got 'max_num_seq'. Did you mean 'max_num_seqs'?" in str(found)


def test_our_own_errors_stay_and_others_are_told_on_one_line() -> None:
    ours = ModelError("no such folder")
    assert start_error("vllm", ours) is ours
    other = start_error("transformers", KeyError("a\nb"))
    assert isinstance(other, EngineError)
    assert "\n" not in str(other) and "transformers cannot start: KeyError" in str(other)
