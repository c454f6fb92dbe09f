"""One numbering of all threads' texts."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from deepfm_dist.data.codes import Codes, hash_order
from deepfm_dist.data.jagged import Int32Array

CodeMaps = list[dict[str, Int32Array]]
"""By thread, for each vocabulary: new codes of its own, and a last element -1 for no value."""


def merge_vocabularies(
    from_threads: Sequence[dict[str, Codes]],
) -> tuple[dict[str, pa.Array], CodeMaps]:
    """Numbers texts in the order of their hashes, whoever met them first.

    Args:
        from_threads: each thread's texts by vocabulary, which are emptied.

    Returns:
        The texts of each vocabulary by their new codes, and every thread's new codes.
    """
    ids: dict[str, pa.Array] = {}
    maps: CodeMaps = [{} for _ in from_threads]
    for name in list(from_threads[0]):
        union, *others = (codes.pop(name) for codes in from_threads)
        n_first = len(union)
        codes = [np.arange(n_first, dtype=np.int32), *(union.encode(c.texts()) for c in others)]
        texts = union.texts()
        order = hash_order(texts, union.hashes)
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        ids[name] = texts.take(pa.array(order))
        for from_thread, own in zip(maps, codes, strict=True):
            from_thread[name] = np.append(place[own], np.int32(-1))
    return ids, maps
