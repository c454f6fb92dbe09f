"""Held-out rows through the sharded model."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from torch import nn

from deepfm_dist.data.batch import Batch
from deepfm_dist.data.dataset import ABSENT, Collator, PreparedDataset, Rows, padded
from deepfm_dist.distributed.inference import score_rows
from deepfm_dist.distributed.world import World
from deepfm_dist.training.metrics import FloatArray, click_metrics

BLOCK_ROWS = 8192
Hearer = Callable[[FloatArray, FloatArray, FloatArray | None], None]


class HeldOut:
    """The labelled rows of a split, ready to be scored again and again.

    Args:
        dataset: the prepared dataset.
        split: valid or test.
    """

    def __init__(self, dataset: PreparedDataset, split: str) -> None:
        self.rows = dataset.rows(split)
        self._collate = Collator(dataset)

    def metrics(
        self, model: nn.Module, world: World, hear: Hearer | None = None
    ) -> Mapping[str, float]:
        """The figures of `click_metrics`, on rank 0; empty elsewhere. All ranks.

        Args:
            model: the sharded task in eval mode.
            world: the ranks.
            hear: is told of this rank's rows, block by block: labels, logits, weights.
        """
        assert self.rows.labels is not None
        found = []
        for begin, logits in score_rows(model, world, self.rows.n, BLOCK_ROWS, self._block):
            found.append(logits)
            if hear is not None:
                hear(self.rows.labels[begin : begin + len(logits)], logits, None)
        pieces = world.gather(found)
        if pieces is None:
            return {}
        logits = np.concatenate([block for piece in pieces for block in piece])
        return click_metrics(self.rows.labels, logits, self.rows.users)

    def _block(self, begin: int, end: int) -> Batch:
        return collate_rows(self._collate, self.rows, begin, end, BLOCK_ROWS)


def collate_rows(collate: Collator, rows: Rows, begin: int, end: int, height: int) -> Batch:
    """Rows ``begin`` to ``end`` as a batch of ``height``, padded with empty ones."""

    def piece(column: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32] | None:
        block: npt.NDArray[np.int32] | None = padded(
            None if column is None else column[begin:end], height, ABSENT
        )
        return block

    return collate(
        piece(rows.users),
        piece(rows.items),
        rows.context,
        padded(np.arange(begin, end), height, ABSENT),
        n_real=end - begin,
    )
