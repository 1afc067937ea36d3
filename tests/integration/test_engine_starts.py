"""What a real engine says that cannot start: the option, what was given, what to do."""

import pytest

from tiny_models import build_tiny_model
from trl_ray.engines.factory import create_engine
from trl_ray.errors import ConfigError, ResourceError

pytestmark = [pytest.mark.integration, pytest.mark.long]


def test_vllm_names_our_options_where_it_cannot_start(tmp_path):
    pytest.importorskip("vllm")
    options = {"model": build_tiny_model(tmp_path), "dtype": "float32", "max_model_len": 512, "max_num_seqs": 4}
    with pytest.raises(ResourceError, match=r"rollout.max_model_len=512 tokens, but has room for \d+ tokens with"):
        create_engine("vllm", kv_cache_memory_bytes=1 << 18, **options)
    with pytest.raises(ConfigError, match=r"rollout\.engine_kwargs\.block_size must be what vLLM accepts, got 'many'"):
        create_engine("vllm", engine_kwargs={"block_size": "many"}, **options)
    with pytest.raises(ConfigError, match=r"got 'max_num_seq'\. Did you mean 'max_num_seqs'"):
        create_engine("vllm", engine_kwargs={"max_num_seq": 3}, **options)
