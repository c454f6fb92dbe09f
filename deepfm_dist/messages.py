"""Building blocks of messages: one-line errors, short values, plurals, suggestions."""

import difflib
import re
from collections.abc import Iterable, Sequence


def brief(error: object) -> str:
    """An error, or its text, on one line of at most 300 characters; never empty."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
    text = re.sub(r"^.*Detail: \[errno \d+\] ", "", text)  # Arrow's prefix
    return text or type(error).__name__


def error_line(error: Exception) -> str:
    """An error with its type, on one line: ``ValueError: bad shape``."""
    return brief(f"{type(error).__name__}: {error}")


def short(value: object, length: int = 120) -> str:
    """The repr of a value, cut to at most ``length`` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun: 1 row, 2,000 rows.

    Args:
        count: how many.
        noun: the singular.
        nouns: the plural; default: with an s.
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def listed(names: Sequence[object], most: int = 12) -> str:
    """Names in a row: the first ``most``, and how many more there are."""
    more = [f"{len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*map(str, names[:most]), *more])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelled one is closest to, if any is close."""
    names = list(known)
    alike = [other for other in names if other.strip().casefold() == name.strip().casefold()]
    return next(iter([*alike, *difflib.get_close_matches(name, names, n=1)]), None)


def format_bytes(n_bytes: float) -> str:
    """A size with its unit: 12.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} TiB"
