"""TRL's `model_init_kwargs`: keywords of `from_pretrained`, taken apart into the options that stand for them here.

{"dtype": "bfloat16", "sliding_window": 64} --read_model_init_kwargs--> dtype="bfloat16"
                                                        model_init_kwargs={"sliding_window": 64} of the configuration
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_ray.config.keywords.json_keywords import held_keywords

_OPTIONS: Mapping[str, str] = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
}
_HAPPENS: Mapping[str, tuple[Any, ...]] = {
    "use_cache": (True, False),
    "low_cpu_mem_usage": (True, False),
    "use_safetensors": (True,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "force_download": (False,),
    "local_files_only": (False,),
    "use_kernels": (False,),
    "subfolder": ("",),
}
"""Values that ask for what happens anyway, or for nothing that is computed."""
_PLACES = "The run places the model itself (runtime). Remove it."
_FOLDER = "Give the folder itself as model_name_or_path; one on the hub is fetched with: hf download NAME."
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers"), _PLACES),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _PLACES),
    **dict.fromkeys(("subfolder", "variant", "gguf_file"), _FOLDER),
    "quantization_config": "Set load_in_4bit or load_in_8bit, with use_peft=true.",
    "token": "A token stands in no file. Set the environment variable HF_TOKEN, or log in with hf auth login.",
    "use_auth_token": "A token stands in no file. Set the environment variable HF_TOKEN.",
    "cache_dir": "All actors read it. Set the environment variable HF_HOME.",
    "local_files_only": "All actors read it. Set the environment variable HF_HUB_OFFLINE=1.",
    "proxies": "All actors read it. Set the environment variable HTTPS_PROXY.",
    "use_kernels": "Set use_liger_kernel, which replaces layers on GPUs.",
    "use_safetensors": "Weights are read from *.safetensors. Remove it, or save the model again.",
    "ignore_mismatched_sizes": "Weights that do not fit would be random. Remove it.",
    "config": "Name the options of the configuration that change, each by itself.",
    "state_dict": "Save the weights, and give their folder as model_name_or_path.",
}


def read_model_init_kwargs(values: Any) -> Any:
    """Put what `model_init_kwargs` holds where our options are.

    Args:
        values: of a configuration, before they are validated.

    Returns:
        The same; what is left in `model_init_kwargs` are changes of the model's own configuration.

    Raises:
        ValueError: a keyword cannot be had, or another option says otherwise.
    """
    held = held_keywords(values, "model_init_kwargs")
    if not held:
        return values
    read, left = {key: value for key, value in values.items() if key != "model_init_kwargs"}, {}
    for name, value in held.items():
        option = _OPTIONS.get(name)
        if option is not None:
            # None is what from_pretrained does unless it is told otherwise.
            if value is not None:
                _put(read, option, value, name)
        elif name in _REFUSED and value is not None and not _is_nothing(name, value):
            raise ValueError(f"model_init_kwargs cannot hold {name}={value!r}. {_REFUSED[name]}")
        elif name not in _REFUSED and name not in _HAPPENS:
            left[name] = value
    return {**read, "model_init_kwargs": left}


def _is_nothing(name: str, value: Any) -> bool:
    return any(value is each or (value == each and isinstance(value, str)) for each in _HAPPENS.get(name, ()))


def _put(read: dict[str, Any], option: str, value: Any, name: str) -> None:
    value = str(value).removeprefix("torch.") if option == "dtype" else value
    if read.setdefault(option, value) != value:
        raise ValueError(
            f"{option} must be given once, got {read[option]!r} and model_init_kwargs[{name!r}]={value!r}. Remove one "
            "of the two."
        )
