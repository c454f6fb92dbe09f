"""The base of every configuration section, and what its validation errors are about."""

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings; an unknown field is an error, a field's docstring its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Problem = Mapping[str, Any]
"""A validation error as pydantic has it: ``type``, ``loc``, ``msg``, ``input``."""


def one_per_setting(problems: Sequence[Problem], section: type[Section]) -> list[Problem]:
    """Merges what pydantic reports for each member of a union.

    Args:
        problems: errors of validating ``section``.
        section: the outermost section.

    Returns:
        One problem for each setting; its ``loc`` has the names and places of settings only.
    """
    merged: dict[tuple[str | int, ...], list[Problem]] = {}
    members: set[tuple[str | int, ...]] = set()  # settings whose union has members at odds
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
        merged.setdefault(path, []).append(problem)
    found: list[Problem] = []
    for path, group in merged.items():
        deeper = any(other[: len(path)] == path and other != path for other in merged)
        if path in members and deeper:
            continue  # the member that the value is of has a problem of its own
        # What a check of ours says is more than that the value is of no other type either.
        chosen = next((p for p in group if p["type"] == "value_error"), group[0])
        if len(group) > 1 and chosen["type"] != "value_error":
            message = f"Input should be {_in_words(kinds[path])}"
            chosen = {"type": "union", "msg": message, "input": chosen["input"]}
        found.append({**chosen, "loc": path})
    return found


def _settings_on(loc: Sequence[Any], section: Any) -> Iterator[tuple[str | int | None, Any]]:
    """The names and places in an error's location, and their types; None for a union's member."""
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


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [inner for member in get_args(kind) for inner in _members(member)]
    return [kind]


def _inside(kind: Any, part: str | int) -> Any:
    """The type of a field, a list's element or a dictionary's value; None: there is none."""
    for member in _members(kind):
        arguments = get_args(member)
        if isinstance(part, int) and get_origin(member) is tuple:
            return arguments[0 if arguments[-1] is Ellipsis else min(part, len(arguments) - 1)]
        if isinstance(member, type) and issubclass(member, Section) and part in member.model_fields:
            return member.model_fields[str(part)].annotation
        if get_origin(member) is dict and not (len(_members(kind)) > 1 and _is_member(part, kind)):
            return arguments[1]
    return None


def _is_member(part: str | int, kind: Any) -> bool:
    """Whether a part of an error's location names a member of a union, as pydantic writes it."""
    several = len([m for m in _members(kind) if m is not type(None)]) > 1
    sections = [m.__name__ for m in _members(kind) if isinstance(m, type)]
    return several and isinstance(part, str) and ("[" in part or part in sections)


def _in_words(kind: Any) -> str:
    members = _members(kind)
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    words: list[str] = []
    for member in members:
        origin = get_origin(member)
        if origin is Literal:
            words += [str(value) for value in get_args(member)]
        elif origin is tuple:
            words.append("a list")
        elif origin is dict or (isinstance(member, type) and issubclass(member, Section)):
            words.append("a section of fields")
        elif member is type(None):
            words.append("null")
        elif not (member is int and float in members):
            words.append(names.get(member, "something else"))
    words = list(dict.fromkeys(words))
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])
