"""File names by day: ranges such as ``clicks/{2026-11-01..2026-11-07}.csv``."""

import re
from collections.abc import Iterator
from datetime import date, timedelta

from deepfm_dist.errors import ConfigError

_RANGE = re.compile(r"\{(\d{4}-?\d\d-?\d\d)\.\.(\d{4}-?\d\d-?\d\d)\}")
_DAY = re.compile(r"\{day(?:-(\d+))?(?:\.\.day(?:-(\d+))?)?(?::([^{}]+))?\}")
_MOST_DAYS = 3660


def each_day(name: str) -> list[str]:
    """Expands a range of days to names, in order; other names are returned unchanged.

    Raises:
        ConfigError: the range is empty or not of days.
    """
    match = _RANGE.search(name)
    if match is None:
        return [name]
    form = "%Y-%m-%d" if "-" in match[1] else "%Y%m%d"
    try:
        first, last = (date.fromisoformat(text) for text in match.groups())
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; write days like {{2026-11-01..2026-11-07}}") from None
    if not 0 <= (last - first).days < _MOST_DAYS:
        raise ConfigError(
            f"{name}: a range runs from its first to its last day, over {_MOST_DAYS:,} days at "
            f"most; write days like {{2026-11-01..2026-11-07}}"
        )
    return [
        before
        for day in _days(first, last)
        for before in each_day(name.replace(match[0], f"{day:{form}}", 1))
    ]


def names_day(name: str) -> bool:
    """Whether a name has a placeholder: ``{day}``, ``{day-1}``, ``{day-6..day}``."""
    return _DAY.search(name) is not None


def on_day(name: str, day: date) -> list[tuple[str, date]]:
    """Fills in the placeholders of a name.

    Args:
        name: may have ``{day}``, ``{day-1}`` for the day before, ``{day-6..day}`` for seven days,
            each with a format of `strftime` after a colon: ``{day:%Y%m%d}``.
        day: the day.

    Returns:
        The names, each with the first day filled in, or ``day`` without a placeholder.
    """
    match = _DAY.search(name)
    if match is None:
        return [(name, day)]
    first, is_range = day - timedelta(int(match[1] or 0)), ".." in match[0].partition(":")[0]
    last = day - timedelta(int(match[2] or 0)) if is_range else first
    return [
        (rest, one)
        for one in _days(first, last)
        for rest, _ in on_day(name.replace(match[0], f"{one:{match[3] or '%Y-%m-%d'}}", 1), day)
    ]


def _days(first: date, last: date) -> Iterator[date]:
    return (first + timedelta(n) for n in range((last - first).days + 1))
