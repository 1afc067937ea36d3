"""No code of the package runs data: calls that could are named in a reviewed list, each with the reason (S01).

every trl_ray/**/*.py --ast--> calls that run or unpickle what they are given --minus ALLOWED--> none
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PICKLES = frozenset({"pickle", "cloudpickle", "dill", "marshal", "joblib", "shelve", "cPickle", "_pickle"})
ANY_NAME = frozenset({"eval", "exec", "compile", "__import__"})
SYMBOLIC = frozenset({"sympify", "parse_expr", "parse_latex", "lambdify", "parse_mathematica"})
"""Of sympy: they run Python that they make of text."""

# File, call: why it may stand there. Nothing that a dataset, a model or the network gives may get to one of these.
ALLOWED = {
    ("rewards/reward_registry.py", "cloudpickle.loads"): "a reward function that the user's own program passed",
    ("runtime/cluster.py", "pickle.loads"): "an actor's handle, made by this run's driver; Ray itself pickles",
    ("config/load.py", "yaml.load"): "with a loader derived from SafeLoader",
}


def name_of(node: ast.expr) -> str:
    """`a.b.c` of a call's function, "" where it is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = name_of(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def is_true(node: ast.expr | None) -> bool:
    """Whether a keyword is given and is not plainly False."""
    return node is not None and not (isinstance(node, ast.Constant) and not node.value)


def is_forbidden(call: ast.Call) -> bool:
    name = name_of(call.func)
    module, _, last = name.rpartition(".")
    top = module.partition(".")[0]
    weights_only = keyword(call, "weights_only")
    return (
        name in ANY_NAME
        or (top == "builtins" and last in ANY_NAME)
        or (top in PICKLES and last in {"load", "loads", "Unpickler", "open"})
        or (top == "yaml" and last in {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all"})
        or (name == "torch.load" and not (isinstance(weights_only, ast.Constant) and weights_only.value is True))
        or is_true(keyword(call, "allow_pickle"))
        or is_true(keyword(call, "shell"))
        or name in {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
        or last in SYMBOLIC
        or name in SYMBOLIC
        or (name == "ray.get" and keyword(call, "timeout") is None)
    )


def imported(tree: ast.Module) -> Iterator[str]:
    """Names by which a forbidden call could come under another name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            top = node.module.partition(".")[0]
            for alias in node.names:
                if (top in PICKLES and alias.name in {"load", "loads", "Unpickler"}) or alias.name in SYMBOLIC:
                    yield f"{node.module}.{alias.name}"
                if top == "yaml" and alias.name.endswith(("load", "load_all")) and not alias.name.startswith("safe"):
                    yield f"{node.module}.{alias.name}"
        if isinstance(node, ast.Import):
            yield from (
                f"{alias.name} as {alias.asname}"
                for alias in node.names
                if alias.asname and alias.name.partition(".")[0] in PICKLES | {"builtins", "yaml"}
            )


def breaches(source: str, file: str) -> list[str]:
    tree = ast.parse(source)
    found = [
        (name_of(node.func), node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and is_forbidden(node) and (file, name_of(node.func)) not in ALLOWED
    ]
    return [f"{file}:{line} calls {name}" for name, line in found] + [f"{file} imports {n}" for n in imported(tree)]


def files() -> list[Path]:
    return sorted((ROOT / "trl_ray").rglob("*.py"))


def test_nothing_in_the_package_runs_or_unpickles_data() -> None:
    found = [
        breach
        for path in files()
        for breach in breaches(path.read_text(encoding="utf-8"), path.relative_to(ROOT / "trl_ray").as_posix())
    ]
    assert found == []


def test_every_exception_is_still_needed() -> None:
    for file, call in ALLOWED:
        tree = ast.parse((ROOT / "trl_ray" / file).read_text(encoding="utf-8"))
        assert call in {name_of(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}, (file, call)


def test_the_loader_of_yaml_is_a_safe_one() -> None:
    import yaml

    from trl_ray.config import load

    assert issubclass(load._Loader, yaml.SafeLoader)
    for text in ("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!!python/object/new:list [[1]]"):
        with pytest.raises(Exception, match="must be YAML"):
            load.parse_yaml(text, source="x.yaml")


@pytest.mark.parametrize(
    "source",
    [
        *("eval(x)", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "builtins.eval(x)"),
        *("pickle.load(f)", "pickle.loads(b)", "pickle.Unpickler(f)", "cloudpickle.loads(b)", "dill.loads(b)"),
        *("marshal.loads(b)", "joblib.load(f)", "shelve.open(f)", "yaml.load(t)", "yaml.unsafe_load(t)"),
        *("yaml.full_load(t)", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)"),
        *("torch.load(f, weights_only=flag)", "numpy.load(f, allow_pickle=flag)", "subprocess.run(c, shell=True)"),
        *("subprocess.run(c, shell=flag)", "os.system(c)", "os.popen(c)", "sympy.sympify(t)", "parse_expr(t)"),
        *("sympy.parsing.sympy_parser.parse_expr(t)", "ray.get(ref)", "from pickle import loads"),
        *("import pickle as p", "from sympy import sympify", "from yaml import unsafe_load", "import builtins as b"),
    ],
)
def test_each_of_them_would_be_seen(source: str) -> None:
    assert breaches(source, "some/file.py")


@pytest.mark.parametrize(
    "source",
    [
        *("re.compile(x)", "model.eval()", "torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)"),
        *("yaml.safe_load(t)", "pickle.dumps(x)", "ray.get(ref, timeout=3)", "subprocess.run(c, shell=False)"),
        *("json.loads(t)", "ast.literal_eval(t)", "from yaml import safe_load"),
    ],
)
def test_what_runs_nothing_is_let_through(source: str) -> None:
    assert breaches(source, "some/file.py") == []
