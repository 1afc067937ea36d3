"""A run's model on the Hugging Face Hub: its card, and the way there.

checkpoint --model_files--> folder + README.md --push_model--> hub_model_id
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from trl_ray.errors import ConfigError, RunError
from trl_ray.models.checkpoint import export_model, list_checkpoints

_FAILURES = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    """Where a model goes."""

    repo_id: str
    """``user/name``; without a user, the token's."""
    token: str | None = None
    """None takes the one that `hf auth login` keeps, or HF_TOKEN."""
    private: bool | None = None
    revision: str | None = None
    """A branch; None is the main one."""


def check_hub(place: HubPlace) -> None:
    """See that the Hub can be reached and knows the token, before a run starts.

    Raises:
        ConfigError: it cannot, or does not.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "push_to_hub must be false while HF_HUB_OFFLINE is set, got true. Unset it, or push the model later with "
            "push_to_hub()."
        )
    try:
        HfApi(token=place.token).whoami()
    except _FAILURES as error:
        raise ConfigError(
            f"push_to_hub needs a token that the Hub knows, but: {str(error).splitlines()[0]}. Log in with hf auth "
            "login, set HF_TOKEN or hub_token, or set push_to_hub=false."
        ) from error


def push_model(checkpoint: Path, place: HubPlace, *, card: str, message: str, with_checkpoints: int = 0) -> str:
    """Upload the model of a checkpoint with its card.

    Args:
        checkpoint: its folder.
        place: where it goes; made where there is none.
        card: the text of README.md.
        message: of the commit.
        with_checkpoints: how many of the newest whole checkpoints of the run go along.

    Returns:
        The address of the commit.

    Raises:
        RunError: the Hub cannot be reached or refuses; the model is still on this machine.
    """
    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set.")
        api = HfApi(token=place.token)
        repo = api.create_repo(place.repo_id, private=place.private, exist_ok=True).repo_id
        if place.revision is not None:
            api.create_branch(repo, branch=place.revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            export_model(checkpoint, folder)
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, revision=place.revision)
        newest = list_checkpoints(checkpoint.parent)[-with_checkpoints:] if with_checkpoints else []
        for path in newest:
            api.upload_folder(
                repo_id=repo,
                folder_path=path,
                path_in_repo="last-checkpoint" if with_checkpoints == 1 else path.name,
                commit_message=f"{message}, {path.name}",
                revision=place.revision,
            )
    except _FAILURES as error:
        raise RunError(
            f"the model in {checkpoint} must go to {place.repo_id} on the Hub, but: {str(error).splitlines()[0]} It is "
            "kept; push it again with push_to_hub(), or upload its folder: hf upload."
        ) from error
    return str(done)


def model_card(
    *,
    repo_id: str,
    base_model: str | None,
    pipeline: str,
    dataset: str | None,
    options: Mapping[str, Any],
    tags: Sequence[str] = (),
) -> str:
    """The text of README.md: front matter that the Hub reads, and what was trained how.

    Args:
        repo_id: the model's name.
        base_model: what training started from; a folder of this machine is left out.
        pipeline: its name.
        dataset: its name, or None.
        options: those that were not the defaults.
        tags: of the user's.
    """
    name = repo_id.rpartition("/")[2]
    known = base_model if base_model is not None and not os.path.exists(base_model) else None
    front = ["library_name: transformers", f"model_name: {name}", "tags:", "- trl_ray", f"- {pipeline}", "- generated"]
    front += [f"- {tag}" for tag in tags]
    front = [*([f"base_model: {known}"] if known else []), *front]
    from_hub = dataset is not None and not os.path.exists(dataset) and "/" in dataset
    front += ["datasets:", f"- {dataset}"] if from_hub else []
    lines = [f"- `{key}`: {value}" for key, value in options.items()]
    beginning = f"[{known}](https://huggingface.co/{known})" if known else "a model of its own"
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {name}",
            "",
            f"Trained from {beginning} by the pipeline `{pipeline}` of trl_ray.",
            "",
            "## Options",
            "",
            *lines,
            "",
        ]
    )
