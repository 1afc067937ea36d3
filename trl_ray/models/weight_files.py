"""Whether the weight files of a folder hold a model's weights, told from their headers.

model.safetensors.index.json ─► every file it names is there
headers: names and shapes ─► against the architecture on no device ─► missing, of other shapes
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from trl_ray.errors import ModelError

Shapes = dict[str, tuple[int, ...]]
_INDEX = "model.safetensors.index.json"


def read_shapes(name: str) -> Shapes | None:
    """The shape of every weight of a folder, by name; None where its weights are not kept as safetensors, or elsewhere.

    Raises:
        ModelError: a file that the index names is missing, or a file is damaged.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    _check_index(folder)
    found: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"the model in {name} must load, but: {file.name} is truncated or damaged ({error}). Copy it again."
            ) from error
    return found or None


def _check_index(folder: Path) -> None:
    index = folder / _INDEX
    if not index.is_file():
        return
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"the model in {folder} must load, but: {_INDEX} is damaged ({error}). Copy it again."
        ) from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ModelError(
            f"the model in {folder} must load, but: {len(missing)} of the {len(files)} files of its weights are "
            f"missing, first {missing[0]}. Copy it again."
        )


def check_shapes(name: str, shapes: Shapes, empty: PreTrainedModel) -> None:
    """Compare what files hold with an architecture; nothing is said where transformers reads one into the other.

    Args:
        name: of the folder.
        shapes: of its weights.
        empty: the model that they are for, on no device.

    Raises:
        ModelError: weights are missing, or have other shapes.
    """
    if cast(Any, get_model_conversion_mapping)(empty, add_legacy=False):
        return
    prefix = f"{empty.base_model_prefix}."
    there = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    tied: dict[str, str] = cast(Any, empty).all_tied_weights_keys
    ignored = cast(Any, empty)._keys_to_ignore_on_load_missing or ()
    missing, other = [], []
    for key, weight in empty.named_parameters():
        names = [key, *(target for target, source in tied.items() if source == key), tied.get(key, key)]
        shape = next((there[each.removeprefix(prefix)] for each in names if each.removeprefix(prefix) in there), None)
        if shape is None and not any(re.search(pattern, key) for pattern in ignored):
            missing.append(key)
        elif shape is not None and shape != tuple(weight.shape):
            other.append(f"{key} is {list(shape)}, not {list(weight.shape)}")
    if missing:
        raise ModelError(
            f"{name} must hold every weight of its model, but {len(missing)} are missing, first {sorted(missing)[:3]}; "
            f"they would be random. {_called(empty)}Save the model again or give another."
        )
    if other:
        raise ModelError(
            f"the weights in {name} must have the shapes that its config.json says, but {other[0]}"
            f"{f' (and {len(other) - 1} more)' if len(other) > 1 else ''}. Take the config.json that belongs to them."
        )


def _called(empty: PreTrainedModel) -> str:
    """What the files are of, where they say so and it is something else."""
    written = (getattr(empty.config, "architectures", None) or [type(empty).__name__])[0]
    return "" if written == type(empty).__name__ else f"Its config.json says that it is a {written}. "
