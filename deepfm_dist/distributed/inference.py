"""Scores rows in blocks of fixed height, so that results do not depend on the world size."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deepfm_dist.distributed.world import World
from deepfm_dist.log import progress
from deepfm_dist.model.losses import LabelledRows


def probabilities(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Numerically stable sigmoid in float64."""
    with np.errstate(over="ignore"):  # exp(-z) = inf gives 0, as it should
        result: npt.NDArray[np.float64] = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return result


def dealt_blocks(n_blocks: int, world: World, description: str) -> Iterator[int]:
    """This rank's contiguous blocks; all ranks get the same number, some past the end.

    Look-ups are collective, so a rank without blocks takes part with empty ones.

    Args:
        n_blocks: blocks of all ranks.
        world: the ranks.
        description: the description of the progress bar.
    """
    per_rank = -(-n_blocks // world.world_size)
    with progress(per_rank, description, "block", world.is_first) as bar:
        for block in range(world.rank * per_rank, (world.rank + 1) * per_rank):
            yield block
            bar.update()


@torch.no_grad()
def score_rows(
    model: nn.Module,
    world: World,
    n_rows: int,
    height: int,
    collate: Callable[[int, int], LabelledRows],
    blocks: Iterable[int] | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Logits of this rank's rows. All ranks.

    Args:
        model: the sharded task; its forward returns (loss, logits).
        world: the ranks.
        n_rows: rows of all ranks, or of this one if it names its ``blocks``.
        height: rows per block; a GEMM's last digits depend on it.
        collate: maps (begin, end) to a batch of ``height`` rows; (n, n) is an empty one.
        blocks: this rank's block numbers, the same count on every rank; default: dealt.

    Yields:
        (first row, logits ``[m]``) for each block, in order; rank 0's rows first.
    """
    if blocks is None:
        blocks = dealt_blocks(-(-n_rows // height), world, "score rows")
    for block in blocks:
        begin, end = min(block * height, n_rows), min((block + 1) * height, n_rows)
        _, logits = model(collate(begin, end).to(world.device))
        if end > begin:
            yield begin, world.to_host(logits[: end - begin]).numpy()
