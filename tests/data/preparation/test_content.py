"""Preparation depends on the contents of rows, not on their order or file."""

import zlib
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data.manifest import SPLITS, Manifest
from deepfm_dist.data.moments import Moments
from deepfm_dist.data.preparation import job, partitions, rules
from deepfm_dist.data.preparation.checksums import TableSum, sums_of_tables
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from tests.data.preparation.content_logs import CASES, log_of, write_rows


def prepared(root: Path, spec: dict[str, Any], name: str = "d") -> Path:
    prepare(DataConfig.model_validate(spec), root, root / name, seed=4)
    return root / name


def contents(folder: Path) -> dict[str, Any]:
    """Rows, vocabularies and entities of a dataset, however they are divided into files."""
    parts = {s: pq.read_table(folder / s) for s in SPLITS}
    for path in [*folder.glob("vocabulary/*"), *folder.glob("entities/*")]:
        parts[path.name] = pq.read_table(path).replace_schema_metadata()
    manifest = Manifest.read(folder)
    parts["numeric"] = {name: spec.model_dump() for name, spec in manifest.numeric.items()}
    parts["hashes"] = manifest.hashes
    return parts


@given(
    st.lists(st.tuples(st.binary(min_size=4, max_size=4), st.lists(st.integers(0, 9))), max_size=9),
    st.lists(st.integers(0, 9)),
)
def test_sums_of_pieces_give_the_sum_of_the_table(
    cells: list[tuple[bytes, list[int]]], cuts: list[int]
) -> None:
    numbers = [int.from_bytes(word, "little", signed=True) for word, _ in cells]
    lists = [values for _, values in cells]
    table = pa.table(
        {
            "n": pa.array(numbers, pa.int32()),
            "text": pa.array([str(n) for n in numbers], pa.string()),
            "bags": pa.array(lists, pa.list_(pa.int32())),
        }
    )
    flat = np.array([v for values in lists for v in values], np.int32)
    expected = zlib.crc32(
        b"n"
        + np.array(numbers, np.int32).tobytes()
        + b"bags"
        + np.array([len(values) for values in lists], np.int64).tobytes()
        + flat.tobytes()
    )
    bounds = sorted({0, len(cells), *(min(cut, len(cells)) for cut in cuts)})
    pieces = [table.slice(a, b - a) for a, b in pairwise(bounds)] or [table]
    sums = [TableSum.of(piece) for piece in pieces]
    assert sum(sums[1:], sums[0]).crc == expected == TableSum.of(table).crc
    named = {f"train/part-{p:05d}.parquet": piece for p, piece in enumerate(sums)}
    assert sums_of_tables(named) == {"train/part-00000.parquet": expected}


@pytest.mark.parametrize("case", CASES)
def test_the_same_rows_give_the_same_dataset_wherever_they_stand(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = log_of(1200)
    plain = write_rows(tmp_path / "plain", rows, "plain")
    expected = contents(prepared(plain, CASES[case]))
    for form in ("shuffled", "split", "gzip", "parquet", "rewritten", "mixed"):
        root = write_rows(tmp_path / form, rows, form)
        found = contents(prepared(root, CASES[case]))
        assert [name for name in expected if found[name] != expected[name]] == [], form
    monkeypatch.setattr(job, "PARTITION_BYTES", 4000)
    partitioned = prepared(tmp_path / "shuffled", CASES[case], "partitioned")
    assert Manifest.read(partitioned).files > 5
    found = contents(partitioned)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("case", ["random", "clicks of users"])
def test_colliding_keys_are_distinguished(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys of 4 bits many rows share each: the cells decide, no row is taken for another."""
    few = np.uint64(0xF000000000000000)
    pair_keys, content_hashes = rules.pair_keys, rules.content_hashes
    monkeypatch.setattr(partitions, "pair_keys", lambda *given: pair_keys(*given) & few)
    monkeypatch.setattr(partitions, "content_hashes", lambda *given: content_hashes(*given) & few)
    monkeypatch.setattr(rules, "content_hashes", lambda *given: content_hashes(*given) & few)
    rows = log_of(600)
    found = [
        contents(prepared(write_rows(tmp_path / form, rows, form), CASES[case]))
        for form in ("plain", "shuffled")
    ]
    assert [name for name in found[0] if found[1][name] != found[0][name]] == []
    kept = sum(len(found[0][s]) if s == "train" or case != "random" else 0 for s in SPLITS)
    if case != "random":
        assert kept == len(rows)
    else:
        held_out = sum(int(np.sum(found[0][s]["label"].to_numpy())) for s in SPLITS[1:])
        assert kept + held_out == len(rows.drop_duplicates(["u", "i"]))


@pytest.mark.parametrize("case", ["random", "clicks"])
def test_rows_stay_on_their_side_when_others_come_or_go(case: str, tmp_path: Path) -> None:
    rows = log_of(3000)
    rows["i"] = np.arange(len(rows)) % 997  # tells rows apart, within their users, too
    rows["c"] = "a"

    def sides(kept: pd.DataFrame, name: str) -> dict[tuple[str, ...], str]:
        root = write_rows(tmp_path / name, kept, "plain")
        folder, found = prepared(root, CASES[case]), {}
        columns = ["user", "item"] if case == "random" else ["i"]
        ids = [pq.read_table(folder / f"vocabulary/{c}.parquet")["id"].to_pylist() for c in columns]
        for split in SPLITS:
            table = pq.read_table(folder / split).to_pandas()
            if "label" in table and case == "random":
                table = table[table["label"] == 1]
            for pair in table[columns].itertuples(index=False):
                found[tuple(str(i[r]) for i, r in zip(ids, pair, strict=True))] = split
        return {pair: side for pair, side in found.items() if "None" not in pair}

    if case == "clicks":
        rows = rows.drop_duplicates("i")
    before = sides(rows, "before")
    for name, kept in (("first", rows.iloc[1:]), ("tenth", rows.iloc[len(rows) // 10 :])):
        after = sides(kept, name)
        both = [pair for pair in after if pair in before]
        moved = sum(before[pair] != after[pair] for pair in both)
        # A tenth fewer rows move each bound by what their own shares differ from the rest's.
        assert len(both) > 0.85 * len(before)
        assert moved <= (1 if name == "first" else 0.05 * len(both)), name


@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100),
        min_size=1,
    ),
    st.randoms(),
)
def test_moments_are_exact_in_any_order_and_division(numbers: list[float], rng: Random) -> None:
    shuffled = rng.sample(numbers, len(numbers))
    cut = rng.randrange(len(numbers))
    pieces = [Moments(), Moments()]
    for piece, part in zip(pieces, (shuffled[:cut], shuffled[cut:]), strict=True):
        piece.add(np.array(part, np.float64))
    found, exact = pieces[0] + pieces[1], [Fraction(x) for x in numbers]
    mean = sum(exact) / len(exact)
    assert found.mean == float(mean)
    variance = float(sum((x - mean) ** 2 for x in exact) / len(exact))
    assert found.variance == pytest.approx(variance, rel=1e-15, abs=1e-290)
    whole = Moments()
    whole.add(np.array(numbers, np.float64))
    assert (found.mean, found.variance) == (whole.mean, whole.variance)
