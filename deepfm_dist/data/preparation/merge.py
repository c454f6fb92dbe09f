"""One numbering of all readers' texts."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from deepfm_dist.data.codes import Codes, hash_order
from deepfm_dist.data.jagged import Int32Array

CodeMap = dict[str, Int32Array]
"""For each vocabulary: the new codes of a reader's codes, and a last element -1 for no value."""


def merge_vocabularies(
    from_readers: Sequence[dict[str, Codes]],
) -> tuple[dict[str, pa.Array], list[CodeMap]]:
    """Numbers texts in the order of their hashes, whoever met them first.

    Args:
        from_readers: each reader's texts by vocabulary, which are emptied.

    Returns:
        The texts of each vocabulary by their new codes, and every reader's new codes.
    """
    ids: dict[str, pa.Array] = {}
    maps: list[CodeMap] = [{} for _ in from_readers]
    for name in list(from_readers[0]):
        union, *others = (codes.pop(name) for codes in from_readers)
        n_first = len(union)
        codes = [np.arange(n_first, dtype=np.int32), *(union.encode(c.texts()) for c in others)]
        texts = union.texts()
        order = hash_order(texts, union.hashes)
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        ids[name] = texts.take(pa.array(order))
        for from_reader, own in zip(maps, codes, strict=True):
            from_reader[name] = np.append(place[own], np.int32(-1))
    return ids, maps
