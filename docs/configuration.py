"""Writes configuration.md from the docstrings of the settings.

python docs/configuration.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deepfm_dist.config import Config
from deepfm_dist.section import Section

TARGET = Path(__file__).with_suffix(".md")
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
HEAD = """\
# Configuration

Every setting, its default and what it does. This page is made from the code by
`python docs/configuration.py`; a test keeps the two together.

A YAML file gives the settings of a run, and `section.field=value` on the command line overrides it;
the value is YAML as well. An unknown name is refused with the nearest known one.
What is `auto` is [chosen from the data](training.md#chosen-from-the-data). What is resolved
from both is printed by `--print-config` and kept in `runs/<name>/config.yaml`; the option
`--run runs/<name>` reads it from there. Under torchrun, write `--config runs/<name>` instead:
torchrun has options `--run-path` and `--run_path`, and stops at `--run` with `ambiguous option`.

```sh
python -m deepfm_dist.train --config sample --print-config model.embedding_dim=32
```
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"\n{part}" for part in _sections(Config, ""))


def _sections(section: type[Section], path: str) -> Iterator[str]:
    """A section's table, then those of the sections inside it."""
    inner: list[tuple[str, type[Section]]] = []
    lines = []
    for name, field in section.model_fields.items():
        below, suffix = _section_in(field.annotation)
        dotted = f"{path}.{name}".lstrip(".")
        if below is not None:
            inner.append((dotted + suffix, below))
        if below is None or suffix or field.is_required():
            lines.append(_line(name, field, below, dotted + suffix, name in section.chosen))
    if lines and path:
        # A list in a list is described once, at its first occurrence.
        text = " ".join((section.__doc__ or "").split()).partition(" Attributes:")[0]
        heading = f"{'#' * min(path.count('.') + 2, 4)} `{path}`\n\n{text}\n"
        yield "\n".join([heading, "| field | value | default | |", "|---|---|---|---|", *lines, ""])
    for dotted, below in inner:
        yield from _sections(below, dotted)


def _line(
    name: str, field: FieldInfo, below: type[Section] | None, dotted: str, is_auto: bool
) -> str:
    text = _escaped(" ".join((field.description or "").split()).replace("``", "`"))
    if below is not None:
        text += f" Each as under `{dotted}`."
    default = "`auto`" if is_auto else _default(field)
    return f"| `{name}` | {_escaped(_kind(field))} | {default} | {text} |"


def _section_in(annotation: Any) -> tuple[type[Section] | None, str]:
    """The section that a field holds, and how many: one, a list (``[]``) or a map (``.NAME``)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    suffix = {tuple: "[]", dict: ".NAME"}.get(get_origin(annotation) or object, "")
    for argument in get_args(annotation):
        found, below = _section_in(argument)
        if found is not None:
            return found, suffix or below
    return None, ""


def _kind(field: FieldInfo) -> str:
    limits = [
        f"{words} {getattr(limit, name):,}"
        for limit in field.metadata
        for name, words in LIMITS.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        several = len(arguments) > 1 and arguments[1] is Ellipsis
        return f"list of {_type(arguments[0])}" if several else f"{len(arguments)} numbers"
    if origin is dict:
        return f"map to {_type(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if arguments:  # a union
        found = [_type(a) for a in arguments if a is not type(None)]
        return " or ".join(dict.fromkeys(found))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "any")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Section):
        return ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page())
    print(f"written: {TARGET}")
    sys.exit(0)
