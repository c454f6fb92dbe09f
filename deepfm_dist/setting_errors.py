"""Formats validation errors of settings in terms of YAML, with suggestions."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import nearest, short
from deepfm_dist.section import Section
from deepfm_dist.typed_yaml import kinds_of, settings_of

Problem = Mapping[str, Any]
"""A validation error from pydantic: ``type``, ``loc``, ``msg``, ``input``."""


def describe(error: ValidationError, section: type[Section]) -> dict[str, str]:
    """Describes what is wrong with each setting, with its value, by dotted name.

    The name is empty if settings of several sections contradict each other.

    Args:
        error: the error of validating ``section``.
        section: the outermost section.
    """
    return {
        ".".join(map(str, problem["loc"])): _describe(problem, section)
        for problem in _one_per_setting(error.errors(), section)
    }


def config_error(
    error: ValidationError, section: type[Section], origin: str, overrides: Sequence[str]
) -> ConfigError:
    """A `ConfigError` that names each bad setting and the override that set it.

    Args:
        error: pydantic's.
        section: the whole configuration.
        origin: source of the settings.
        overrides: ``section.field=value`` each, included in the settings.
    """
    problems = describe(error, section)
    if len(problems) == 1:
        [(name, problem)] = problems.items()
        cause = _override_of(name, problem, overrides, section)
        where = "" if name in ("", (cause or "").partition("=")[0]) else f"{name}: "
        return ConfigError(f"{cause or origin}: {where}{problem}")
    lines = [f"{origin}: {len(problems)} problems"]
    for name, problem in problems.items():
        cause = _override_of(name, problem, overrides, section)
        lines.append(f"{name or 'config'}: {problem}" + (f" [{cause}]" if cause else ""))
    return ConfigError("\n  ".join(lines))


def _override_of(
    setting: str, problem: str, overrides: Sequence[str], section: type[Section]
) -> str | None:
    """The last override of a setting or of a part that the problem names.

    If there is none, but exactly one override set parts of it, that one.
    """
    where, setting_parts = f"{setting}.", []
    for override in reversed(overrides if setting else ()):
        names = [f"{name}." for name in settings_of(override, section)]
        parts = [name.removeprefix(where) for name in names if name.startswith(where)]
        named = any(re.search(rf"\b{part.partition('.')[0]}\b", problem) for part in parts if part)
        if named or any(where.startswith(name) for name in names):
            return override
        setting_parts += [override] * bool(parts)
    return setting_parts[0] if len(setting_parts) == 1 else None


def _one_per_setting(problems: Sequence[Problem], section: type[Section]) -> list[Problem]:
    """Merges what pydantic reports for each member of a union.

    Args:
        problems: errors of validating ``section``.
        section: the outermost section.

    Returns:
        One problem for each setting; its ``loc`` has the names and places of settings only.
    """
    merged: dict[tuple[str | int, ...], list[Problem]] = {}
    misspelled = _misspelled(problems, section)
    members: set[tuple[str | int, ...]] = set()  # unions with several problems
    kinds: dict[tuple[str | int, ...], Any] = {}
    for problem in problems:
        path: tuple[str | int, ...] = ()
        kinds[path] = section
        for part, kind in _settings_on(problem["loc"], section):
            if part is None:
                members.add(path)
            else:
                path = (*path, part)
                kinds[path] = kind
        if problem["type"] != "missing" or path not in misspelled:
            merged.setdefault(path, []).append(problem)
    chosen_ones: list[Problem] = []
    for path, group in merged.items():
        deeper = any(other[: len(path)] == path and other != path for other in merged)
        if path in members and deeper:
            continue  # the union member of the value's own type reports a better problem
        # A message of our own check is more helpful than one about another type.
        chosen = next((p for p in group if p["type"] == "value_error"), group[0])
        if len(group) > 1 and chosen["type"] != "value_error":
            message = f"Input should be {_in_words(kinds[path])}"
            chosen = {"type": "union", "msg": message, "input": chosen["input"]}
        chosen_ones.append({**chosen, "loc": path})
    return chosen_ones


def _misspelled(problems: Sequence[Problem], section: type[Section]) -> set[tuple[str | int, ...]]:
    """Guesses the settings that unknown fields were meant to be."""
    unknown = (p["loc"] for p in problems if p["type"] == "extra_forbidden")
    return {
        (*loc[:-1], near)
        for loc in unknown
        if (near := nearest(str(loc[-1]), _fields_at(loc[:-1], section)))
    }


def _settings_on(loc: Sequence[Any], section: Any) -> Iterator[tuple[str | int | None, Any]]:
    """The names and indices in an error's location, and their types; None for a union's member."""
    kind = section
    for part in loc:
        if part == "[key]":
            continue
        inner = _inside(kind, part)
        if inner is None and _is_member(part, kind):
            yield None, kind
            continue
        kind = Any if inner is None else inner
        yield part, kind


def _inside(kind: Any, part: str | int) -> Any:
    """The type of a field, a list's element or a dictionary's value, or None."""
    for member in kinds_of(kind):
        arguments = get_args(member)
        if isinstance(part, int) and get_origin(member) is tuple:
            return arguments[0 if arguments[-1] is Ellipsis else min(part, len(arguments) - 1)]
        if _is_section(member) and part in member.model_fields:
            return member.model_fields[str(part)].annotation
        if get_origin(member) is dict and not (len(kinds_of(kind)) > 1 and _is_member(part, kind)):
            return arguments[1]
    return None


def _is_member(part: str | int, kind: Any) -> bool:
    """Whether a part of pydantic's error location names a member of a union."""
    several = len([m for m in kinds_of(kind) if m is not type(None)]) > 1
    sections = [m.__name__ for m in kinds_of(kind) if isinstance(m, type)]
    return several and isinstance(part, str) and ("[" in part or part in sections)


