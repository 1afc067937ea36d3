import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "examples" / "fetch_smollm2.py"


@pytest.fixture
def fetch():
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(fetch, monkeypatch, target):
    monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py", str(target)])
    fetch.main()


def test_a_finished_model_is_left_alone_and_an_unfinished_folder_is_refused(fetch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fetch, "build", lambda target: pytest.fail("must not build"))
    (tmp_path / fetch.LAST_FILE).write_text("{}")
    run(fetch, monkeypatch, tmp_path)
    assert "is there already" in capsys.readouterr().out
    (tmp_path / fetch.LAST_FILE).unlink()
    with pytest.raises(SystemExit, match="holds no finished model"):
        run(fetch, monkeypatch, tmp_path)


def test_a_build_that_fails_leaves_nothing_behind(fetch, monkeypatch, tmp_path):
    def fail(gguf):
        raise OSError("disk full")

    monkeypatch.setattr(fetch, "install_missing", lambda: None)
    monkeypatch.setattr(fetch, "find_gguf", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(fetch, "load_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        fetch.build(tmp_path / "models" / "m")
    assert list((tmp_path / "models").iterdir()) == []
