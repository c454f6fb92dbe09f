"""Codes against a dictionary, hashes against the published function."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data import codes as codes_module
from deepfm_dist.data.codes import Codes, argsort_words, hash_texts
from deepfm_dist.data.preparation.crew import Crew, run_crew
from deepfm_dist.data.preparation.merge import merge_vocabularies
from deepfm_dist.errors import DataError
from deepfm_dist.seeding import mix

TEXTS = st.none() | st.text(max_size=5) | st.sampled_from(["a", "b", "0", "00", ""])


@given(st.lists(st.lists(TEXTS, max_size=30), max_size=6), st.integers(0, 3))
def test_codes_equal_a_dictionary_over_any_batches(
    batches: list[list[str | None]], skipped: int
) -> None:
    codes, known = Codes(), dict[str, int]()
    for texts in batches:
        array = pa.array([*["x"] * skipped, *texts], pa.string()).slice(skipped)
        expected = [-1 if t is None else known.setdefault(t, len(known)) for t in texts]
        assert codes.encode(array).tolist() == expected
    assert codes.texts().to_pylist() == [*known]
    assert len(codes) == len(known)
    assert codes.hashes.tolist() == hash_texts(pa.array([*known], pa.string())).tolist()


def test_many_and_long_texts_make_it_grow() -> None:
    texts = [f"{i * 7919}" for i in range(20_000)] + ["long " * 20_000] * 2
    codes = Codes()
    actual = codes.encode(pa.array(texts)).tolist()
    assert actual == [*range(20_001), 20_000]
    assert codes.texts().to_pylist() == texts[:-1]
    assert codes.encode(pa.array(texts[::-1])).tolist() == actual[::-1]


@pytest.mark.parametrize("text", ["", "a", "foobar", "é漢"])
def test_hashes_are_fnv_1a_mixed(text: str) -> None:
    word = 0xCBF29CE484222325
    for byte in text.encode():
        word = (word ^ byte) * 0x100000001B3 % 2**64
    if text == "foobar":
        assert word == 0x85944171F73967E8  # of the published test vectors
    assert hash_texts(pa.array([text])).tolist() == [int(mix(np.uint64(word)))]


def test_more_text_than_arrow_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes_module, "MOST_TEXT_BYTES", 5)
    some = Codes()
    some.encode(pa.array(["abc", "de"]))
    assert some.texts().to_pylist() == ["abc", "de"]
    some.encode(pa.array(["f"]))
    with pytest.raises(DataError, match=r"3 distinct values .* are 6 bytes .*; set hash_rows"):
        some.texts()


@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9) | st.integers(2**63, 2**63 + 300)),
    st.integers(1, 40),
)
def test_words_are_sorted_as_numpy_sorts_them(words: list[int], repeated: int) -> None:
    array = np.tile(np.array(words, np.uint64), repeated)
    assert argsort_words(array).tolist() == np.argsort(array, kind="stable").tolist()


class _Reader:
    """A reader's codes whose hashes are of few bits: most of them collide."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.hashes = np.array([(len(t) % 3) << 62 for t in texts], np.uint64)

    def texts(self) -> pa.Array:
        return pa.array(self._texts, pa.string())


@given(
    st.lists(st.lists(st.text("ab", max_size=5), unique=True), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_different_texts_of_one_hash_keep_codes_of_their_own(
    readers: list[list[str]], threads: int
) -> None:
    def merge(crew: Crew) -> Any:
        if not crew.is_first:
            return None
        return merge_vocabularies([{"v": _Reader(texts)} for texts in readers], crew)  # type: ignore[dict-item]

    ids, maps = run_crew(threads, merge)
    together = {text for texts in readers for text in texts}
    assert ids["v"].to_pylist() == sorted(together, key=lambda text: (len(text) % 3, text))
    for texts, from_reader in zip(readers, maps, strict=True):
        assert [ids["v"][code].as_py() for code in from_reader["v"][:-1].tolist()] == texts
        assert from_reader["v"][-1] == -1
