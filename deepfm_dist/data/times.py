"""Parses times exactly, and detects a column's unit and notation.

A time is an integer and billionths: seconds since 1970 and nanoseconds for a date or timestamp, the
number itself for a number. Preparation then chooses one unit for all rows of a dataset, the
coarsest that represents all times exactly.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from functools import partial
from itertools import islice
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural

TIME = pa.struct(
    [
        ("whole", pa.int64()),
        ("billionths", pa.int32()),
        ("dated", pa.bool_()),
        ("zone", pa.int8()),
        ("contested", pa.bool_()),
    ]
)
"""Arrow type of a parsed time: ``whole + billionths * 1e-9``, ``billionths`` in ``[0, 10**9)``;
dated: in seconds since 1970, UTC, else a number without a unit; zone: `_UNZONED`, `_LOCAL` or
`_ZONED`; contested: a later format reads another time in `USUAL` from the cell.
"""
_UNZONED, _LOCAL, _ZONED = range(3)
"""Kinds of time zone: a number has none; a date or timestamp without one is UTC; one with a
zone.
"""
ISO = "iso"
"""The format ISO 8601."""
EPOCH_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Units of numbers that count from 1970, with their number per second."""

BILLION = 10**9
_INT64 = np.iinfo(np.int64)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CALENDAR = (-62135596800, 253402300800)
"""Seconds since 1970 of the years 1 to 9999; milliseconds misread as seconds are outside."""
_DIRECTIVES = frozenset("aAbBdfHIjmMpSyYzZ")
_ALIASES = {"%T": "%H:%M:%S", "%D": "%m/%d/%y", "%F": "%Y-%m-%d", "%R": "%H:%M", "%e": "%d"}
_ZONE = r"(:\d\d(?:[.,]\d+)?)\s*(?:Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)$"
_NAMED_ZONE = re.compile(r"\s*(?:UTC|GMT|utc|Z|z)$")
_FRACTION = re.compile(r"^(.*:\d\d(?::\d\d)?|\S*T\d{6})[.,](\d+)(.*)$")

# Numbers that are most likely dates between 1990 and 2100 in some notation: (name, min, max).
_ERAS = (
    ("a date such as 20200131", 19900101, 21001231),
    ("seconds since 1970", 631152000, 4133980799),
    ("a date such as 202001311200", 199001010000, 210012312359),
    ("milliseconds since 1970", 631152000 * 10**3, 4133980799 * 10**3),
    ("a date such as 20200131120000", 19900101000000, 21001231235959),
    ("microseconds since 1970", 631152000 * 10**6, 4133980799 * 10**6),
    ("nanoseconds since 1970", 631152000 * 10**9, 4133980799 * 10**9),
)
_ERA_FORMATS = ("%Y%m%d", "s", "%Y%m%d%H%M", "ms", "%Y%m%d%H%M%S", "us", "ns")
USUAL = (631152000, 4133980799)
"""Seconds since 1970 of the years 1990 to 2100, the range of nearly all logs."""
_BOUNDS = np.array([b for _, low, high in _ERAS for b in (low, high + 1)], np.int64)

