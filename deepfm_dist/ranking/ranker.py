"""Every user's best items from the sharded model."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from deepfm_dist.data.dataset import ABSENT, Collator, PreparedDataset, padded
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, Values
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.distributed.inference import dealt_blocks
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import DataError
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.catalogue import CatalogueScorer, Side
from deepfm_dist.ranking.topk import mask_of, masked_top_k

USER_BLOCK = 256
ITEM_BLOCK = 4096

Scores = Callable[[int, int], Tensor]
"""(first, last + 1) of a stretch of users -> ``[at least that many, I]`` scores. All ranks."""

Ranked = tuple[int, Int64Array, npt.NDArray[np.float32]]
"""(first user, positions ``[m, K]``, scores ``[m, K]``)"""


class Catalogue:
    """The items that can be recommended, in the order of their external ids.

    Args:
        dataset: the prepared dataset.

    Raises:
        DataError: its rows have no users or no items.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        if set(dataset.manifest.entities) != {"user", "item"}:
            raise DataError(
                f"{dataset.folder}: top items need rows with users and items; name "
                f"data.interactions.user and .item"
            )
        ids = dataset.entity_ids("item").slice(1)
        order = np.argsort(id_order(ids))
        self.rows: Int32Array = (order + 1).astype(np.int32)
        """``[I]`` item rows by position."""
        self.ids: pa.Array = ids.take(pa.array(order))
        """``[I]`` external ids by position."""
        self._position = np.full(len(ids) + 1, -1, np.int32)
        self._position[self.rows] = np.arange(len(ids))

    def __len__(self) -> int:
        return len(self.rows)

    def seen_by(self, users: Int32Array, positives: list[Jagged]) -> Jagged:
        """Positions of the items that some users have in any of several lists.

        Args:
            users: ``[n]`` rows of the user table.
            positives: item rows of every user.
        """
        owners, items = [], []
        for part in positives:
            lengths, values = part.take(users)
            owners.append(np.repeat(np.arange(len(users)), lengths))
            items.append(self._position[values])
        if not owners:
            return Jagged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
        return Jagged.from_pairs(np.concatenate(owners), np.concatenate(items), len(users))


class ModelScores:
    """The model's logits for stretches of users and the whole catalogue. All ranks.

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        dataset: the prepared dataset.
        catalogue: its items.
        users: ``[n]`` rows of the user table, in the order they will be asked for.
        context: one row of context fields.
    """

    def __init__(
        self,
        model: DeepFM,
        world: World,
        dataset: PreparedDataset,
        catalogue: Catalogue,
        users: Int32Array,
        context: Mapping[str, Values],
    ) -> None:
        self._model, self._world, self._users, self._context = model, world, users, context
        self._collate = Collator(dataset)
        manifest = dataset.manifest
        fields = [*manifest.categorical, *manifest.dense]
        self._scorer = CatalogueScorer(
            model.interaction_arch,
            [f.entity == "item" for f in fields],
            len(manifest.categorical),
        )
        self._items = self._all_items(catalogue.rows)

    def __call__(self, begin: int, end: int) -> Tensor:
        """``[USER_BLOCK, I]`` logits of users ``begin`` to ``end``; the rest is padding."""
        users = padded(self._users[begin:end], USER_BLOCK, ABSENT)
        return self._scorer.scores(self._side("user", users), self._items)

    @torch.no_grad()
    def _side(self, which: str, rows: Int32Array) -> Side:
        if which == "user":
            batch = self._collate(rows, None, self._context, np.zeros(len(rows), np.int32))
        else:
            batch = self._collate(None, rows)
        batch = batch.to(self._world.device)
        factors, first_order = self._model.embedding_arch(batch.sparse)
        return self._scorer.side(which, factors, first_order, batch.dense)

    def _all_items(self, rows: Int32Array) -> Side:
        """The item side of the whole catalogue, computed in shares and gathered on every rank."""
        n_blocks = -(-len(rows) // ITEM_BLOCK)
        sides = []
        for block in dealt_blocks(n_blocks, self._world, "items"):
            mine = rows[block * ITEM_BLOCK : (block + 1) * ITEM_BLOCK]
            sides.append(self._side("item", padded(mine, ITEM_BLOCK, ABSENT)))

        def gathered(pieces: list[Tensor]) -> Tensor:
            mine = torch.cat(pieces).contiguous()
            parts = [torch.empty_like(mine) for _ in range(self._world.world_size)]
            dist.all_gather(parts, mine)
            return torch.cat(parts)[: len(rows)].contiguous()

        return Side(
            gathered([s.constant for s in sides]),
            gathered([s.factor_sum for s in sides]),
            gathered([s.hidden for s in sides]),
        )


def rank_users(scores: Scores, seen: Jagged, k: int, world: World) -> Iterator[Ranked]:
    """This rank's users' best K items. All ranks.

    Args:
        scores: of stretches of users.
        seen: each user's masked positions; its length is the number of users.
        k: K.
        world: the ranks.

    Yields:
        A block of users at a time, in order; the users of ranks follow one another.
    """
    n_users = len(seen)
    mask = mask_of(seen, world.device)
    for block in dealt_blocks(-(-n_users // USER_BLOCK), world, "rank items"):
        begin, end = min(block * USER_BLOCK, n_users), min((block + 1) * USER_BLOCK, n_users)
        block_scores = scores(begin, end)[: end - begin]
        if end > begin:
            positions, best = masked_top_k(block_scores, mask(begin, end), k)
            yield begin, positions.cpu().numpy(), best.cpu().numpy()


def gather_ranked(ranked: Iterator[Ranked], k: int, world: World) -> Int64Array | None:
    """Positions of all users, ``[U, K]``, on rank 0; None elsewhere. All ranks."""
    pieces = world.gather([positions for _, positions, _ in ranked])
    if pieces is None:
        return None
    blocks = [block for piece in pieces for block in piece]
    return np.concatenate(blocks) if blocks else np.zeros((0, k), np.int64)


def constant_scores(per_item: npt.NDArray[np.number], device: torch.device) -> Scores:
    """The same score of an item for every user: popularity."""
    row = torch.from_numpy(per_item.astype(np.float32)).to(device)
    return partial(_repeated, row)


def _repeated(row: Tensor, begin: int, end: int) -> Tensor:
    return row.repeat(end - begin, 1)
