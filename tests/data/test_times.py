"""Times against pandas and exact decimals; notations that do not go together."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.config import load_config
from deepfm_dist.data.fields import column_of, split_cells
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.data.sources import Column, read_table
from deepfm_dist.data.times import TimeColumn, guess_formats, read_clock, read_times
from deepfm_dist.errors import ConfigError, DataError
from tests.data.small_logs import contents

FORMATS = (
    ("%d/%m/%Y", "31/01/2020"),
    ("%Y/%m/%d %H:%M", "2020/01/31 13:05"),
    ("%a %b %d %H:%M:%S %z %Y", "Fri Jan 31 13:05:58 -0700 2020"),
    ("%m/%d/%Y %I:%M:%S %p", "1/31/2020 1:05:58 PM"),
    ("%m/%d/%Y %I:%M:%S %p", "1/31/2020 12:05:58 AM"),
    ("%y%m%d%H", "20013113"),
    ("%Y%m%d", "20200131"),
    ("%m %d, %Y", "01 31, 2020"),
    ("%d/%b/%Y:%H:%M:%S %z", "31/Jan/2020:13:05:58 +0530"),
    ("%d.%m.%Y %H:%M:%S.%f", "31.01.2020 13:05:58.250"),
)


def exact(times: pa.Array) -> list[Decimal | None]:
    """Times as exact numbers."""
    return [
        None if t is None else t["whole"] + Decimal(t["billionths"]) / 10**9
        for t in times.to_pylist()
    ]


def stamp(nanoseconds: int) -> Decimal:
    return Decimal(nanoseconds) / 10**9


@given(
    st.lists(st.integers(-(2**63) + 1, 2**63 - 1) | st.none(), max_size=20),
    st.sampled_from(
        [pa.timestamp("ns"), pa.timestamp("us"), pa.timestamp("ms", "UTC"), pa.int64()]
    ),
)
def test_integers_and_timestamps_of_any_unit_are_exact(
    numbers: list[int | None], kind: pa.DataType
) -> None:
    per_second = {"ns": 10**9, "us": 10**6, "ms": 1000}[kind.unit] if kind != pa.int64() else 1
    expected = [None if n is None else Decimal(n) / per_second for n in numbers]
    assert exact(read_times(pa.array(numbers, pa.int64()).cast(kind))) == expected


@given(st.lists(st.decimals(-(10**10), 10**10, places=9), min_size=1, max_size=20))
def test_decimals_in_text_are_exact(numbers: list[Decimal]) -> None:
    assert exact(read_times(pa.array([f"{n:f}" for n in numbers]))) == numbers


@given(
    st.lists(st.integers(0, 10**16), min_size=1, max_size=20), st.sampled_from([10, 1000, 10**6])
)
def test_a_float_is_the_shortest_decimal_that_it_is(counts: list[int], parts: int) -> None:
    numbers = [count / parts for count in counts]
    # As Python prints it, cut after nine digits.
    expected = [Decimal(repr(n)).quantize(Decimal("1e-9"), "ROUND_FLOOR") for n in numbers]
    assert exact(read_times(pa.array(numbers))) == expected


def test_iso_timestamps_are_what_pandas_reads() -> None:
    texts = [
        "2020-07-04T21:26:40.700Z", "2020-07-04 21:26:40.123456789", "2020-07-04 21:26",
        "2020-07-04",
        "2020-07-04T21:26:40+09:00", "2020-07-04 21:26:40.5-0730", "20200704T212640",
    ]  # fmt: skip
    expected = [stamp(pd.to_datetime(t, utc=True).value) for t in texts]
    assert exact(read_times(pa.array(texts))) == expected  # a mixed batch, one by one
    for text, time in zip(texts, expected, strict=True):  # each in a batch of its own
        assert exact(read_times(pa.array([text, None]))) == [time, None]


@pytest.mark.parametrize(("name", "text"), FORMATS)
def test_formats_are_what_pandas_reads(name: str, text: str) -> None:
    moment = pd.to_datetime(text, format=name)
    assert exact(read_times(pa.array([text, None, "x"]), [name])) == [
        stamp(pd.to_datetime(text, format=name, utc=True).value), None, None,
    ]  # fmt: skip
    (clock,) = read_clock(pa.array([text]), [name]).to_pylist()  # in the cell's own zone
    assert clock == moment.tz_localize(None).floor("s").to_pydatetime()
    assert name in guess_formats(text)


def test_all_bad_cells_say_what_their_format_is(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("at\n01/02/2020\n02/28/2020\n")
    with pytest.raises(DataError, match=r'line 2: .* set data.*time_format="%m/%d/%Y"$'):
        read_table(tmp_path / "a.csv", [Column("at", "time")], on_bad_row="error")
    with pytest.raises(DataError, match=r"line 2: .* write times as in the training data$"):
        read_table(tmp_path / "a.csv", [Column("at", "time")])  # such as those to predict


def test_impossible_days_are_not_times() -> None:
    days = [f"{day}/{month}/2019" for month in range(1, 13) for day in range(1, 33)]
    expected = pd.to_datetime(pd.Series(days), format="%d/%m/%Y", errors="coerce")
    read = exact(read_times(pa.array(days), ["%d/%m/%Y"]))
    assert read == [None if pd.isna(t) else stamp(t.value) for t in expected]


def test_the_first_format_that_fits_is_taken_and_units_count_from_1970() -> None:
    cells = pa.array(["2020-01-31 10:00:00", "20200131", None, "1580464800"])
    read = exact(read_times(cells, ["%Y-%m-%d %H:%M:%S", "%Y%m%d", "s"]))
    assert read == [1580464800, 1580428800, None, 1580464800]
    cells = pa.array(["2020-01-31T10:00:00.5+09:00", "31/01/2020", "7"])
    assert exact(read_times(cells, ["%d/%m/%Y", "iso"])) == [
        Decimal("1580432400.5"),
        1580428800,
        None,
    ]
    for formats in (["iso", "%d/%m/%Y"], ["%d/%m/%Y %z", "iso"], []):  # the clock of the cell
        assert read_clock(cells, formats)[0].as_py().hour == 10
    for unit, n in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        for cells in (pa.array([1580464801 * n]), pa.array([str(1580464801 * n)])):
            assert exact(read_times(cells, [unit])) == [1580464801]
            assert read_clock(cells.cast(pa.string()), [unit])[0].as_py().hour == 10
    assert exact(read_times(pa.array([20200131, None]), ["%Y%m%d"])) == [1580428800, None]
    assert exact(read_times(pa.array([20200131.0]), ["%Y%m%d"])) == [1580428800]


def test_a_unit_that_leads_beyond_the_year_9999_is_not_the_cells(tmp_path: Path) -> None:
    cells = pa.array(["1580464800123", "253402300799", "253402300800"])
    for formats in (["s"], ["%Y", "s"], ["%H %z", "s"]):
        assert exact(read_times(cells, formats)) == [None, 253402300799, None]
        assert read_clock(cells, formats).null_count == 2
    assert exact(read_times(pa.array([-62135596800, -62135596801]), ["s"])) == [-62135596800, None]
    (tmp_path / "a.csv").write_text("at\n1580464800123\n")
    with pytest.raises(DataError, match=r'time_format="ms"$'):
        column = Column("at", "time", formats=("s",))
        read_table(tmp_path / "a.csv", [column], on_bad_row="error")


def test_an_empty_time_is_not_cured_by_a_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("at,b\n,1\n")
    with pytest.raises(DataError, match=r"line 2: at '' is empty; fix the row$"):
        read_table(tmp_path / "a.csv", [Column("at", "time")])


def test_formats_are_checked(tmp_path: Path) -> None:
    for wrong, message in (("%Q", "unknown code %Q"), ("year", "is not a time format; use")):
        with pytest.raises(ConfigError, match=message):
            load_config("sample", [f"data.interactions.time_format='{wrong}'"])
    for wrong, message in (
        ("%m/%d/%Y %H:%M:%S %p", "%p, AM or PM, counts with %I alone; write %I .* instead of %H"),
        ("%m/%d/%Y %I:%M", "%I is an hour of AM or PM.* add %p, or write %H"),
        ("%Y-%M-%d", "a day and no month; %M is the minute, %m the month"),
        ("%Y-%m-%d %H:%m", "%m twice; %m is the month, %M the minute"),
        ("%F %d", "%d twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config("sample", [f"data.interactions.time_format='{wrong}'"])
    for right in ("%H:%M", "%Y%j", "100%% %Y", "%% %%%y"):
        load_config("sample", [f"data.interactions.time_format='{right}'"])
    with pytest.raises(ConfigError, match="time; set it"):
        load_config("sample", ["data.interactions.time=null", "data.interactions.time_format=s"])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            [["2020-01-31 10:00:00"], ["20200131"]],
            r"a\.csv: the time column 'at' holds both 2020-01-31 10:00:00 and 20200131, .*"
            r"data\.interactions\.time_format=\"\[iso, '%Y%m%d'\]\"",
        ),
        ([["1991-05-01", "1991"]], r"both 1991-05-01 00:00:00 and 1991, .*\[iso, '%Y'\]"),
        ([["1991-05-01", "199111"]], r"and 199111, .*\[iso, '%Y%m'\]"),
        ([["1991-05-01", "7"]], "and 7, whose order is unknown; write both in one way"),
        ([["1580464800", "1580464800123"]], r"both 1580464800 and 1580464800123, .*\[s, ms\]"),
        ([["20200131"], ["1580464800"]], "both 20200131 and 1580464800, which look like a date"),
        ([["1580464800", "0", "-1"], ["7"]], None),
        ([[str(n) for n in range(0, 10**13, 10**9 + 7)]], None),  # counts of something else
    ],
)
def test_times_of_two_notations_are_refused(cells: list[list[str]], message: str | None) -> None:
    column = TimeColumn("at")
    for batch in cells:
        column += TimeColumn("at")  # as the ranks' are added up
        column.add(read_times(pa.array(batch)), "a.csv")
    if message is None:
        column.check()
        return
    with pytest.raises(DataError, match=message):
        column.check()


def test_what_64_bits_do_not_hold_is_refused() -> None:
    column = TimeColumn("at")
    column.add(read_times(pa.array(["9999-12-31 00:00:00.5"])), "a.csv")
    assert column.scale == 1000
    column.add(read_times(pa.array(["2020-01-01 00:00:00.000000001"])), "a.csv")
    with pytest.raises(DataError, match=r"has 9 decimals.* is 9999-12-31 00:00:00: more than 64"):
        _ = column.scale


def test_int96_timestamps_do_not_wrap(tmp_path: Path) -> None:
    far = [253402300799 * 10**6, 0, -62135596800 * 10**6]
    for array in (pa.array(far, pa.timestamp("us")), pa.array([1, 10**18 + 1], pa.timestamp("ns"))):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"c": array}), path, use_deprecated_int96_timestamps=True)
        read = exact(read_table(path, [Column("c", "time")])["c"].combine_chunks())
        per_second = {"us": 10**6, "ns": 10**9}[array.type.unit]
        assert read == [Decimal(n.value) / per_second for n in array]
    pq.write_table(
        pa.table({"c": pa.array(far, pa.timestamp("us"))}),
        path,
        use_deprecated_int96_timestamps=True,
    )
    assert read_table(path, [Column("c")])["c"][0].as_py().startswith("9999-12-31")


def _sessions() -> pd.DataFrame:
    """Forty sessions of five clicks within less than a second, in any order."""
    rng, rows = np.random.default_rng(3), []
    for session in range(40):
        items, moments = (rng.choice(n, 5, replace=False) for n in (8, 1000))
        for item, ms in zip(items, moments, strict=True):
            rows.append((f"s{session}", f"i{item}", 1593898000000 + 1000 * session + int(ms)))
    frame = pd.DataFrame(rows, columns=["session", "item", "ms"])
    return frame.sample(frac=1, random_state=1).reset_index(drop=True)


@pytest.mark.parametrize("notation", ["ms", "iso", "seconds", "float", "parquet", "d/m/y"])
def test_the_last_event_is_the_last_in_every_notation(tmp_path: Path, notation: str) -> None:
    frame = _sessions()
    last = frame.sort_values("ms").groupby("session").item.last()
    moments = pd.to_datetime(frame.ms, unit="ms")
    frame["at"] = {
        "ms": frame.ms,
        "iso": moments.dt.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "seconds": frame.ms.map(lambda ms: f"{ms // 1000}.{ms % 1000:03d}"),
        "float": frame.ms / 1000,
        "parquet": moments,
        "d/m/y": moments.dt.strftime("%d/%m/%Y %H:%M:%S.%f"),
    }[notation]
    file = "t.parquet" if notation in ("parquet", "float") else "t.csv"
    rows = frame[["session", "item", "at"]]
    rows.to_parquet(tmp_path / file) if file == "t.parquet" else rows.to_csv(tmp_path / file)
    overrides: list[str] = []
    if notation == "d/m/y":
        overrides = ["data.interactions.time_format='%d/%m/%Y %H:%M:%S.%f'"]
    manifest, held_out = _prepared(tmp_path, file, *overrides)
    assert held_out == last.to_dict()
    assert manifest.time_scale == {"ms": 1}.get(notation, 1000)


def _prepared(root: Path, file: str, *overrides: str) -> tuple[Manifest, dict[Any, Any]]:
    """Prepares ``session, item, at``; (manifest, each session's held-out item)."""
    (root / "c.yaml").write_text(f"""
data:
  interactions: {{file: {file}, user: session, item: item, time: at}}
  features: [{{name: user, entity: user}}, {{name: item, entity: item}}]
  split: {{method: leave_last, valid: 0, test: 1}}
  negatives: {{evaluation_per_positive: 1}}
""")
    config = load_config(str(root / "c.yaml"), overrides)
    manifest = prepare(config.data, root, root / "prepared", 1)
    rows = pd.read_parquet(root / "prepared/test").query("label == 1")
    users, items = (
        pd.read_parquet(root / f"prepared/entities/{name}.parquet").id for name in ("user", "item")
    )
    return manifest, dict(zip(users[rows.user], items[rows.item], strict=True))


@pytest.mark.parametrize("zone", [None, "Asia/Seoul"])
def test_what_is_derived_from_timestamps_is_what_their_clock_shows(
    tmp_path: Path, zone: str | None
) -> None:
    moments = pd.date_range("2020-01-30", periods=50, freq="5h17min", tz=zone) + pd.Timedelta("7ms")
    pd.DataFrame({"at": moments, "iso": moments.map(pd.Timestamp.isoformat)}).to_parquet(
        tmp_path / "a.parquet"
    )
    for column in ("at", "iso"):
        for derive, expected in (
            ("hour", moments.hour),
            ("weekday", moments.day_of_week),
            ("weekend", (moments.day_of_week >= 5).astype(int)),
        ):
            feature = Feature.model_validate({"name": "x", "column": column, "derive": derive})
            table = read_table(tmp_path / "a.parquet", [column_of(feature)])
            _, texts = split_cells(table["field x"].combine_chunks(), feature)
            assert texts.to_pylist() == [str(n) for n in expected]


def test_ranks_agree_on_the_unit_of_all_files(tmp_path: Path) -> None:
    """One file has whole seconds, the other milliseconds; each rank reads one."""
    frame = _sessions()
    frame["at"] = frame.ms.map(lambda ms: f"{ms // 1000}.{ms % 1000:03d}")
    extra = pd.DataFrame({"session": ["s0", "s0"], "item": ["i0", "i1"], "at": ["5", "1593999999"]})
    columns = ["session", "item", "at"]
    extra.to_csv(tmp_path / "a.csv", columns=columns, index=False)
    frame.to_csv(tmp_path / "b.csv", columns=columns, index=False)
    manifest, last = _prepared(tmp_path, "'*.csv'")
    assert (manifest.time_scale, last["s0"]) == (1000, "i1")
    data = load_config(str(tmp_path / "c.yaml")).data
    prepare(data, tmp_path, tmp_path / "two", 1, threads=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "prepared")
    (tmp_path / "a.csv").write_text("session,item,at\ns0,i0,2020-01-31\n")
    with pytest.raises(DataError, match=r"holds both 2020-01-31 00:00:00 and 15938\d+\S* \(in "):
        prepare(data, tmp_path, tmp_path / "mixed", 1)


@pytest.mark.parametrize(
    ("usual", "outside", "expected"),
    [
        ("{:d}", ["0", "-5"], "2 of 42 times are not between 1990 and 2100 .*, such as 0 in a.csv"),
        ("2020-01-01 00:00:{:02d}", ["1970-01-01"], "1 of 41 times .* such as 1970-01-01 00:00:00"),
        ("2020-01-01 00:00:{:02d}", ["9999-12-31"], "1 of 41 times .* such as 9999-12-31 00:00:00"),
        ("1920-01-01 00:00:{:02d}", ["1921-01-01"], None),
        ("2020-01-01 00:00:{:02d}", ["1995-01-01"], None),
    ],
)
def test_times_far_from_all_others_are_counted(
    usual: str, outside: list[str], expected: str | None
) -> None:
    start = 1_600_000_000 if usual == "{:d}" else 0
    one, two = TimeColumn("at"), TimeColumn("at")
    one.add(read_times(pa.array([usual.format(start + k) for k in range(20)])), "b.csv")
    texts = outside + [usual.format(start + k) for k in range(20, 40)]
    two.add(read_times(pa.array(texts)), "a.csv")
    said = (one + two).warnings()
    if expected is None:
        assert said == []
    else:
        assert len(said) == 1
        assert re.search(expected, said[0])


@pytest.mark.parametrize("unknown", ["0", "-1"])
def test_times_that_are_mostly_unset_are_counted(unknown: str) -> None:
    column = TimeColumn("at")
    column.add(read_times(pa.array([unknown] * 30)), "a.csv")
    assert column.warnings() == [
        "the time column 'at': all 30 times are 0 or -1: they order nothing"
    ]
    column.add(read_times(pa.array([str(1_600_000_000 + k) for k in range(10)])), "a.csv")
    (text,) = column.warnings()
    assert "30 of 40 times are not between 1990 and 2100" in text


@pytest.mark.parametrize(
    ("formats", "texts", "contested"),
    [
        (("%d/%m/%Y", "%m/%d/%Y"), ["01/02/2020", "25/12/2020", "12/25/2020", "03/03/2020"], 1),
        (("s", "%Y%m%d"), ["20200131", "1600000000"], 1),
        (("%Y%m%d", "s"), ["20200131", "1600000000"], 0),
        (("s", "ms"), ["1600000000", "1600000000000"], 0),
        (("iso", "%Y%m%d"), ["2020-01-31", "20200131"], 0),
    ],
)
def test_times_that_two_formats_read_differently_are_counted(
    formats: tuple[str, ...], texts: list[str], contested: int
) -> None:
    one, two = TimeColumn("at"), TimeColumn("at")
    one.add(read_times(pa.array(texts), formats), "a.csv")
    two.add(read_times(pa.array(texts), formats), "b.csv")
    said = [w for w in (one + two).warnings() if "more than one format" in w]
    assert (one + two).contested == 2 * contested
    assert len(said) == min(contested, 1)
    assert all(f"{2 * contested} of {2 * len(texts)} times fit" in w for w in said)


def test_counts_from_0_are_not_outlying_times() -> None:
    column = TimeColumn("at")
    column.add(read_times(pa.array(range(100))), "a.csv")
    assert column.warnings() == []


@pytest.mark.parametrize("formats", [(), ("iso",), ("%Y-%m-%d %H:%M:%S%z", "%Y-%m-%d %H:%M:%S")])
def test_time_zones_in_some_cells_only_are_counted(formats: tuple[str, ...]) -> None:
    zoned = [f"2020-01-01 10:00:{k:02d}+05:00" for k in range(30)]
    local = [f"2020-01-01 10:00:{k:02d}" for k in range(30, 40)]
    column = TimeColumn("at")
    column.add(read_times(pa.array(zoned), formats), "a.csv")
    assert column.warnings() == []
    column.add(read_times(pa.array(local), formats), "b.csv")
    assert [w.partition(";")[0] for w in column.warnings()] == [
        "the time column 'at': 30 of 40 times have a time zone"
    ]
    mixed = TimeColumn("at")
    mixed.add(read_times(pa.array(zoned + local), formats), "a.csv")
    assert mixed.warnings() == column.warnings()


def test_a_field_of_the_time_column_is_read_as_the_times_are(tmp_path: Path) -> None:
    frame = _sessions()
    moments = pd.to_datetime(frame.ms, unit="ms") + pd.to_timedelta(frame.index % 24, unit="h")
    frame["at"] = moments.dt.strftime("%d/%m/%Y %H:%M")
    frame.to_csv(tmp_path / "t.csv", index=False)
    hour = "{name: hour, column: at, derive: hour}"
    manifest, _ = _prepared(
        tmp_path,
        "t.csv",
        "data.interactions.time_format='%d/%m/%Y %H:%M'",
        f"data.features=[{{name: user, entity: user}}, {{name: item, entity: item}}, {hour}]",
    )
    assert manifest.tables["hour"].rows == 1 + moments.dt.hour.nunique()
    assert manifest.data.features[2].time_formats == ("%d/%m/%Y %H:%M",)


_ISO = [f"2020-01-{day:02d} {day % 24:02d}:00" for day in range(13, 29)]
_DAY_FIRST = [f"{day}/02/2020 {day % 24:02d}:00" for day in range(13, 29)]
_COMPACT = [f"202003{day}" for day in range(13, 29)]
_WEEKDAY: dict[str, Any] = {"name": "day", "column": "at", "derive": "weekday"}


def _prepare_times(root: Path, cells: list[str], **settings: Any) -> None:
    """Prepares rows with some times; settings are of the field ``day``, or of the rows' times."""
    rows = [f"u{k % 3},i{k % 4},{cell}" for k, cell in enumerate(cells)]
    (root / "t.csv").write_text("u,i,at\n" + "\n".join(rows) + "\n")
    spec = {"file": "t.csv", "user": "u", "item": "i"}
    item = {"name": "item", "entity": "item"}
    is_field = settings.pop("is_field")
    fields = [item, _WEEKDAY | settings] if is_field else [item]
    data = {
        "interactions": spec if is_field else spec | {"time": "at"} | settings,
        "features": fields,
        "split": {"valid": 0, "test": 0},
    }
    prepare(DataConfig.model_validate(data), root, root / "prepared", 1)


@pytest.mark.parametrize("is_field", [True, False])
@pytest.mark.parametrize("cells", [_ISO + _DAY_FIRST, _DAY_FIRST + _ISO, _ISO + _COMPACT])
@pytest.mark.parametrize("first", [None, "iso", "%d/%m/%Y %H:%M", "%Y%m%d"])
def test_the_format_that_is_proposed_reads_the_other_times_too(
    tmp_path: Path, cells: list[str], first: str | None, is_field: bool
) -> None:
    settings: dict[str, Any] = {} if first is None else {"time_format": first}
    proposed = r"time_format of the field day to (.*)$" if is_field else r"time_format=\"(\[.*)\"$"
    for _ in range(2):  # a format that reads no cell takes one step more
        with pytest.raises(DataError) as caught:
            _prepare_times(tmp_path, cells, is_field=is_field, **settings)
        proposal = re.search(proposed, str(caught.value))
        proposal = proposal or re.search(r"time_format=(\".*\")$", str(caught.value))
        assert proposal, caught.value
        settings = {"time_format": yaml.safe_load(proposal[1])}
        if len(settings["time_format"]) == 2:
            break
    _prepare_times(tmp_path, cells, is_field=is_field, **settings)


@pytest.mark.parametrize(
    ("cells", "time_format", "warning"),
    [
        (
            ["01/02/2020", "02/02/2020", "05/06/2020", "31/01/2020"],
            ["%d/%m/%Y", "%m/%d/%Y"],
            "2 of 4 times fit more than one format of time_format of the field day, .* "
            "2020-02-01 00:00:00 in t.csv",
        ),
        (
            ["1580464800", "1580464801000", "1580464802000"],
            ["ms"],
            r"1 of 3 times are not between .* such as 1970-01-19 .* other units, .*: \[s, ms\]",
        ),
        (["20200131", "20200201"], ["s"], "none of 2 times is between 1990 and 2100"),
        (["0", "0"], ["s"], "all 2 times are 0 or -1: they say nothing about day"),
        (["2020-01-01T10:00:00Z", "2020-01-01 10:00"], None, "1 of 2 times have a time zone"),
    ],
)
@pytest.mark.parametrize("has_file", [True, False])
def test_times_to_derive_from_are_looked_at_like_the_rows_times(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    cells: list[str],
    time_format: list[str] | None,
    warning: str,
    has_file: bool,
) -> None:
    settings: dict[str, Any] = {"entity": "item", "is_field": True}
    if time_format is not None:
        settings["time_format"] = time_format
    if has_file:
        keys = "".join(f"i{k % 4},{cell}\n" for k, cell in enumerate(cells * 4))
        (tmp_path / "items.csv").write_text("i,at\n" + keys)
        settings["file"] = "items.csv"
    _prepare_times(tmp_path, cells, **settings)
    warnings = [m for m in caplog.messages if "the time column 'at'" in m]
    assert len(warnings) == 1
    if has_file:  # where every cell stands four times
        warning = warning.replace("t.csv", "items.csv")
        warning = re.sub(r"\d+(?= times| of)", lambda n: str(4 * int(n[0])), warning)
    assert re.search(warning, warnings[0])


def test_two_fields_of_one_column_of_times_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t.csv").write_text("u,i,at\na,x,01/02/2020 10:00\nb,y,01/02/2020 11:00\n")
    both = ["%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M"]
    hour = _WEEKDAY | {"name": "hour", "derive": "hour"}
    rows = {"file": "t.csv", "user": "u", "item": "i"}
    for spec, fields in (
        (rows, [f | {"time_format": both} for f in (_WEEKDAY, hour)]),
        (rows | {"time": "at", "time_format": both}, [_WEEKDAY, hour]),
    ):
        caplog.clear()
        features = [{"name": "item", "entity": "item"}, *fields]
        data = {"interactions": spec, "features": features, "split": {"valid": 0, "test": 0}}
        prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "prepared", 1)
        assert sum("fit more than one format" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    "cells", [("%Y%m%d", "s"), ("s", "ms", "us"), ("%Y%m%d%H%M", "ms"), ("ns", "%Y%m%d%H%M%S")]
)
def test_the_formats_that_are_proposed_for_two_notations_read_both(cells: tuple[str, ...]) -> None:
    moments = pd.date_range("2019-11-21 10:00", periods=40, freq="40D")
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    texts, expected = [], []
    for k, moment in enumerate(moments):
        name = cells[k % len(cells)]
        seconds = int(moment.timestamp())
        texts.append(
            str(seconds * per_second[name]) if name in per_second else moment.strftime(name)
        )
        expected.append(seconds if name != "%Y%m%d" else int(moment.floor("D").timestamp()))
    column = TimeColumn("at")
    column.add(read_times(pa.array(texts)), "a.csv")
    with pytest.raises(DataError, match="holds both") as caught:
        column.check()
    typed = str(caught.value).rpartition("time_format=")[2].strip('"')
    read = read_times(pa.array(texts), yaml.safe_load(typed))
    assert read.field("whole").to_pylist() == expected
    again = TimeColumn("at")
    again.add(read, "a.csv")
    again.check()
    assert again.warnings() == []
