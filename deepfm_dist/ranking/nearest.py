"""Candidates from an approximate nearest-neighbour index of item vectors."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import brief
from deepfm_dist.ranking.topk import NO_ITEM


class NearestItems:
    """A faiss index that approximately ranks items by the model without its over-arch.

    An item's point is its summed factor vector and its constant. The inner product with a user's
    summed vector and 1 is the score minus the user's constant.

    Args:
        points: ``[I, D + 1]`` float32 of all items, the same on all ranks.
        kind: faiss factory string: ``IVF1024,Flat``, ``HNSW32``.
        probes: number of lists searched in an inverted file.

    Raises:
        ConfigError: faiss is missing, or cannot make such an index of these points.
    """

    def __init__(self, points: npt.NDArray[np.float32], kind: str, probes: int) -> None:
        if find_spec("faiss") is None:
            raise ConfigError(
                f"recommend.index={kind}: faiss is not installed; pip install faiss-cpu, or leave "
                f"it out: then all items are scored"
            )
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            index = faiss.index_factory(points.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
            index.train(points)
            index.add(points)
        except RuntimeError as error:
            text = brief(error).rpartition("Error: ")[2]
            raise ConfigError(
                f"recommend.index={kind}: faiss cannot make it of {len(points):,} items: {text}"
            ) from None
        inverted = faiss.try_extract_index_ivf(index)  # it may be nested: PCA32,IVF1024,Flat,RFlat
        if inverted is not None:
            inverted.nprobe = probes
        self._index = index

    def candidates(self, users: Sequence[Tensor], n: int, seen: Jagged, count: int) -> Tensor:
        """``[n, count]`` positions of unseen items; `NO_ITEM` in empty slots.

        Args:
            users: ``[b, D]`` blocks of their sums of factor vectors, on the CPU.
            n: how many of them are wanted.
            seen: their masked positions.
            count: items wanted.
        """
        candidates = np.full((n, count), NO_ITEM, np.int64)
        begin = 0
        for block in users:
            here = min(len(block), n - begin)
            if here > 0:
                points = np.concatenate([block[:here].numpy(), np.ones((here, 1), np.float32)], 1)
                lengths = seen.lengths[begin : begin + here]
                # Seen items tend to rank high: fetch that many more, or the list would be short.
                wanted = min(count + int(lengths.max(initial=0)), self._index.ntotal)
                nearest = self._index.search(points, wanted)[1]
                low, high = seen.offsets[begin], seen.offsets[begin + here]
                # Both as one sorted list of (user, position) numbers.
                owners = np.arange(here, dtype=np.int64)[:, None] << 32
                masked = np.repeat(owners[:, 0], lengths) + seen.values[low:high]
                known = (nearest >= 0) & ~np.isin(owners + nearest, masked)
                place = np.cumsum(known, 1) - 1
                known &= place < count
                user, column = np.nonzero(known)
                candidates[begin + user, place[user, column]] = nearest[user, column]
            begin += here
        return torch.from_numpy(candidates)