_DATES = (
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y"),
    *("%m-%d-%Y", "%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%d-%b-%y", "%b %d, %Y", "%B %d, %Y"),
    *("%b %d %Y", "%B %d %Y", "%d/%m/%y", "%m/%d/%y", "%m %d, %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", " %H:%M:%S %z")
_COMPACT = ("%Y%m%d", "%Y%m%d%H%M%S", "%Y%m%d%H%M", "%y%m%d%H", "%Y%m", "%Y")
_GUESSES = (
    *(date + comma + clock for date in _DATES for clock in _CLOCKS for comma in ("", ",")),
    "%a %b %d %H:%M:%S %z %Y",
    "%a %b %d %H:%M:%S %Y",
    "%a, %d %b %Y %H:%M:%S %z",
    "%a, %d %b %Y %H:%M:%S %Z",
    "%d/%b/%Y:%H:%M:%S %z",
    *_COMPACT,
)


def check_format(text: str) -> str:
    """Validates and returns a time format: strptime codes, `ISO`, or one of `EPOCH_UNITS`.

    Raises:
        ValueError: it is not a time format.
    """
    if text in (ISO, *EPOCH_UNITS):
        return text
    codes = [c for c in re.findall(r"%(.?)", _plain_codes(text)) if c != "%"]
    if wrong := [code for code in codes if code not in _DIRECTIVES]:
        raise ValueError(f"{text!r}: unknown code %{wrong[0]}; see Python's strptime")
    if fault := _fault(codes):
        raise ValueError(f"{text!r}: {fault}")
    if not codes:
        raise ValueError(
            f"{text!r} is not a time format; use strptime's codes, such as %d/%m/%Y %H:%M, iso, or "
            f"the unit of numbers that count from 1970: {', '.join(EPOCH_UNITS)}"
        )
    return text


def _fault(codes: Sequence[str]) -> str | None:
    """Why a format would misread times; None if it would not."""
    twice = next((code for code in codes if codes.count(code) > 1), None)
    if twice is not None:
        also = "; %m is the month, %M the minute" if twice in "mM" else ""
        return f"it has %{twice} twice{also}"
    if "p" in codes and "I" not in codes:
        return "%p, AM or PM, counts with %I alone; write %I for the hour" + (
            " instead of %H" if "H" in codes else ""
        )
    if "I" in codes and "p" not in codes:
        return "%I is an hour of AM or PM, which %p reads; add %p, or write %H"
    if "d" in codes and not set("mbBj") & set(codes):
        return "it has a day and no month" + ("; %M is the minute, %m the month" * ("M" in codes))
    return None


def guess_formats(*texts: str) -> list[str]:
    """Formats that all of these cells match, at most two, most likely first."""

    def fits(guess: str) -> bool:
        try:
            moments = [datetime.strptime(text.strip(), guess) for text in texts]
        except ValueError:
            return False
        # Without separators, Python parses 1991 as January 1 of 199.
        return guess not in _COMPACT or all(
            moment.strftime(guess) == text.strip()
            for moment, text in zip(moments, texts, strict=True)
        )

    units = {10: "s", 13: "ms", 16: "us", 19: "ns"}
    if texts and all(text.isdigit() and len(text) == len(texts[0]) in units for text in texts):
        return [units[len(texts[0])]]
    return list(islice(filter(fits, _GUESSES), 2))


def cure_for(cells: Sequence[str], setting: str, others: Sequence[str] = ()) -> str | None:
    """The setting that makes unreadable cells readable; None if no format fits.

    Args:
        cells: examples that cannot be read.
        setting: name of the format setting.
        others: formats of the column's other cells, to keep.
    """
    guesses = guess_formats(*cells) or guess_formats(cells[0])
    if not guesses:
        return None
    shown = [f'"{guess}"' for guess in guesses]
    if others:
        shown = [f"[{', '.join(map(_in_yaml, (*others, guess)))}]" for guess in guesses]
    if " " in setting:  # a field's setting, in YAML
        return f"set {setting} to {' or '.join(shown)}"
    return f"set {setting}=" + " or ".join(f'"{text}"' if others else text for text in shown)


def formats_of(times: pa.StructArray) -> tuple[str, ...]:
    """Explicit formats of times that were read without one: `ISO`, and that of numbers."""
    times = times.drop_null()
    dated = np.asarray(times.field("dated")).astype(bool)
    if dated.all():
        return (ISO,) if len(times) else ()
    guesses = guess_formats(_shown(times[int(dated.argmin())]))[:1]
    return ((ISO,) if dated.any() and guesses else ()) + tuple(guesses)


def _in_yaml(name: str) -> str:
    """A format as an element of a YAML list."""
    return name if name in (ISO, *EPOCH_UNITS) else repr(name)


def read_times(cells: pa.Array, formats: Sequence[str] = ()) -> pa.StructArray:
    """Reads times of any notation.

    Args:
        cells: ``[n]`` text, numbers, dates or timestamps.
        formats: formats of text and numbers, tried in this order. None: text is ISO 8601 or a
            number, and numbers are not converted.

    Returns:
        ``[n]`` `TIME`, null where the cell is null or cannot be read; digits beyond nanoseconds are
        cut off.

    Raises:
        pa.ArrowNotImplementedError, pa.ArrowInvalid: the cells' type cannot hold times.
    """
    if pa.types.is_timestamp(cells.type) or pa.types.is_date(cells.type):
        return _from_timestamps(cells)
    if _is_text(cells.type):
        cells = pc.utf8_trim_whitespace(cells.cast(pa.string()))
        return _from_formats(cells, formats) if formats else _from_text(cells)
    if formats:
        return _from_formats(_number_texts(cells), formats)
    return _from_numbers(cells)


def read_clock(texts: pa.Array, formats: Sequence[str] = ()) -> pa.Array:
    """Local date and time of each cell, in its own time zone.

    Args:
        texts: ``[n]`` string.
        formats: the formats, as in `read_times`; numbers need one.

    Returns:
        ``[n]`` timestamp[s], null where the cell cannot be read.
    """
    distinct = pc.utf8_trim_whitespace(texts.cast(pa.string())).dictionary_encode()
    values = distinct.dictionary
    formats = formats or (ISO,)
    if any("%z" in f for f in formats):
        times = _one_by_one(values, lambda text: _by_formats(text, formats, in_utc=False))
    else:
        if ISO in formats:  # the local time is read as UTC, ignoring the zone
            values = pc.replace_substring_regex(values, _ZONE, r"\1")
        times = _from_formats(values, formats)
    seconds = times.field("whole")
    # the limits of Arrow's calendar
    shown = pc.and_(times.field("dated"), pc.less(pc.abs(seconds), 10**12))
    shown = pc.and_(shown, times.is_valid()).fill_null(False)
    return pc.if_else(shown, seconds, None).cast(pa.timestamp("s")).take(distinct.indices)


@dataclass
class TimeColumn:
    """Statistics of a dataset's times, merged over batches, files and ranks.

    Attributes:
        name: the name of the column.
        examples: the first time of each notation, with its file: "dated", "number", and for numbers
            the indices in `_ERAS`.
        eras: counts of numbers below, in and between the bounds of `_ERAS`.
        dates: counts of dated times before, in and after `USUAL`.
        zones: counts by kind of zone.
        unset: count of times 0 or -1, which often mean an unknown time.
        contested: count of times that another given format reads differently.
        decimals: required decimals: 0, 3, 6 or 9.
        low: the smallest integer part.
        high: the largest.
        feature: the field that derives its values from them; None for the rows' times.
    """

    name: str
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    eras: Int64Array = field(default_factory=lambda: np.zeros(len(_BOUNDS) + 1, np.int64))
    dates: Int64Array = field(default_factory=lambda: np.zeros(3, np.int64))
    zones: Int64Array = field(default_factory=lambda: np.zeros(3, np.int64))
    unset: int = 0
    contested: int = 0
    decimals: int = 0
    low: int = 0
    high: int = 0
    feature: str | None = None

    def add(self, times: pa.StructArray, file: str) -> None:
        """Adds the times of a batch."""
        times = times.drop_null()
        if not len(times):
            return
        whole = np.asarray(times.field("whole"))
        dated = np.asarray(times.field("dated")).astype(bool)
        billionths = np.asarray(times.field("billionths"))
        places = np.where(dated, -1, np.searchsorted(_BOUNDS, whole, side="right"))
        counts = np.bincount(places + 1, minlength=len(_BOUNDS) + 2)
        self.eras += counts[1:]
        for place in np.flatnonzero(counts) - 1:
            for kind in ["dated"] if place < 0 else ["number", str(place)]:
                if kind not in self.examples:
                    first = times[int(np.argmax(places == place))]
                    self.examples[kind] = (_shown(first), file)
        if dated.any():
            eras = np.searchsorted(np.add(USUAL, (0, 1)), whole, side="right")
            self.dates += np.bincount(eras[dated], minlength=3)
            self.zones += np.bincount(np.asarray(times.field("zone"))[dated], minlength=3)
            for name, outside in (("early", eras == 0), ("late", eras == 2)):
                if name not in self.examples and (outside & dated).any():
                    first = times[int(np.argmax(outside & dated))]
                    self.examples[name] = (_shown(first), file)
        self.unset += int(((whole == 0) | (whole == -1)).sum())
        contested = np.asarray(times.field("contested"))
        if contested.any():
            self.contested += int(contested.sum())
            first = times[int(contested.argmax())]
            self.examples.setdefault("contested", (_shown(first), file))
        for decimals in (3, 6, 9):
            if decimals > self.decimals and (billionths % 10 ** (12 - decimals)).any():
                self.decimals = decimals
        self.low, self.high = min(self.low, int(whole.min())), max(self.high, int(whole.max()))

    def __add__(self, other: Self) -> Self:
        return type(self)(
            name=self.name,
            examples=other.examples | self.examples,
            eras=self.eras + other.eras,
            dates=self.dates + other.dates,
            zones=self.zones + other.zones,
            unset=self.unset + other.unset,
            contested=self.contested + other.contested,
            decimals=max(self.decimals, other.decimals),
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            feature=self.feature,
        )

    @property
    def _setting(self) -> str:
        """Name of the setting that gives the format."""
        if self.feature is not None:
            return f"time_format of the field {self.feature}"
        return "data.interactions.time_format"

    def check(self) -> None:
        """Refuses a mix of two notations, which would be read as two eras.

        Raises:
            DataError: names an example of each, and a cure.
        """
        if "dated" in self.examples and "number" in self.examples:
            number = self.examples["number"][0]
            guess = next(iter(guess_formats(number)), None)
            cure = "write both in one way"
            if guess is not None:
                formats = f'"[iso, {_in_yaml(guess)}]"'
                cure = f"say how both are written: data.interactions.time_format={formats}"
            raise self._mixed_times_error("dated", "number", f"whose order is unknown; {cure}")
        eras = np.flatnonzero(self.eras[1::2])
        if len(eras) > 1 and not self.eras[2 * eras[0] + 2 : 2 * eras[-1] + 1 : 2].any():
            # Counts of something else would also fall in between.
            one, two = eras[:2]
            # Dates first, since as counts from 1970 they are times, too; then the longest unit.
            units = sorted((_ERA_FORMATS[k] for k in eras), key=lambda name: name in EPOCH_UNITS)
            formats = ", ".join(map(_in_yaml, units))
            what = (
                f"which look like {_ERAS[one][0]} and {_ERAS[two][0]}; say how they are written: "
                f'data.interactions.time_format="[{formats}]"'
            )
            raise self._mixed_times_error(str(2 * one + 1), str(2 * two + 1), what)

    def warnings(self) -> list[str]:
        """Warnings: times far from all others, and time zones in some cells only."""
        texts_shown = []
        if (text := self._outliers()) is not None:
            texts_shown.append(text)
        if self.contested:
            example, file = self.examples["contested"]
            texts_shown.append(
                f"the time column {self.name!r}: {self.contested:,} of "
                f"{int(self.eras.sum() + self.dates.sum()):,} times fit more than one format of "
                f"{self._setting}, which read different times, and the first format is used: "
                f"{example} in {file}; if that is wrong, put the other format first or write all "
                f"times in one"
            )
        if self.zones[_LOCAL] and self.zones[_ZONED]:
            n, n_zoned = int(self.zones.sum()), int(self.zones[_ZONED])
            meaning = (
                "are read as UTC, which puts them out of order if they are local times; write the "
                "zone in every cell"
            )
            if self.feature is not None:
                meaning = (
                    f"{self.feature} is that of each cell's own zone; if these differ, write all "
                    f"times in one zone"
                )
            texts_shown.append(
                f"the time column {self.name!r}: {n_zoned:,} of {n:,} times have a time zone; the "
                f"others have none and {meaning}"
            )
        return texts_shown

    def _outliers(self) -> str | None:
        """Warns about times outside `USUAL`, or outside the range of most numbers."""
        groups = {"early": int(self.dates[0]), "late": int(self.dates[2])}
        n, usual = int(self.dates.sum()), int(self.dates[1])
        if not n:
            era = 2 * int(self.eras[1::2].argmax()) + 1
            n, usual = int(self.eras.sum()), int(self.eras[era])
            groups = {str(k): int(c) for k, c in enumerate(self.eras) if k != era}
        start = f"the time column {self.name!r}:"
        if n == self.unset > 1:
            what = "order nothing" if self.feature is None else f"say nothing about {self.feature}"
            return f"{start} all {n:,} times are 0 or -1: they {what}"
        if not usual and self.zones[_UNZONED] and n > self.unset:
            kind = max(groups, key=lambda kind: groups[kind])
            example, file = self.examples[kind]
            return (
                f"{start} none of {n:,} times is between 1990 and 2100, such as {example} in "
                f"{file}; is {self._setting} right?"
            )
        if 2 * usual <= n - self.unset or usual == n:
            return None
        kind = max(groups, key=lambda kind: groups[kind])
        example, file = self.examples[kind]
        meaning = (
            "they sort before or after all others; if they stand for an unknown time, empty these "
            "cells and set data.on_bad_row=skip"
        )
        if self.feature is not None:
            meaning = (
                f"if they stand for an unknown time, name them in `missing` of the field "
                f"{self.feature}"
            )
        if self.zones[_UNZONED]:
            meaning += f"; if they count other units, list these in {self._setting}: [s, ms]"
        return (
            f"{start} {n - usual:,} of {n:,} times are not between 1990 and 2100 as the others "
            f"are, such as {example} in {file}: {meaning}"
        )

    def _mixed_times_error(self, one: str, two: str, what: str) -> DataError:
        (first, file), (second, other) = self.examples[one], self.examples[two]
        where = "" if other == file else f" (in {other})"
        return DataError(
            f"{file}: the time column {self.name!r} holds both {first} and {second}{where}, {what}"
        )

    @property
    def scale(self) -> int:
        """The factor, 1 to 10**9, that makes all times integers.

        Raises:
            DataError: the times' range and precision exceed 64 bits.
        """
        scale = 10**self.decimals
        if (self.low - 1) * scale < _INT64.min or (self.high + 1) * scale > _INT64.max:
            far = self.high if self.high > -self.low else self.low
            dated = "dated" in self.examples
            shown = _shown(pa.scalar((far, 0, dated, _UNZONED, False), TIME))
            raise DataError(
                f"the time column {self.name!r} has {plural(self.decimals, 'decimal')}, and "
                f"one of its times is {shown}: more than 64 bits hold; correct that row, or write "
                f"fewer decimals"
            )
        return scale


def scaled(whole: Int64Array, billionths: npt.NDArray[np.int32], scale: int) -> Int64Array:
    """Times as integers in units of ``1 / scale``."""
    if scale == 1:
        return whole
    ticks: Int64Array = whole * scale + billionths // (BILLION // scale)
    return ticks


# -- cells --------------------------------------------------------------------------------------


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _struct(
    whole: pa.Array, billionths: pa.Array, dated: bool, zone: int = _UNZONED
) -> pa.StructArray:
    """Columns -> `TIME`, null if ``whole`` is null."""
    constants = [
        pa.repeat(pa.scalar(v, t), len(whole))
        for v, t in ((dated, pa.bool_()), (zone, pa.int8()), (False, pa.bool_()))
    ]
    return pa.StructArray.from_arrays(
        [whole, billionths.cast(pa.int32()), *constants], fields=list(TIME), mask=pc.is_null(whole)
    )


def _zeros(n: int) -> pa.Array:
    return pa.repeat(pa.scalar(0, pa.int32()), n)


def _from_timestamps(cells: pa.Array) -> pa.StructArray:
    """Dates and timestamps of any unit."""
    if pa.types.is_date32(cells.type):
        cells = cells.cast(pa.timestamp("s"))
    elif pa.types.is_date64(cells.type):
        cells = cells.cast(pa.timestamp("ms"))
    per_second = EPOCH_UNITS[cells.type.unit]
    zone = _LOCAL if cells.type.tz is None else _ZONED
    return _in_seconds(cells.cast(pa.int64()), per_second, zone)


def _in_seconds(counts: pa.Array, per_second: int, zone: int = _UNZONED) -> pa.StructArray:
    """Integers that count parts of seconds from 1970 -> times."""
    valid = np.asarray(counts.is_valid())
    whole, parts = np.divmod(np.asarray(counts.fill_null(0)), per_second)
    billionths = (parts * (BILLION // per_second)).astype(np.int32)
    return _struct(pa.array(whole, mask=~valid), pa.array(billionths), True, zone)


def _from_numbers(cells: pa.Array) -> pa.StructArray:
    """Numbers -> times; NaN and numbers beyond 64 bits are null."""
    if pa.types.is_uint64(cells.type):
        cells = pc.if_else(pc.less(cells, pa.scalar(2**63, pa.uint64())), cells, None)
    if pa.types.is_integer(cells.type):
        return _struct(cells.cast(pa.int64()), _zeros(len(cells)), False)
    if pa.types.is_decimal(cells.type):
        return _from_text(_number_texts(cells))
    if not pa.types.is_floating(cells.type):
        raise pa.ArrowNotImplementedError(f"{cells.type} holds no times")
    numbers = cells.cast(pa.float64()).to_numpy(zero_copy_only=False)
    inside = np.abs(numbers) < 2.0**63  # not NaN
    numbers = np.where(inside, numbers, 0)
    whole = np.floor(numbers)
    rest, billionths = numbers - whole, np.zeros(len(numbers), np.int64)
    # A float means its shortest decimal representation: 0.7, not 0.69999999999999996.
    left = rest > 0
    for decimals in range(1, 10):
        if not left.any():
            break
        power = 10.0**decimals
        parts = np.rint(rest * power)
        fits = ((whole * power + parts) / power == numbers) | (whole + parts / power == numbers)
        fits &= left
        billionths[fits] = parts[fits].astype(np.int64) * 10 ** (9 - decimals)
        left &= ~fits
    billionths[left] = np.floor(rest[left] * BILLION).astype(np.int64)
    whole = pa.array(whole.astype(np.int64), mask=~inside)
    return _struct(whole, pa.array(billionths), False)


def _number_texts(cells: pa.Array) -> pa.Array:
    """Numbers -> text, integers without decimal point or exponent."""
    if pa.types.is_floating(cells.type):
        exact = cells.cast(pa.float64())
        is_whole = pc.and_(pc.less(pc.abs(exact), 2.0**63), pc.equal(pc.floor(exact), exact))
        digits = pc.if_else(is_whole.fill_null(False), exact, None).cast(pa.int64())
        return pc.coalesce(digits.cast(pa.string()), exact.cast(pa.string()))
    if pa.types.is_decimal(cells.type):
        return pa.array([None if c is None else f"{c:f}" for c in cells.to_pylist()], pa.string())
    if not pa.types.is_integer(cells.type):
        raise pa.ArrowNotImplementedError(f"{cells.type} holds no times")
    return cells.cast(pa.string())


def _from_text(cells: pa.Array) -> pa.StructArray:
    """ISO 8601, and numbers."""
    probe = cells.drop_null()[:100]
    if len(probe) and _NAMED_ZONE.search(probe[0].as_py()):
        cells = pc.replace_substring_regex(cells, r"\s*(?:UTC|GMT|Z)$", "Z")
        probe = cells.drop_null()[:100]
    ways: list[Callable[[pa.Array], pa.StructArray]] = [_integers, *_TIMESTAMPS, _decimals]
    for read in ways:
        try:
            read(probe)  # unlike a cast, it does not fail at the first bad cell
            return read(cells)
        except pa.ArrowInvalid:
            pass
    return _one_by_one(cells, _by_itself)


def _integers(cells: pa.Array) -> pa.StructArray:
    if pc.any(pc.match_substring(cells, "x")).as_py():
        raise pa.ArrowInvalid("Arrow would take 0x10")
    return _struct(cells.cast(pa.int64()), _zeros(len(cells)), False)


def _decimals(cells: pa.Array) -> pa.StructArray:
    if pc.any(pc.match_substring_regex(cells, "^-|x")).as_py():
        raise pa.ArrowInvalid("numbers below 0 are read one by one")
    parts = pc.split_pattern(cells, ".", max_splits=1)
    begins, flat = parts.offsets[:-1], parts.flatten()
    has_point = pc.equal(pc.list_value_length(parts), 2)
    whole = flat.take(pc.if_else(cells.is_valid(), begins, None)).cast(pa.int64())
    digits = flat.take(pc.if_else(has_point, pc.add(begins, 1), None)).fill_null("0")
    digits = pc.utf8_slice_codeunits(pc.ascii_rpad(digits, 9, "0"), 0, 9)
    return _struct(whole, digits.cast(pa.int32()), False)


def _timestamps(kind: pa.DataType, cells: pa.Array) -> pa.StructArray:
    return _from_timestamps(cells.cast(kind))


_TIMESTAMPS = [
    partial(_timestamps, kind)
    for kind in (
        pa.timestamp("ns"),
        pa.timestamp("ns", "UTC"),
        pa.timestamp("us"),
        pa.timestamp("us", "UTC"),
    )
]

_Time = tuple[int, int, bool, int]


def _one_by_one(cells: pa.Array, read: Callable[[str], _Time | None]) -> pa.StructArray:
    """Parses each distinct cell in Python."""
    distinct = cells.dictionary_encode()
    times = [None if text is None else read(text) for text in distinct.dictionary.to_pylist()]
    names = TIME.names
    parsed = pa.array(
        [None if t is None else dict(zip(names, (*t, False), strict=True)) for t in times], TIME
    )
    return parsed.take(distinct.indices)


def _by_itself(text: str) -> _Time | None:
    """Parses a number or an ISO 8601 time."""
    if (number := _number(text)) is not None:
        return (*number, False, _UNZONED)
    text, billionths = _NAMED_ZONE.sub("+00:00", text), 0
    if fraction := _FRACTION.match(text):
        text, billionths = fraction[1] + fraction[3], int(fraction[2].ljust(9, "0")[:9])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return _seconds(moment), billionths, True, _zone(moment)


def _number(text: str) -> tuple[int, int] | None:
    """Integer part and billionths of a number; unlike Python, refuses 1_000."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text, re.ASCII):
        return None
    try:
        whole, rest = divmod(Decimal(text), 1)
    except InvalidOperation:  # hundreds of digits
        return None
    if rest < 0:
        whole, rest = whole - 1, rest + 1
    if not _INT64.min <= whole <= _INT64.max:
        return None
    return int(whole), int(rest * BILLION)


def _zone(moment: datetime) -> int:
    return _LOCAL if moment.tzinfo is None else _ZONED


def _seconds(moment: datetime) -> int:
    """Whole seconds since 1970; times without zone are UTC."""
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(seconds=1)


# -- formats ------------------------------------------------------------------------------------


def _plain_codes(text: str) -> str:
    """Expands abbreviations that Python's strptime lacks."""
    for short, codes in _ALIASES.items():
        text = re.sub(rf"(?<!%)((?:%%)*){short}", rf"\g<1>{codes}", text)
    return text


def _from_formats(texts: pa.Array, formats: Sequence[str]) -> pa.StructArray:
    """Parses text by the first matching format; sets `contested` if a later one disagrees."""
    parsed = _from_format(texts, formats[0])
    contested = np.zeros(len(texts), bool)
    for name in formats[1:]:
        read = _from_format(texts, name)
        # Unlike StructArray.field, this respects the struct's nulls.
        whole, other = (pc.struct_field(times, "whole") for times in (parsed, read))
        usual = pc.and_(pc.greater_equal(other, USUAL[0]), pc.less_equal(other, USUAL[1]))
        differs = pc.and_(pc.not_equal(whole, other), usual)
        contested |= np.asarray(differs.fill_null(False))
        parsed = pc.if_else(parsed.is_valid(), parsed, read)
    if not contested.any():
        return parsed
    parts = [*parsed.flatten()[:-1], pa.array(contested)]
    return pa.StructArray.from_arrays(parts, fields=list(TIME), mask=parsed.is_null())


def _from_format(texts: pa.Array, name: str) -> pa.StructArray:
    """Parses text by one format."""
    if name in EPOCH_UNITS:
        return _from_unit(texts, EPOCH_UNITS[name])
    return _from_iso(texts) if name == ISO else _strptime(texts, name)


def _from_iso(texts: pa.Array) -> pa.StructArray:
    times = _from_text(texts)
    return pc.if_else(times.field("dated").fill_null(False), times, None)


def _from_unit(texts: pa.Array, per_second: int) -> pa.StructArray:
    times = _from_text(texts)
    numbers = pc.if_else(times.field("dated"), None, times.field("whole"))
    numbers = pc.if_else(times.is_valid(), numbers, None)
    parts = np.asarray(times.field("billionths").fill_null(0)).astype(np.int64)
    seconds = _in_seconds(numbers, per_second)
    more = np.asarray(seconds.field("billionths")) + parts // per_second
    whole = seconds.field("whole")
    in_calendar = pc.and_(pc.greater_equal(whole, _CALENDAR[0]), pc.less(whole, _CALENDAR[1]))
    return _struct(pc.if_else(in_calendar, whole, None), pa.array(more), True)


def _strptime(texts: pa.Array, name: str) -> pa.StructArray:
    """Arrow's fast strptime, and Python's for codes that Arrow lacks."""
    if "%f" in name or "%Z" in name:
        return _one_by_one(texts, lambda text: _by_formats(text, (name,)))
    times = pc.strptime(texts, _plain_codes(name), "s", error_is_null=True)
    # Arrow turns February 31 into March 3; zones may change the day.
    days = np.asarray(pc.day(times).fill_null(0))
    zoned = "%z" in name
    doubtful = (days <= 4) | (days >= 28) if zoned else (days >= 1) & (days <= 3)
    at = np.flatnonzero(doubtful & np.asarray(texts.is_valid()))
    counts = times.cast(pa.timestamp("s")).cast(pa.int64())
    seconds = _in_seconds(counts, 1, _ZONED if zoned else _LOCAL)
    if not len(at):
        return seconds
    checked = _one_by_one(texts.take(pa.array(at)), lambda text: _by_formats(text, (name,)))
    place = np.full(len(texts), -1)
    place[at] = np.arange(len(at))
    return pc.if_else(pa.array(place >= 0), checked.take(pa.array(place, mask=place < 0)), seconds)


def _by_formats(text: str, formats: Sequence[str], in_utc: bool = True) -> _Time | None:
    for name in formats:
        if name in EPOCH_UNITS:
            if (number := _number(text)) is not None:
                seconds, parts = divmod(number[0], EPOCH_UNITS[name])
                if not _CALENDAR[0] <= seconds < _CALENDAR[1]:
                    continue
                per_part = BILLION // EPOCH_UNITS[name]
                return seconds, parts * per_part + number[1] // EPOCH_UNITS[name], True, _UNZONED
            continue
        if name == ISO:
            time = _by_itself(text if in_utc else re.sub(_ZONE, r"\1", text))
            if time is not None and time[2]:
                return time
            continue
        try:
            moment = datetime.strptime(text, _plain_codes(name))
        except ValueError:
            continue
        zone = _zone(moment)
        if not in_utc:
            moment = moment.replace(tzinfo=None)
        return _seconds(moment), moment.microsecond * 1000, True, zone
    return None


# -- messages -----------------------------------------------------------------------------------


def _shown(time: pa.StructScalar) -> str:
    whole, billionths, dated = (time[name].as_py() for name in ("whole", "billionths", "dated"))
    rest = f".{billionths:09d}".rstrip("0").rstrip(".")
    if not dated:
        return f"{whole}{rest}"
    try:
        return f"{_EPOCH + timedelta(seconds=whole):%Y-%m-%d %H:%M:%S}{rest}"
    except OverflowError:
        return f"{whole}{rest} s since 1970"
