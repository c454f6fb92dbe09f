from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data.vocabulary import Vocabulary, encode_distinct, external


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30))
def test_ids_survive_the_round_trip(ids: list[str]) -> None:
    codes, distinct = encode_distinct(pa.array(ids))
    assert distinct.take(pa.array(codes)).to_pylist() == ids
    counts = np.bincount(codes).astype(np.int64)
    vocabulary = Vocabulary.fit(distinct, counts, 1, seed=3)
    rows = vocabulary.lookup(pa.array(ids))
    assert rows.min() >= 1
    assert [vocabulary.ids[int(r) - 1].as_py() for r in rows] == ids
    shuffled = encode_distinct(pa.array(ids[::-1]))
    again = Vocabulary.fit(shuffled[1], np.bincount(shuffled[0]).astype(np.int64), 1, seed=3)
    assert again.ids.equals(vocabulary.ids)


def test_rare_and_unknown_ids_share_row_zero(tmp_path: Path) -> None:
    ids, counts = pa.array(["a", "b", "c"]), np.array([5, 1, 0])
    vocabulary = Vocabulary.fit(ids, counts, 2, seed=1)
    assert vocabulary.rows == 2
    assert vocabulary.lookup(pa.array(["a", "b", "c", "zz", None])).tolist() == [1, 0, 0, 0, 0]
    vocabulary.write(tmp_path / "v.parquet")
    assert Vocabulary.read(tmp_path / "v.parquet").ids.equals(vocabulary.ids)


def test_ids_go_out_as_numbers_only_if_all_are_plain_ones() -> None:
    assert external(pa.array(["10", "9"])).to_pylist() == [10, 9]
    assert external(pa.array(["10", "007"])).to_pylist() == ["10", "007"]
    assert encode_distinct(pa.array(["10", "9"]))[1].to_pylist() == ["9", "10"]


def test_no_row_wise_shard_is_hot() -> None:
    n = 6807
    counts = (1e6 / (np.arange(n) + 20) ** 1.1).astype(np.int64) + 1
    vocabulary = Vocabulary.fit(pa.array([str(i) for i in range(n)]), counts, 1, seed=1)
    block = -(-vocabulary.rows // 4)
    in_rows = np.concatenate([[0], vocabulary.counts])
    shards = np.add.reduceat(in_rows, np.arange(0, vocabulary.rows, block))
    assert shards.max() <= 1.15 * shards.mean()
    assert np.sort(in_rows)[::-1][:block].sum() > 2 * shards.mean()  # what sorting would do
