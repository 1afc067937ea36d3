"""Reads answers as arithmetic where the scorers of reasoning_gym would run them as Python.

    answer -- eval in a scorer's module ------------> `evaluate`: literals and arithmetic, nothing is called
    answer -- sympy's parse_expr --> Python text --> `_check_calls`: mathematics only --> sympy evaluates it

What is refused raises ValueError, as a malformed answer does: the scorers take it for a wrong one. This is the inner of
two walls; the outer one is the process in which scorers run (sandbox_child.py).
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

_MAX_CHARACTERS = 20_000
"""Of an answer that is evaluated; Python's own parser needs minutes and gigabytes for much longer ones."""
_MAX_DEPTH = 60
"""Of parentheses and brackets: deeper ones overflow the C stack of parsers."""
_MAX_BITS = 2**20
"""Of a whole number in an answer."""
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.Pow: operator.pow,
}
# What sympy wraps names and numbers in: the only calls that take text.
_OF_TEXT = frozenset({"Symbol", "Integer", "Float", "Rational", "Function"})
_OPERATIONS = frozenset(
    {
        *("Add", "Mul", "Pow", "Mod", "sqrt", "cbrt", "root", "real_root", "abs", "pow", "round", "Derivative"),
        *("Integral", "expand", "factor", "simplify", "together", "apart", "cancel", "diff", "integrate", "limit"),
    }
)
_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Tuple, ast.Call, ast.UnaryOp, ast.unaryop, ast.BinOp),
    *(ast.operator, ast.Compare, ast.cmpop),
)


def evaluate(text: str, *_scopes: object) -> Any:
    """The value of literals, lists and arithmetic, as `eval` would find it.

    Raises:
        ValueError: anything else: names, calls, attributes, subscripts, comprehensions, numbers of over a million bits.
        SyntaxError: not an expression.
    """
    _check_shape(text)
    return _value(ast.parse(text.strip(), mode="eval").body)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Set(elts=items):
            return {_value(item) for item in items}
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _value(left), _value(right))
    raise ValueError(f"an answer must consist of literals and arithmetic, got {type(node).__name__}")


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    numbers = isinstance(left, (int, float, complex)) and isinstance(right, (int, float, complex))
    if not numbers and not (isinstance(op, ast.Add) and type(left) is type(right)):
        raise ValueError("arithmetic in an answer must be of numbers")
    if isinstance(left, int) and isinstance(right, int) and right > 0:
        grows = {ast.Pow: left.bit_length() * right, ast.LShift: left.bit_length() + right}.get(type(op), 0)
        if grows > _MAX_BITS:
            raise ValueError(f"a number in an answer must have at most {_MAX_BITS} bits, this one has about {grows}")
    return _BINARY[type(op)](left, right)


def _check_shape(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"an answer must be text, got {type(text).__name__}")
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"an answer must have at most {_MAX_CHARACTERS} characters, this one has {len(text)}")
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > _MAX_DEPTH:
            raise ValueError(f"an answer's brackets must be at most {_MAX_DEPTH} deep")


def guard_sympy() -> None:
    """Have sympy's `parse_expr`, and `sympify` of text, refuse what is not mathematics. May be called twice."""
    from sympy.parsing import sympy_parser

    original = sympy_parser.stringify_expr
    if getattr(original, "is_guarded", False):
        return

    @functools.wraps(original)
    def stringify_expr(
        s: str, local_dict: dict[str, Any], global_dict: dict[str, Any], transformations: tuple[Any, ...]
    ) -> str:
        _check_shape(s)
        code: str = original(s, local_dict, global_dict, transformations)
        _check_calls(code, local_dict)
        return code

    stringify_expr.is_guarded = True  # type: ignore[attr-defined]
    sympy_parser.stringify_expr = stringify_expr


def guard_modules(package: str) -> None:
    """Have `eval` mean `evaluate` in the modules of a package that are loaded. May be called twice."""
    for name, module in list(sys.modules.items()):
        if (name == package or name.startswith(f"{package}.")) and isinstance(module, ModuleType):
            vars(module)["eval"] = evaluate


def _check_calls(code: str, local: Collection[str]) -> None:
    """See that the Python that sympy is about to evaluate calls mathematical functions only."""
    tree = ast.parse(code.strip(), mode="eval")
    texts_allowed: set[ast.expr] = set()
    for node in ast.walk(tree):  # a call comes before its arguments
        if not isinstance(node, _NODES):
            raise ValueError(f"an answer must be mathematics, got {type(node).__name__}")
        if isinstance(node, ast.Call):
            if node.keywords:
                raise ValueError("an answer must be mathematics, got a keyword argument")
            if isinstance(node.func, ast.Name) and node.func.id in _OF_TEXT:
                texts_allowed |= set(node.args)
            elif isinstance(node.func, ast.Call) and not _is_function(node.func):
                raise ValueError("an answer must be mathematics, got a call of a call")
        elif isinstance(node, ast.Name):
            if node.id not in local and node.id not in _known_names():
                raise ValueError(f"an answer must be mathematics, got {node.id!r}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and node not in texts_allowed:
            raise ValueError("an answer must be mathematics, got text")


def _is_function(call: ast.Call) -> bool:
    """Whether it is ``Function('f')``, of which the unknown function f is made."""
    return isinstance(call.func, ast.Name) and call.func.id == "Function"


@functools.cache
def _known_names() -> frozenset[str]:
    """Constants and functions of mathematics, as sympy calls them."""
    import sympy

    found = {name for name, value in inspect.getmembers(sympy) if _is_mathematics(value)}
    return frozenset({*found, *_OPERATIONS, *_OF_TEXT, "max", "min"})


def _is_mathematics(value: object) -> bool:
    import sympy
    from sympy.core.function import FunctionClass

    return isinstance(value, (FunctionClass, sympy.Basic)) and value is not sympy.Lambda
