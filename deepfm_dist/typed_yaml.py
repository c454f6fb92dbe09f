"""YAML that keeps text verbatim: ``0074``, ``1e3``, ``NO`` are ids, not 60, 1000, False.

The meaning of an unquoted scalar depends on its setting. So scalars are kept as text, and
`parse_scalars` converts those whose setting takes no text to numbers, booleans and nulls.
"""

import datetime
import re
import types
from collections.abc import Hashable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import brief
from deepfm_dist.section import Section


class Plain(str):
    """An unquoted scalar."""


class DuplicateKeyError(yaml.YAMLError):
    """A mapping has a duplicate key; YAML would silently keep the last one."""


class _Loader(yaml.SafeLoader):
    # Of YAML's implicit tags, only the merge key << is kept.
    yaml_implicit_resolvers = {  # noqa: RUF012
        "<": yaml.SafeLoader.yaml_implicit_resolvers["<"],
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[Hashable, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise DuplicateKeyError(
                    f"{key.value!r} is in line {lines[key.value]} and again in line {line}; "
                    f"merge the two"
                )
            lines[key.value] = line
        return node


def _construct_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else str(node.value)


for _tag in ("str", "merge"):  # << as a value is text
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_text)


def load(text: str) -> Any:
    """Parses YAML to dicts, lists and strings; unquoted ones are `Plain`.

    Raises:
        yaml.YAMLError: not valid YAML, or a duplicate key.
    """
    return yaml.load(text, _Loader)


def parse_scalars(value: Any, kind: Any) -> Any:
    """Converts plain scalars in a value of `load` to the types that settings take.

    Args:
        value: dicts, lists and scalars.
        kind: the setting's annotation: a section, a built-in type, or a union of them.
    """
    kinds = kinds_of(kind)
    if isinstance(value, Plain):
        return _scalar(value, kinds)
    if isinstance(value, dict):
        return {
            str(key): parse_scalars(below, kind_below(kinds, str(key)))
            for key, below in value.items()
        }
    if isinstance(value, list):
        items = next((get_args(k) for k in kinds if get_origin(k) in (tuple, list)), (Any, ...))
        if len(items) == 1 or items[1:] == (...,):
            return [parse_scalars(item, items[0]) for item in value]
        item_kinds = [*items, *[Any] * len(value)]
        return [
            parse_scalars(item, item_kind)
            for item, item_kind in zip(value, item_kinds, strict=False)
        ]
    return value


def kinds_of(kind: Any) -> list[Any]:
    """The alternatives of an annotation."""
    if get_origin(kind) is Annotated:
        return kinds_of(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [k for alternative in get_args(kind) for k in kinds_of(alternative)]
    return [kind]


def kind_below(kinds: list[Any], key: str) -> Any:
    """The annotation of a key of a section or dict."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind.model_fields[key].annotation if key in kind.model_fields else Any
        if get_origin(kind) is dict:
            return get_args(kind)[1]
    return Any


def _takes_mapping(kind: Any) -> bool:
    is_section = isinstance(kind, type) and issubclass(kind, Section)
    return kind is Any or get_origin(kind) is dict or is_section


def _scalar(text: Plain, kinds: list[Any]) -> Any:
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if text in words:
        return str(text)
    if str in kinds:
        return None if text in ("", "null", "~") and type(None) in kinds else str(text)
    return parse_plain(text)


def parse_plain(text: str) -> Any:
    """Converts a plain scalar to null, a boolean or a number if possible."""
    if re.fullmatch(r"[-+]?0[0-9]+", text):  # octal in YAML 1.1
        return int(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return str(text)
    is_kept = ":" in text or isinstance(value, datetime.date | list | dict)  # 1:30 would be 90
    return str(text) if is_kept else value


def parse_override(override: str, section: type[Section]) -> tuple[str, Any]:
    """Parses ``section.field=value`` to a dotted name and a value like those of `load`.

    Raises:
        ConfigError: it has another form, or the value is not YAML.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r}: overrides look like section.field=value")
    kinds: list[Any] = [section]
    for part in name.split("."):
        kinds = kinds_of(kind_below(kinds, part))
    plain = text.strip()
    if set(kinds) <= {str, type(None)} and plain[:1] not in ("'", '"'):
        return name, Plain(plain)
    is_mapping = ": " in plain or any(map(_takes_mapping, kinds))
    if str in kinds and plain[:1] == "{" and not is_mapping:
        return name, Plain(plain)  # such as {2026-11-01..2026-11-07}.csv
    try:
        return name, load(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{override!r}: {error}") from None
    except yaml.YAMLError as error:
        if str in kinds and text[:1] not in ("[", "{", "'", '"'):
            return name, Plain(text)  # such as %d/%m/%Y, which YAML requires to be quoted
        raise ConfigError(f"{override!r}: the value is not YAML: {yaml_error(error)}") from None


def settings_of(override: str, section: type[Section]) -> list[str]:
    """Dotted names that ``section.field=value`` or ``section={field: value}`` sets."""
    name = override.partition("=")[0]
    value = None if "." in name else parse_override(override, section)[1]
    return [f"{name}.{field}" for field in value] if isinstance(value, dict) else [name]


def value_at(tree: Any, name: str, missing: Any = None) -> Any:
    """The value of a dotted name in nested dicts, or ``missing``."""
    for part in name.split("."):
        tree = tree.get(part, missing) if isinstance(tree, dict) else missing
    return tree


def set_value(tree: dict[str, Any], name: str, value: Any, origin: str) -> None:
    """Sets a dotted name in nested dicts.

    Args:
        tree: changed in place; missing sections are added.
        name: the setting.
        value: its value.
        origin: the origin of the setting, for the message.

    Raises:
        ConfigError: a parent is not a section.
    """
    *parents, last = name.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{origin}: {parent} is not a section")
    tree[last] = value


def yaml_error(error: Exception) -> str:
    """A YAML error on one line."""
    text = brief(error)
    return f"{text}; put the value in quotes" if "cannot start any token" in text else text