def _in_words(kind: Any) -> str:
    members = kinds_of(kind)
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    words: list[str] = []
    for member in members:
        origin = get_origin(member)
        if origin is Literal:
            words += [str(value) for value in get_args(member)]
        elif origin is tuple:
            words.append("a list")
        elif origin is dict or _is_section(member):
            words.append("a section of fields")
        elif member is type(None):
            words.append("null")
        elif not (member is int and float in members):
            words.append(names.get(member, "something else"))
    words = list(dict.fromkeys(words))
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def _describe(problem: Problem, section: type[Section]) -> str:
    loc, value = problem["loc"], problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"unknown field; {_what_is_meant(loc, value, section)}"
    if problem["type"] in ("tuple_type", "list_type") and isinstance(value, str | int | float):
        return f"input should be a list: [{value}]"
    key, colon, text = str(loc[-1] if loc else "").partition(":")
    if colon and text and value is None:  # of a dictionary
        return _needs_space(key, text)
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    message = re.sub(r"\btuple\b", "list", message)  # in terms of YAML
    message = re.sub(r"valid dictionary( or instance of \w+)?$", "section of fields", message)
    if problem["type"] in ("missing", "value_error"):
        return message
    return f"{message} (got {short(value, 200)})"


def _needs_space(key: str, text: str) -> str:
    """Corrects YAML's ``{a:1}``, whose key is ``a:1``."""
    return f"YAML needs a space after the colon: write {key}: {text}"


def _what_is_meant(loc: tuple[str | int, ...], value: Any, section: type[Section]) -> str:
    """A hint for an unknown field: YAML's ``{a:1}``, a misspelling, a field of another section."""
    name, fields = str(loc[-1]), _fields_at(loc[:-1], section)
    key, colon, text = name.partition(":")
    if colon and value is None and key in fields:
        return _needs_space(key, text)
    if near := nearest(name, fields):
        return f"did you mean {'.'.join([*map(str, loc[:-1]), near])}?"
    elsewhere = [
        f"{outer}.{name}" for outer in section.model_fields if name in _fields_at([outer], section)
    ]
    if len(loc) == 1 and elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"available: {', '.join(fields)}"


def _fields_at(loc: Sequence[str | int], section: type[Section]) -> list[str]:
    kind: Any = section
    for part in loc:
        kind = _inside(kind, part)
    sections = [member for member in kinds_of(kind) if _is_section(member)]
    return [name for member in sections for name in member.model_fields]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
