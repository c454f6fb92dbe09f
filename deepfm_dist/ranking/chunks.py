"""Ranks users in chunks that are dealt to the ranks."""

import logging
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.distributed.world import World
from deepfm_dist.log import progress
from deepfm_dist.ranking.items import Seen
from deepfm_dist.ranking.ranker import USERS_AT_ONCE, Ranker
from deepfm_dist.ranking.types import USER_BLOCK

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0
"""Seconds between progress log lines if there is no progress bar."""

Ranked = tuple[int, Int64Array, npt.NDArray[np.float32]]
"""(first user, positions ``[m, K]``, scores ``[m, K]``)"""


def users_per_chunk(n_users: int) -> int:
    """Number of users to rank and write together: about 64 chunks of 512 to 65,536 users.

    It is the same at every world size.
    """
    return min(max(math.ceil(n_users / 64 / USER_BLOCK), 1), 128) * USER_BLOCK


def rank_users(
    ranker: Ranker,
    n_users: int,
    seen: Seen,
    k: int,
    world: World,
    chunks: Sequence[int] | None = None,
    description: str = "rank items",
) -> Iterator[Ranked]:
    """This rank's users' best K items. All ranks.

    Args:
        ranker: the ranker of the catalogue.
        n_users: number of users.
        seen: their masked positions.
        k: K.
        world: the ranks.
        chunks: numbers of chunks of `users_per_chunk` users, the same on all ranks; default: all.
        description: the description of the progress bar.

    Yields:
        A chunk of users at a time, in order; rank 0's users first.
    """
    size = users_per_chunk(n_users)
    mine, at_once = _my_chunks(n_users, world, chunks), max(1, USERS_AT_ONCE // size)
    users: Sequence[object] = ()
    for number, (begin, end) in enumerate(
        deal_chunks(n_users, len(ranker), world, chunks, description)
    ):
        if number % at_once == 0:
            users = ranker.prepare(mine[number : number + at_once], size)
        positions, scores = ranker.best(users[number % at_once], seen(begin, end), k)
        if end > begin:
            yield begin, positions, scores


def deal_chunks(
    n_users: int,
    n_items: int,
    world: World,
    chunks: Sequence[int] | None = None,
    description: str = "rank items",
) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of this rank's chunks; padded with empty ones to the same number per rank.

    Args:
        n_users: number of users on all ranks.
        n_items: number of items in the catalogue, for the pairs per second that rank 0 reports.
        world: the ranks.
        chunks: numbers of the chunks; default: all.
        description: the description of the progress bar.
    """
    mine = _my_chunks(n_users, world, chunks)
    total = sum(end - begin for begin, end in mine) * n_items
    done, start, logged = 0, time.monotonic(), time.monotonic()
    with progress(total, description, "pair", world.is_first) as bar:
        for begin, end in mine:
            yield begin, end
            bar.update((end - begin) * n_items)
            done += (end - begin) * n_items
            now = time.monotonic()
            if bar.disable and now - logged > LOG_EVERY_S and done < total:
                logged, rate = now, done / (now - start)
                log.info(
                    "%s: %.0f %% of this rank's pairs, %.3g M pairs/s, %.0f s left",
                    description,
                    100 * done / total,
                    rate / 1e6,
                    (total - done) / rate,
                )


def _my_chunks(n_users: int, world: World, chunks: Sequence[int] | None) -> list[tuple[int, int]]:
    """Implements `deal_chunks`."""
    size = users_per_chunk(n_users)
    numbers = list(range(-(-n_users // size))) if chunks is None else list(chunks)
    per_rank = -(-len(numbers) // world.world_size)
    mine = numbers[world.rank * per_rank : (world.rank + 1) * per_rank]
    bounds = [(n * size, min((n + 1) * size, n_users)) for n in mine]
    return bounds + [(n_users, n_users)] * (per_rank - len(mine))


def gather_ranked(ranked: Iterator[Ranked], k: int, world: World) -> Int64Array | None:
    """Positions of all users, ``[U, K]``, on rank 0; None elsewhere. All ranks."""
    pieces = world.gather_object([positions for _, positions, _ in ranked])
    if pieces is None:
        return None
    blocks = [block for piece in pieces for block in piece]
    return np.concatenate(blocks) if blocks else np.zeros((0, k), np.int64)
