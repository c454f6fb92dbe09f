from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data.codes import Codes, hash_order
from deepfm_dist.data.vocabulary import Vocabulary, external, id_order
from deepfm_dist.seeding import mix


def encode_distinct(ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
    codes = Codes()
    return codes.encode(ids), codes.texts()


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30))
def test_ids_survive_the_round_trip(ids: list[str]) -> None:
    codes, distinct = encode_distinct(pa.array(ids))
    assert distinct.take(pa.array(codes)).to_pylist() == ids
    counts = np.bincount(codes).astype(np.int64)
    vocabulary, _ = Vocabulary.fit(distinct, counts, 1, seed=3)
    rows = vocabulary.lookup(pa.array(ids))
    assert rows.min() >= 1
    assert [vocabulary.ids[int(r) - 1].as_py() for r in rows] == ids
    shuffled = encode_distinct(pa.array(ids[::-1]))
    again, _ = Vocabulary.fit(shuffled[1], np.bincount(shuffled[0]).astype(np.int64), 1, seed=3)
    assert again.ids.equals(vocabulary.ids)


def test_rare_and_unknown_ids_share_row_zero(tmp_path: Path) -> None:
    ids, counts = pa.array(["a", "b", "c"]), np.array([5, 1, 0])
    vocabulary, rows = Vocabulary.fit(ids, counts, 2, seed=1)
    assert vocabulary.rows == 2
    assert rows.tolist() == vocabulary.lookup(ids).tolist()
    assert vocabulary.lookup(pa.array(["a", "b", "c", "zz", None])).tolist() == [1, 0, 0, 0, 0]
    vocabulary.write(tmp_path / "v.parquet")
    again = Vocabulary.from_table(pq.read_table(tmp_path / "v.parquet"))
    assert again.ids.equals(vocabulary.ids)
    assert again.counts.tolist() == [5]
    nobody, _ = Vocabulary.fit(ids, counts, 9, seed=1)
    nobody.write(tmp_path / "v.parquet")
    assert Vocabulary.from_table(pq.read_table(tmp_path / "v.parquet")).lookup(ids).tolist() == [
        0,
        0,
        0,
    ]


def test_ids_go_out_as_numbers_only_if_all_are_plain_ones() -> None:
    assert external(pa.array(["10", "9"])).to_pylist() == [10, 9]
    assert external(pa.array(["10", "007"])).to_pylist() == ["10", "007"]


@given(st.lists(st.integers(-(10**12), 10**12), unique=True), st.lists(st.text(), unique=True))
def test_numbers_are_ordered_by_value_and_texts_by_code_point(
    numbers: list[int], texts: list[str]
) -> None:
    texts = [*texts, "x"]  # one that is no number makes all of them texts
    for ids, place in (
        ([str(n) for n in numbers], {str(n): i for i, n in enumerate(sorted(numbers))}),
        ([*dict.fromkeys(texts)], {t: i for i, t in enumerate(sorted(set(texts)))}),
    ):
        assert id_order(pa.array(ids, pa.string())).tolist() == [place[i] for i in ids]


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 4), min_size=1), st.integers(0, 99))
def test_rows_go_by_a_seeded_hash_of_the_id(count: dict[str, int], seed: int) -> None:
    vocabulary, _ = Vocabulary.fit(
        pa.array([*count], pa.string()), np.array([*count.values()]), 2, seed
    )

    def place(text: str) -> int:
        word = 0xCBF29CE484222325
        for byte in text.encode():
            word = (word ^ byte) * 0x100000001B3 % 2**64
        return int(mix(np.uint64(seed) ^ mix(np.uint64(word))))

    assert vocabulary.ids.to_pylist() == sorted((i for i in count if count[i] >= 2), key=place)
    assert vocabulary.counts.tolist() == [count[i] for i in vocabulary.ids.to_pylist()]


@given(st.lists(st.text(max_size=3), unique=True), st.data())
def test_ids_whose_hashes_are_equal_are_ordered_by_their_texts(
    ids: list[str], data: st.DataObject
) -> None:
    hashes = data.draw(st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids)))
    order = hash_order(pa.array(ids, pa.string()), np.array(hashes, np.uint64))
    assert order.tolist() == sorted(range(len(ids)), key=lambda k: (hashes[k], ids[k]))


def test_later_ids_are_appended_and_spread_among_themselves() -> None:
    first = pa.array([f"a{i}" for i in range(50)])
    earlier, _ = Vocabulary.fit(first, np.arange(50), 1, seed=1)  # a0, never seen, has no row
    ids = pa.array([f"a{i}" for i in range(40, 90)])
    counts = np.where(np.arange(50) == 20, 1, 2)  # a60 comes once
    grown, rows = Vocabulary.fit(ids, counts, 2, 9, earlier)
    assert rows.tolist() == grown.lookup(ids).tolist()
    assert grown.ids.slice(0, 49).equals(earlier.ids)
    appended = grown.ids.slice(49).to_pylist()
    assert sorted(appended) == sorted(f"a{i}" for i in range(50, 90) if i != 60)
    assert appended != sorted(appended)
    of = dict(zip(grown.ids.to_pylist(), grown.counts.tolist(), strict=True))
    assert (of["a3"], of["a45"], of["a88"]) == (3, 47, 2)


@pytest.mark.parametrize("seed", range(8))
def test_no_row_wise_shard_is_hot(seed: int) -> None:
    n = 6807
    counts = (1e6 / (np.arange(n) + 20) ** 1.1).astype(np.int64) + 1
    vocabulary, _ = Vocabulary.fit(pa.array([str(i) for i in range(n)]), counts, 1, seed)
    block = -(-vocabulary.rows // 4)  # TorchRec cuts ceil(rows / ranks) rows for each rank
    in_rows = np.concatenate([[0], vocabulary.counts])
    shards = np.add.reduceat(in_rows, np.arange(0, vocabulary.rows, block))
    assert shards.max() <= 1.15 * shards.mean()
    assert np.sort(in_rows)[::-1][:block].sum() > 2 * shards.mean()  # what sorting would do
