"""YAML files and dotted overrides become one typed configuration.

file.yaml --parse (no duplicate keys, 1e-5 is a number)--> dict --place, a.b=c--> dict --pydantic--> Section
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trl_ray.config.base import Section
from trl_ray.config.object_paths import place
from trl_ray.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)
_MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-5 as the number it looks like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice; remove one.")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        if not isinstance(text, str) or _SURROGATE.search(text) is None:
            return text
        try:
            # JSON writes what is beyond 16 bits as two halves.
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: a text must hold whole characters, got {text!a}, which has half a "
                "surrogate pair. Write the character itself."
            ) from None


class _Dumper(yaml.SafeDumper):
    """Safe YAML that the loader above reads as it was, whatever stands in a text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Within single quotes some line breaks of Unicode are folded away; within double ones they are escaped.
        is_plain = all(each.isprintable() or each in "\n\t" for each in text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_SURROGATE = re.compile("[\ud800-\udfff]")
_Dumper.add_representer(str, _Dumper.represent_text)
for _each in (_Loader, _Dumper):
    # YAML 1.1 wants a dot in floats ("1.0e-5"); people write 1e-5. So a text that looks like this is quoted.
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?)$"
        ),
        list("-+0123456789."),
    )


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigError: the text is not YAML, or a key stands twice.
    """
    try:
        # _Loader derives from SafeLoader: no tag can build a Python object.
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}, {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{source} must be YAML: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: the file is missing, a folder, too large, not UTF-8, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ConfigError(f"--config must name a YAML file, but {path} is {what}.")
    raw = path.read_bytes()
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path} must be at most {_MAX_BYTES} bytes, but has {len(raw)}. Is it the right file?")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8 text: {error}") from None
    values = parse_yaml(text, source=str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, but holds a {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=c`` overrides, later ones winning; values are YAML (``x=null``, ``x=[1, 2]``).

    Raises:
        ConfigError: an override has no ``=``, an empty key, or descends into something that is not a mapping.
    """
    merged: dict[str, Any] = _deep_copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, last = path.lstrip("-").split(".")
        if not equals or not last or "" in parents:
            raise ConfigError(f"an override must read key=value or section.key=value, got {override!r}.")
        node = merged
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{override!r}: {parent} holds {child!r}, not a section, so it has no key {last!r}.")
            node = child
        node[last] = parse_yaml(text, source=f"override {override!r}")
    return merged


def read_options_of(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file, find the files that it names beside it, apply overrides.

    Raises:
        ConfigError: the file or an override is wrong, or the file of an object that no override replaces is not there.
    """
    replaced = {override.partition("=")[0].lstrip("-") for override in overrides}
    written = {name: value for name, value in read_yaml(path).items() if name not in replaced}
    return apply_overrides(place(written, Path(path).parent), overrides)


def build(section: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """Validate a mapping.

    Raises:
        ConfigError: unknown key (the nearest is named), wrong type, value not allowed, or a contradiction.
    """
    return section(**{str(key): value for key, value in values.items()})


def load_config(section: type[SectionT], path: str | Path, overrides: Sequence[str] = ()) -> SectionT:
    """Read a YAML file, find the files that it names beside it, apply overrides, validate.

    Raises:
        ConfigError: anything that is wrong with the file, an override or a value.
    """
    return build(section, read_options_of(path, overrides))


def dump_yaml(config: Section) -> str:
    """The resolved configuration as YAML that loads again to an equal configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _deep_copy(value: Any) -> Any:
    return {key: _deep_copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value
