"""Merges the readers' vocabularies into one numbering."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.codes import Codes, Hashes, check_texts, equal_texts, hash_order
from deepfm_dist.data.jagged import Int32Array, Int64Array, offsets_of
from deepfm_dist.data.preparation.crew import Crew

CodeMap = dict[str, Int32Array]
"""By vocabulary: maps a reader's codes to new codes; the last element is -1 for no value."""
_Texts = tuple[pa.Array, Hashes]
"""A reader's texts by its codes, and their hashes."""


def merge_vocabularies(
    from_readers: Sequence[dict[str, Codes]], crew: Crew
) -> tuple[dict[str, pa.Array], list[CodeMap]]:
    """Numbers texts in the order of their hashes, independent of the readers. First thread.

    Args:
        from_readers: each reader's texts by vocabulary; emptied.
        crew: its threads divide the hashes.

    Returns:
        The texts of each vocabulary by their new codes, and every reader's new codes.
    """
    ids: dict[str, pa.Array] = {}
    maps: list[CodeMap] = [{} for _ in from_readers]
    for name in list(from_readers[0]):
        readers = [(codes.texts(), codes.hashes) for codes in (c.pop(name) for c in from_readers)]
        merge = partial(_merge_range, readers, crew.size)
        texts, places = zip(*crew.map(merge, range(crew.size)), strict=True)
        check_texts(sum(map(len, texts)), sum(piece.nbytes for piece in texts))
        ids[name] = pa.concat_arrays(texts)
        first_codes = offsets_of([len(piece) for piece in texts]).astype(np.int32)
        for r, (own_texts, _) in enumerate(readers):
            new_codes = np.full(len(own_texts) + 1, -1, np.int32)
            for first, from_range in zip(first_codes, places, strict=False):
                own, place = from_range[r]
                new_codes[own] = first + place
            maps[r][name] = new_codes
    return ids, maps


def _merge_range(
    readers: Sequence[_Texts], n: int, which: int
) -> tuple[pa.Array, list[tuple[Int64Array, Int32Array]]]:
    """Merges the readers' texts with hashes in one of ``n`` equal ranges.

    Returns:
        The distinct texts in `hash_order`; and for each reader, the codes of its texts in the range
        and their indices.
    """
    own = [np.flatnonzero(_range_of(hashes, n) == which) for _, hashes in readers]
    texts = pa.concat_arrays([t.take(pa.array(o)) for (t, _), o in zip(readers, own, strict=True)])
    hashes = np.concatenate([h[o] for (_, h), o in zip(readers, own, strict=True)])
    order = hash_order(texts, hashes)
    is_first = np.ones(len(order), bool)
    again = 1 + np.flatnonzero(np.diff(hashes[order]) == 0)  # equal hashes of different texts
    is_first[again] = ~equal_texts(texts, order[again], order[again - 1])
    place = np.empty(len(order), np.int32)
    place[order] = np.cumsum(is_first, dtype=np.int32) - 1
    bounds = offsets_of([len(o) for o in own])
    places = [place[begin:end] for begin, end in pairwise(bounds)]
    return texts.take(pa.array(order[is_first])), list(zip(own, places, strict=True))


def _range_of(hashes: Hashes, n: int) -> npt.NDArray[np.uint64]:
    """``[m]`` ranges in ``[0, n)``, in the order of the hashes."""
    return ((hashes >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)
