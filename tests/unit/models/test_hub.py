"""What goes to the Hub, and what is said when it cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HFValidationError

from trl_ray.errors import ConfigError, RunError
from trl_ray.models import hub
from trl_ray.models.hub import HubPlace, check_hub, model_card, push_model

PLACE = HubPlace(repo_id="me/model", token="t", private=True, revision="next")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The Hub, reachable, which writes down what it is sent."""
    made: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            made.append(("token", {"token": token}))

        def whoami(self) -> None:
            made.append(("whoami", {}))

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            made.append(("create", {"repo_id": repo_id, **options}))
            return type("Repo", (), {"repo_id": repo_id})

        def create_branch(self, repo_id: str, **options: Any) -> None:
            made.append(("branch", options))

        def upload_folder(self, *, folder_path: Any, **options: Any) -> str:
            options["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            made.append(("upload", options))
            return "https://hub/commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return made


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for step in (2, 4):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "trainer_state.pt", "manifest.json"):
            (folder / name).write_text("{}")
    return tmp_path / "step-4"


def uploads(calls: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [options for name, options in calls if name == "upload"]


def test_a_model_goes_with_its_card_and_without_what_only_a_run_needs(
    checkpoint: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    assert push_model(checkpoint, PLACE, card="card", message="done") == "https://hub/commit"
    assert ("create", {"repo_id": "me/model", "private": True, "exist_ok": True}) in calls
    assert ("branch", {"branch": "next", "exist_ok": True}) in calls
    [sent] = uploads(calls)
    assert sent["files"] == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert (sent["repo_id"], sent["revision"], sent["commit_message"]) == ("me/model", "next", "done")


@pytest.mark.parametrize(("count", "places"), [(1, ["last-checkpoint"]), (9, ["step-2", "step-4"])])
def test_checkpoints_go_along_where_that_is_asked(
    checkpoint: Path, calls: list[tuple[str, dict[str, Any]]], count: int, places: list[str]
) -> None:
    push_model(checkpoint, PLACE, card="card", message="done", with_checkpoints=count)
    sent = uploads(calls)[1:]
    assert [each["path_in_repo"] for each in sent] == places and "trainer_state.pt" in sent[-1]["files"]


def test_offline_it_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="push_to_hub must be false while HF_HUB_OFFLINE is set"):
        check_hub(PLACE)
    with pytest.raises(RunError, match=r"HF_HUB_OFFLINE is set.*push it again with push_to_hub\(\)"):
        push_model(checkpoint, PLACE, card="card", message="done")


def test_a_token_that_the_hub_does_not_know_is_told_before_the_run(
    calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_hub(PLACE)
    assert calls == [("token", {"token": "t"}), ("whoami", {})]

    def unknown(self: Any) -> None:
        raise HFValidationError("401")

    monkeypatch.setattr(hub.HfApi, "whoami", unknown)
    with pytest.raises(ConfigError, match="needs a token that the Hub knows, but: 401"):
        check_hub(PLACE)


def test_a_card_names_base_and_data_of_the_hub_but_no_folder_of_this_machine(tmp_path: Path) -> None:
    def front(**changes: Any) -> dict[str, Any]:
        given = {"repo_id": "me/model", "base_model": "org/base", "pipeline": "sft", "dataset": "org/rows"}
        card = model_card(**{**given, **changes}, options={"learning_rate": 1e-5})
        assert "- `learning_rate`: 1e-05" in card
        found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
        return found

    assert front() == {
        "base_model": "org/base",
        "library_name": "transformers",
        "model_name": "model",
        "tags": ["trl_ray", "sft", "generated"],
        "datasets": ["org/rows"],
    }
    local = front(base_model=str(tmp_path), dataset=str(tmp_path))
    assert "base_model" not in local and "datasets" not in local
