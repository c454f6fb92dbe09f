"""Codes against a dictionary, hashes against the published function."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data import codes as codes_module
from deepfm_dist.data.codes import Codes, hash_texts
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
    found = codes.encode(pa.array(texts)).tolist()
    assert found == [*range(20_001), 20_000]
    assert codes.texts().to_pylist() == texts[:-1]
    assert codes.encode(pa.array(texts[::-1])).tolist() == found[::-1]


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
