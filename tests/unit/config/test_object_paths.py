"""Which paths name one object, and what is found by the names that installed packages give."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from trl_ray.config.load import build, dump_yaml, load_config, parse_yaml
from trl_ray.config.object_paths import OBJECT_OPTIONS, find_plug_in, is_same_object, place, real_path
from trl_ray.config.runs.config_registry import CONFIGS
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder one is in, beside ``other``: each has a ``mine.py``, and ``link.py`` leads to that of ``other``."""
    for name in ("here", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").touch()
    (tmp_path / "here" / "link.py").symlink_to(tmp_path / "other" / "mine.py")
    monkeypatch.chdir(tmp_path / "here")
    return (tmp_path / "here").resolve()


@pytest.mark.parametrize(
    ("written", "used", "is_same"),
    [
        ("grpo", "grpo", True),
        ("grpo", "rloo", False),
        ("package.module:A", "package.module:A", True),
        ("package.module:A", "module:A", False),
        ("mine.py:A", "./mine.py:A", True),
        ("mine.py:A", "../here/mine.py:A", True),
        ("mine.py:A", "{folder}/mine.py:A", True),
        ("{folder}/mine.py:A", "mine.py:A", True),
        ("../other/mine.py:A", "link.py:A", True),
        # Written in a file of the other folder, where that is its path.
        ("mine.py:A", "../other/mine.py:A", True),
        ("other/mine.py:A", "../other/mine.py:A", True),
        ("{folder}/mine.py:A", "../other/mine.py:A", False),
        ("elsewhere/mine.py:A", "mine.py:A", False),
        ("mine.py:A", "mine.py:B", False),
        ("ne.py:A", "mine.py:A", False),
        ("mine.py:A", "mine:A", False),
        ("grpo", "mine.py:A", False),
    ],
)
def test_paths_of_one_object_may_be_spelled_differently(folder: Path, written: str, used: str, is_same: bool) -> None:
    assert is_same_object(written.format(folder=folder), used.format(folder=folder)) is is_same


def test_only_the_path_of_a_file_is_made_to_hold_in_every_folder(folder: Path) -> None:
    assert real_path("../here/mine.py:A.b") == f"{folder}/mine.py:A.b"
    assert real_path("link.py:A") == f"{folder.parent}/other/mine.py:A"
    assert [real_path(same) for same in ("grpo", "package.module:A")] == ["grpo", "package.module:A"]


def test_what_is_uploaded_with_a_job_keeps_its_path_in_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    (upload / "configs").mkdir(parents=True)
    for name in ("mine.py", "configs/near.py"):
        (upload / name).touch()
    monkeypatch.chdir(upload)
    assert [real_path("mine.py:A"), real_path(f"{upload}/mine.py:A")] == ["mine.py:A", "mine.py:A"]
    placed = place({"loss": "near.py:A", "reward_funcs": ["mine.py:f"]}, Path("configs"))
    assert placed == {"loss": "configs/near.py:A", "reward_funcs": ["mine.py:f"]}
    # What lies outside of it is where it is.
    assert real_path(f"{tmp_path}/else.py:A") == f"{tmp_path.resolve()}/else.py:A"


def test_files_of_objects_are_looked_for_beside_the_configuration_and_then_here(folder: Path) -> None:
    other, here = folder.parent / "other", folder
    (here / "only_here.py").touch()
    written = {
        "loss": "mine.py:Loss",
        "reward_funcs": ["mine.py:f", "only_here.py:g", "exact_answer", "package.module:h", f"{here}/mine.py:i"],
        "callbacks": ["only_here.py:A", {"path": "mine.py:B", "kwargs": {"file": "mine.py:C"}}],
        "teacher_model_kind": "mine.py:Kind",
        "system_prompt": "mine.py:no",
        "beta": 0.1,
    }
    assert place(written, Path("../other")) == {
        "loss": f"{other}/mine.py:Loss",
        "reward_funcs": [
            f"{other}/mine.py:f",
            f"{here}/only_here.py:g",
            "exact_answer",
            "package.module:h",
            f"{here}/mine.py:i",
        ],
        "callbacks": [f"{here}/only_here.py:A", {"path": f"{other}/mine.py:B", "kwargs": {"file": "mine.py:C"}}],
        "teacher_model_kind": f"{other}/mine.py:Kind",
        "system_prompt": "mine.py:no",
        "beta": 0.1,
    }
    with pytest.raises(ConfigError, match=f"no none.py in {other}, where the configuration is, nor in {here}"):
        place({"reward_funcs": ["none.py:f"]}, Path("../other"))


def test_a_chat_template_and_a_deepspeed_file_may_lie_beside_the_configuration(folder: Path) -> None:
    other = folder.parent / "other"
    (other / "chat.jinja").write_text("{{ messages }}")
    (other / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "here.jinja").write_text("x")
    written = {"chat_template_path": "chat.jinja", "deepspeed": "ds.json"}
    assert place(written, Path("../other")) == {
        "chat_template_path": f"{other}/chat.jinja",
        "deepspeed": f"{other}/ds.json",
    }
    # Others are taken as they are: of this folder, a name, a text.
    for given in ("here.jinja", "org/model", "{{ messages }}" * 99):
        assert place({"chat_template": given}, Path("../other")) == {"chat_template": given}
    assert SDPOConfig(chat_template="here.jinja").chat_template == f"{folder}/here.jinja"
    assert SDPOConfig(chat_template="org/model").chat_template == "org/model"
    inline = SDPOConfig(
        chat_template_path=None, chat_template="{% for each in messages %}\n{{ each.content }}\n{% endfor %}\n"
    )
    assert build(SDPOConfig, parse_yaml(dump_yaml(inline), source="config.yaml")) == inline


def test_the_folder_of_a_tokenizer_may_lie_beside_the_configuration(folder: Path) -> None:
    other = folder.parent / "other"
    (other / "tokenizer").mkdir()
    for name in ("chat_template", "chat_template_path"):
        assert place({name: "tokenizer"}, Path("../other")) == {name: f"{other}/tokenizer"}
    # No folder is a deepspeed file, and neither nothing nor what is too long for a path is a folder.
    assert place({"deepspeed": "tokenizer"}, Path("../other")) == {"deepspeed": "tokenizer"}
    for given in ("", "x" * 9999):
        assert place({"chat_template": given}, Path("../other")) == {"chat_template": given}


def test_a_configuration_that_is_loaded_in_python_has_its_files_beside_it(folder: Path) -> None:
    other = folder.parent / "other"
    (other / "only_there.py").touch()
    (other / "job.yaml").write_text("loss: only_there.py:L\nreward_funcs: [none.py:f]\n")
    config = load_config(SDPOConfig, "../other/job.yaml", ["reward_funcs=[mine.py:f]"])
    assert config.loss == f"{other}/only_there.py:L"
    # What an override says is of this folder, and what it replaces need not be there.
    assert config.reward_funcs == [f"{folder}/mine.py:f"]
    with pytest.raises(ConfigError, match=f"no none.py in {other}"):
        load_config(SDPOConfig, "../other/job.yaml", ["seed=1"])


def test_options_that_name_objects_hold_paths_that_hold_everywhere(folder: Path) -> None:
    config = SDPOConfig(
        loss="mine.py:L", reward_funcs=["mine.py:f"], callbacks=["mine.py:C"], teacher_model_kind="mine.py:K"
    )
    assert config.loss == f"{folder}/mine.py:L" and config.reward_funcs == [f"{folder}/mine.py:f"]
    assert config.callbacks[0].path == f"{folder}/mine.py:C" and config.teacher_model_kind == f"{folder}/mine.py:K"
    # Whatever else names objects is told here: it must be looked for beside the configuration, too.
    named = {
        name for each in CONFIGS.values() for name, field in each.model_fields.items() if "file.py:" in _doc(field)
    }
    assert named <= set(OBJECT_OPTIONS)


def _doc(field: FieldInfo) -> str:
    return field.description or ""


def test_an_entry_point_gives_a_name_to_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [EntryPoint("joined", "posixpath:join", "some.group")]
    monkeypatch.setattr(
        "trl_ray.config.object_paths.entry_points", lambda *, group: given if group == "some.group" else []
    )
    assert find_plug_in("joined", group="some.group", what="loss")("a", "b") == "a/b"
    assert find_plug_in("posixpath:join", group="none.given", what="loss")("a", "b") == "a/b"
    with pytest.raises(
        ConfigError, match=r"loss must be one of x, y, or package.module:Class.*some.group \(joined\), got 'z'"
    ):
        find_plug_in("z", group="some.group", what="loss", built_in=("x", "y"))
    with pytest.raises(ConfigError, match=r"loss must be package.module:Class.*none.given, got 'joined'"):
        find_plug_in("joined", group="none.given", what="loss")
