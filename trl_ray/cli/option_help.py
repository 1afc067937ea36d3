"""What `trl-ray PIPELINE --help` prints: every option with its type, its default and a sentence.

configuration class --fields, by the section that declares them--> one page
"""

from __future__ import annotations

import enum
import json
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trl_ray.cli.option_sentences import SENTENCES

_WIDTH = 100


def describe_options(command: str, config_class: type[BaseModel], *, what: str) -> str:
    """The whole page.

    Args:
        command: the pipeline's name.
        config_class: its configuration.
        what: the pipeline does, in a sentence.
    """
    lines = [
        f"usage: trl-ray {command} [--config FILE] [--dry-run] [--OPTION VALUE | OPTION=VALUE ...]",
        "",
        what,
        "",
        "  --config FILE  YAML file with options; those on the command line come after it",
        "  --dry-run      print the resolved plan and start nothing",
        "",
        "Lists are written as --OPTION A B, switches as --OPTION or --no_OPTION, sections as section.OPTION.",
    ]
    for title, group in _groups(config_class):
        lines += ["", title]
        for path, field, sentence in group:
            lines.append(f"  {path}: {type_of(field.annotation)} (default {_default(field)})")
            lines += textwrap.wrap(sentence, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def options_of(
    config_class: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[str, type[BaseModel], FieldInfo, str]]:
    """Every option, those of sections too: its dotted name, who declares it, its field, and its sentence."""
    for name, field in config_class.model_fields.items():
        path, section = f"{prefix}{name}", _section(field.annotation)
        if section is None:
            yield path, _owner(config_class, name), field, sentence_of(path, config_class)
        else:
            yield from options_of(section, f"{path}.")


def sentence_of(path: str, config_class: type[BaseModel]) -> str:
    """What an option does: of its own, of the class that it overrides, or of the values that it may have."""
    name = path.rpartition(".")[2]
    for each in config_class.__mro__:
        field = getattr(each, "model_fields", {}).get(name)
        if field is not None and field.description:
            return _plain(field.description)
    found = SENTENCES.get(path) or next((text for key, text in SENTENCES.items() if key.endswith(f".{path}")), None)
    if found is not None:
        return found
    choices = _choices(config_class.model_fields[name].annotation)
    return _plain(choices.__doc__ or "") if choices is not None else ""


def type_of(annotation: Any) -> str:
    """A type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("nothing" if each is type(None) else type_of(each) for each in args))
    if origin is Literal:
        return ", ".join(str(each) for each in args)
    if origin in (list, tuple):
        return f"list of {type_of(next(each for each in args if each is not Ellipsis))}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(str(each.value) for each in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    words = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping", object: "anything"}
    return words.get(origin or annotation, str(annotation))


def _groups(config_class: type[BaseModel]) -> list[tuple[str, list[tuple[str, FieldInfo, str]]]]:
    groups: dict[str, list[tuple[str, FieldInfo, str]]] = {}
    for path, owner, field, sentence in options_of(config_class):
        title = _plain((owner.__doc__ or owner.__name__).partition("\n\n")[0])
        section = path.rpartition(".")[0]
        groups.setdefault(f"{section}: {title}" if section else title, []).append((path, field, sentence))
    return list(groups.items())


def _owner(config_class: type[BaseModel], name: str) -> type[BaseModel]:
    """The class that declared it first, which is the section it belongs to."""
    owners = [each for each in config_class.__mro__ if name in vars(each).get("__annotations__", {})]
    return owners[-1]


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _choices(annotation: Any) -> type[enum.Enum] | None:
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return annotation
    return next((found for each in get_args(annotation) if (found := _choices(each)) is not None), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return json.dumps(field.get_default(call_default_factory=True), default=str)


def _plain(text: str) -> str:
    """One paragraph without markup."""
    return " ".join(text.replace("``", "").replace("`", "").split())
