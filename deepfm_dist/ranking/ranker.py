"""Every user's best items from the sharded model."""

import copy
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from deepfm_dist.data.dataset import (
    ABSENT,
    Collator,
    DrawnHistories,
    PreparedDataset,
    padded,
)
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, Values, offsets_of
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.distributed.process_group import World
from deepfm_dist.errors import DataError
from deepfm_dist.log import progress
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.engines.selection import engine_for
from deepfm_dist.ranking.nearest import NearestItems
from deepfm_dist.ranking.topk import best_of_keys, keys_of, mask_of, masked_top_k
from deepfm_dist.ranking.types import USER_BLOCK, Best, Precision

log = logging.getLogger(__name__)

ITEM_BLOCK = 1024
"""Items looked up and multiplied together."""
USERS_AT_ONCE = 8192
"""Users looked up together, at most. Ranks wait for each other at a look-up: one a second costs
little, one every 60 ms kept two ranks at 1.6 times the speed of one (benchmarks/recommend.py)."""
MEMORY_BYTES = 1 << 30
"""Default limit of what a rank keeps of the items."""
SAY_EVERY_S = 30.0
"""Seconds between two lines of progress where there is no bar."""

Ranked = tuple[int, Int64Array, npt.NDArray[np.float32]]
"""(first user, positions ``[m, K]``, scores ``[m, K]``)"""
Group = tuple[Any, int, Jagged]
"""(users prepared by the engine, how many, their masked positions)"""
Seen = Callable[[int, int], Jagged]
"""(first user, last + 1) -> each one's masked positions. A rank asks for its own users only."""


class Ranker(Protocol):
    """Ranks the catalogue for stretches of users."""

    def look_up(self, stretches: Sequence[tuple[int, int]], height: int) -> None:
        """Hears ahead whom `best` will be asked for next, in this order. All ranks.

        Not every ranker has something to prepare.

        Args:
            stretches: (first user, last + 1) of each; as many on all ranks.
            height: users of the longest stretch of any rank.
        """
        return None

    def best(
        self, begin: int, end: int, height: int, seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Positions and scores, ``[end - begin, K]`` each. All ranks.

        Args:
            begin: first user.
            end: last user + 1; ``begin`` for a rank that has run out of users.
            height: users of the longest stretch of any rank.
            seen: the users' masked positions.
            k: K.
        """

    def __len__(self) -> int:
        """Number of items."""


class Catalogue:
    """The items that can be recommended, in the order of their external ids.

    Args:
        dataset: the prepared dataset.
        rows: item rows that can be recommended; default: all.

    Raises:
        DataError: its rows have no users or no items.
    """

    def __init__(
        self, dataset: PreparedDataset, rows: npt.NDArray[np.integer] | None = None
    ) -> None:
        if set(dataset.manifest.entities) != {"user", "item"}:
            raise DataError(
                f"{dataset.folder}: top items need rows with users and items; name "
                f"data.interactions.user and .item"
            )
        self.rows, self.ids = in_id_order(dataset, "item", rows)
        """``[I]`` item rows and external ids by position."""
        self._position = np.full(dataset.manifest.entities["item"], -1, np.int32)
        self._position[self.rows] = np.arange(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def seen_by(self, users: Int32Array, positives: list[Jagged]) -> Seen:
        """Positions of the items that users have in any of several lists.

        Args:
            users: ``[n]`` rows of the user table, in the order they will be asked for.
            positives: item rows of every user.
        """
        return lambda begin, end: self._seen_by(users[begin:end], positives)

    def _seen_by(self, users: Int32Array, positives: list[Jagged]) -> Jagged:
        parts = [part.take(users) for part in positives]
        offsets = np.zeros(len(users) + 1, np.int64)
        for lengths, _ in parts:
            offsets[1:] += lengths
        np.cumsum(offsets, out=offsets)
        values = np.empty(offsets[-1], np.int32)
        room = offsets[:-1].copy()
        for lengths, items in parts:
            # Each value's place: its user's next free one, and how many of its own came before.
            first = np.repeat(room - (np.cumsum(lengths) - lengths), lengths)
            values[first + np.arange(len(items))] = self._position[items]
            room += lengths
        return Jagged(offsets, values)


def in_id_order(
    dataset: PreparedDataset, entity: str, rows: npt.NDArray[np.integer] | None = None
) -> tuple[Int32Array, pa.Array]:
    """Rows of users or items, by default all, and their external ids, in the order of the ids."""
    ids = dataset.entity_ids(entity).slice(1)
    order = np.argsort(id_order(ids))
    if rows is not None:
        order = order[np.isin(order + 1, rows)]
    return (order + 1).astype(np.int32), ids.take(pa.array(order))


class ModelRanker:
    """Ranks by the model's logits. All ranks.

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        dataset: the prepared dataset.
        catalogue: its items.
        users: ``[n]`` rows of the user table, in the order they will be asked for.
        context: one row of context fields.
        memory_bytes: limit of what a rank keeps of the items. Of a larger catalogue each rank keeps
            a share, which all ranks' users are brought to; one that exceeds that too is worked off
            in blocks, computed anew for every stretch of users.
        histories: item rows of users from outside the dataset, who are nothing but these; then
            ``users`` are rows of it.
        precision: of the over-arch's products on CUDA.
    """

    def __init__(
        self,
        model: DeepFM,
        world: World,
        dataset: PreparedDataset,
        catalogue: Catalogue,
        users: Int32Array,
        context: Mapping[str, Values],
        memory_bytes: int = MEMORY_BYTES,
        histories: Jagged | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self._histories = histories
        self._drawn = None if histories is None else DrawnHistories(dataset)
        self._model, self._world, self._users, self._context = model, world, users, context
        self._collate = Collator(dataset)
        manifest = dataset.manifest
        scorer = CatalogueScorer(
            model.interaction_arch,
            manifest.of_item,
            len(manifest.categorical),
        )
        self._scorer = scorer
        self.has_deep_part = scorer.layers != []
        self.engine = engine_for(scorer, world.device, precision)
        self._rows = catalogue.rows
        self._candidates: int | None = None
        self._index: NearestItems | None = None
        self._ahead = deque[tuple[int, list[Side]]]()
        one = self._side("item", padded(self._rows[:1], ITEM_BLOCK, ABSENT))
        item_bytes = sum(t[0].nbytes for t in one.tensors) + self.engine.work_bytes
        per_block = max(1, memory_bytes // (item_bytes * ITEM_BLOCK)) * ITEM_BLOCK
        n, size = len(self._rows), world.world_size
        # Whole blocks of the kernels, so that an item's place in one is the same everywhere.
        share = -(-n // (size * ITEM_BLOCK)) * ITEM_BLOCK
        self._share = share if per_block < n and share <= per_block else None
        self._item_begins = range(0, n, per_block)
        kept = self._share or min(per_block, n)
        log.info(
            "%s items, %s of them in memory %s, %.1f MB of %.1f MB",
            f"{n:,}",
            f"{kept:,}",
            "of each rank" if self._share else "at a time",
            item_bytes * kept / 1e6,
            item_bytes * n / 1e6,
        )
        self._kept: Any = None
        if self._share:
            self._kept = self._my_share(self._share)
        elif len(self._item_begins) == 1:
            self._kept = self._item_block(0, per_block)

    def __len__(self) -> int:
        """Number of items."""
        return len(self._rows)

    def of(
        self, users: Int32Array, candidates: int | None, index: NearestItems | None = None
    ) -> Self:
        """The same for other users.

        Args:
            users: ``[n]`` rows of the user table.
            candidates: how many items, the best without the over-arch, are scored in full; None:
                all.
            index: that finds these; None: all items are looked at.
        """
        other = copy.copy(self)
        other._users, other._candidates, other._index = users, candidates, index
        other._ahead = deque()
        return other

    def best(
        self, begin: int, end: int, height: int, seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Ranks a stretch of users; see `Ranker`."""
        sides, n = self._user_sides(begin, end, height), end - begin
        groups = (
            self._of_all_ranks(sides, n, height, seen)
            if self._share
            else [(self.engine.users(sides), n, seen)]
        )
        if self._candidates is None:
            best = self._update(groups, k)
        else:
            count = max(k, self._candidates)
            if self._index is None:
                short = self._update(groups, count, deep=False)
                candidates = [self._mine_of(short, n, height).positions]
            else:
                found = self._index.candidates(sides, n, seen, count)
                candidates = [found.to(self._world.device)]
            if self._share:
                of_all = self._world.all_gather_tensor(_with_rows(candidates[0], height)).split(
                    height
                )
                candidates = [t[:m] for t, (_, m, _) in zip(of_all, groups, strict=True)]
            best = self._update_of_candidates(groups, candidates, k)
        mine = self._mine_of(best, n, height)
        return mine.positions.cpu().numpy(), mine.scores.cpu().numpy()

    def _of_all_ranks(self, sides: list[Side], n: int, height: int, seen: Jagged) -> list[Group]:
        """All ranks' users, brought here for this rank's share of the items."""
        mine = Side(*map(torch.cat, zip(*(s.tensors for s in sides), strict=True)))
        columns = [
            self._world.all_gather_tensor(_with_rows(t, height)).split(height) for t in mine.tensors
        ]
        lengths = self._world.all_gather_tensor(
            _with_rows(torch.from_numpy(seen.lengths), height)
        ).split(height)
        counts, totals = self._world.all_gather_tensor(
            torch.tensor([[n, len(seen.values)]])
        ).T.tolist()
        longest = max(1, *totals)
        values = self._world.all_gather_tensor(
            _with_rows(torch.from_numpy(seen.values), longest)
        ).split(longest)
        groups = []
        for rank, (count, total) in enumerate(zip(counts, totals, strict=True)):
            users = self.engine.users([Side(*(column[rank] for column in columns))])
            offsets = offsets_of(lengths[rank][:count].cpu().numpy())
            groups.append((users, count, Jagged(offsets, values[rank][:total].cpu().numpy())))
        return groups

    def _update(self, groups: list[Group], k: int, deep: bool = True) -> list[Best]:
        """The best items here of each of some groups."""
        found = [Best.none(n, k, self._world.device) for _, n, _ in groups]
        for offset, items in self._item_blocks():
            for (users, _, seen), best in zip(groups, found, strict=True):
                self.engine.update(users, items, offset, seen, best, deep)
        return found

    def _update_of_candidates(
        self, groups: list[Group], candidates: list[Tensor], k: int
    ) -> list[Best]:
        found = [Best.none(len(wanted), k, self._world.device) for wanted in candidates]
        ordered = [wanted.sort(dim=1).values for wanted in candidates]
        for offset, items in self._item_blocks():
            for (users, _, _), wanted, best in zip(groups, ordered, found, strict=True):
                self.engine.update_of_candidates(users, items, offset, wanted, best)
        return found

    def _mine_of(self, found: list[Best], n: int, height: int) -> Best:
        """Sends each rank its users' best of this rank's share; merges what is sent here."""
        if not self._share:
            return found[0]
        keys = torch.cat([_with_rows(keys_of(b.scores, b.positions), height) for b in found])
        k = keys.shape[1]
        merged = (
            self._world.all_to_all(keys).view(-1, height, k).transpose(0, 1).reshape(height, -1)[:n]
        )
        return Best(*best_of_keys(merged, k))

    def scores(self, begin: int, end: int, height: int) -> npt.NDArray[np.float32]:
        """``[end - begin, I]`` logits of a stretch of users; arguments as of `best`. All ranks."""
        users = self.engine.users(self._user_sides(begin, end, height))
        self._share = None  # a row of scores has all items: no rank's share serves here
        blocks = [self.engine.scores(users, end - begin, i) for _, i in self._item_blocks()]
        return torch.cat(blocks, 1).cpu().numpy()

    def item_vectors(self) -> Tensor:
        """``[I, D]`` each item's sum of factor vectors: how users meet it in the pairwise part."""
        n = len(self._rows)
        return torch.cat([side.factor_sum for _, side in self._item_sides(0, n)])[:n]

    def index(self, kind: str, probes: int) -> NearestItems:
        """An index of all items; see `NearestItems`. All ranks.

        Raises:
            ConfigError: faiss is missing or cannot make it.
        """
        n = len(self._rows)
        points = [
            torch.cat([side.factor_sum, side.constant[:, None]], 1).cpu()
            for _, side in self._item_sides(0, n)
        ]
        return NearestItems(torch.cat(points)[:n].numpy(), kind, probes)

    def look_up(self, stretches: Sequence[tuple[int, int]], height: int) -> None:
        """Looks the users of several stretches up together; see `Ranker`."""
        each = math.ceil(height / USER_BLOCK)
        rows = [padded(self._users[b:e], each * USER_BLOCK, ABSENT) for b, e in stretches]
        sides = self._sides_of_users(np.concatenate(rows))
        self._ahead = deque(
            (begin, sides[at * each :][: max(1, math.ceil((end - begin) / USER_BLOCK))])
            for at, (begin, end) in enumerate(stretches)
        )

    def _user_sides(self, begin: int, end: int, height: int) -> list[Side]:
        """Users ``begin`` to ``end``, in blocks; at least one."""
        if not (self._ahead and self._ahead[0][0] == begin):
            self.look_up([(begin, end)], height)
        return self._ahead.popleft()[1]

    def _sides_of_users(self, rows: Int32Array) -> list[Side]:
        """Users of whole blocks, looked up in as many steps as every rank takes."""
        return [
            side
            for first in range(0, len(rows), USERS_AT_ONCE)
            for side in self._sides("user", rows[first : first + USERS_AT_ONCE], USER_BLOCK)
        ]

    def _side(self, which: str, rows: Int32Array) -> Side:
        """All of the rows as one block."""
        [side] = self._sides(which, rows, len(rows))
        return side

    @torch.no_grad()
    def _sides(self, which: str, rows: Int32Array, block: int) -> list[Side]:
        """Rows looked up together, and multiplied in blocks of a size that is always the same."""
        if which == "user":
            known, bags = rows, None
            if self._drawn is not None:
                known = np.full(len(rows), ABSENT, np.int32)
                bags = self._drawn.whole(rows, self._histories)
            nowhere = np.zeros(len(rows), np.int32)
            batch = self._collate(known, None, self._context, nowhere, bags=bags)
        else:
            batch = self._collate(None, rows)
        batch = batch.to(self._world.device)
        factors, first_order = self._model.embedding_arch(batch.sparse)
        blocks = zip(*(t.split(block) for t in (factors, first_order, batch.dense)), strict=True)
        return [self._scorer.side(which, *parts) for parts in blocks]

    def _item_blocks(self) -> Iterator[tuple[int, Any]]:
        """(position of the first, items) in order; kept where one block holds what is needed."""
        if self._share:
            begin = self._world.rank * self._share
            if begin < len(self._rows):
                yield begin, self._kept
            return
        whole = len(self._item_begins) == 1
        for begin in self._item_begins:
            yield begin, self._kept if whole else self._item_block(begin, self._item_begins.step)

    def _my_share(self, share: int) -> Any:
        """This rank's items, looked up in as many steps as every rank takes."""
        begin = min(self._world.rank * share, len(self._rows))
        mine = self._rows[begin : begin + share]
        items = None
        for first in range(0, share, ITEM_BLOCK):
            side = self._side("item", padded(mine[first : first + ITEM_BLOCK], ITEM_BLOCK, ABSENT))
            if items is None:
                items = self.engine.allocate(len(mine), side)
            if first < len(mine):
                self.engine.fill(items, first, side)
        return items

    def _item_block(self, begin: int, n: int) -> Any:
        items = None
        n = min(n, len(self._rows) - begin)
        for at, side in self._item_sides(begin, begin + n):
            if items is None:
                items = self.engine.allocate(n, side)
            self.engine.fill(items, at - begin, side)
        return items

    def _item_sides(self, begin: int, end: int) -> Iterator[tuple[int, Side]]:
        """Items computed in shares and gathered on every rank, a block of each rank's at a time.

        What pads the last one comes after all items.
        """
        size = self._world.world_size
        for first in range(begin, end, size * ITEM_BLOCK):
            mine = first + self._world.rank * ITEM_BLOCK
            rows = self._rows[min(mine, end) : min(mine + ITEM_BLOCK, end)]
            side = self._side("item", padded(rows, ITEM_BLOCK, ABSENT))
            yield first, Side(*map(self._world.all_gather_tensor, side.tensors))


def _with_rows(tensor: Tensor, n: int) -> Tensor:
    """With rows of zeros up to n."""
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, n - len(tensor)])


class FixedRanker(Ranker):
    """Ranks by scores that are there already, such as popularity.

    Args:
        scores: (first user, last + 1) -> ``[users, I]`` scores, which may be changed.
        n_items: I.
    """

    def __init__(self, scores: Callable[[int, int], Tensor], n_items: int) -> None:
        self._scores, self._n_items = scores, n_items

    def __len__(self) -> int:
        """Number of items."""
        return self._n_items

    def best(
        self, begin: int, end: int, height: int, seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Ranks a stretch of users; see `Ranker`."""
        positions = np.empty((end - begin, k), np.int64)
        best = np.empty((end - begin, k), np.float32)
        for first in range(begin, end, USER_BLOCK):
            last = min(first + USER_BLOCK, end)
            scores = self._scores(first, last)
            mask = mask_of(seen, scores.device)(first - begin, last - begin)
            block = slice(first - begin, last - begin)
            positions[block], best[block] = (t.cpu() for t in masked_top_k(scores, mask, k))
        return positions, best


def users_per_chunk(n_users: int) -> int:
    """Users that are ranked and written together: about 64 stretches, of 512 to 65,536 users.

    It is the same at every world size.
    """
    return min(max(math.ceil(n_users / 64 / USER_BLOCK), 1), 128) * USER_BLOCK


def rank_users(
    ranker: Ranker,
    n_users: int,
    seen: Seen,
    k: int,
    world: World,
    stretches: Sequence[int] | None = None,
    description: str = "rank items",
) -> Iterator[Ranked]:
    """This rank's users' best K items. All ranks.

    Args:
        ranker: of the catalogue.
        n_users: number of users.
        seen: their masked positions.
        k: K.
        world: the ranks.
        stretches: which stretches of `users_per_chunk` users, the same on all ranks; default: all.
        description: of the progress bar.

    Yields:
        A stretch of users at a time, in order; the users of ranks follow one another.
    """
    size = users_per_chunk(n_users)
    mine, together = _my_stretches(n_users, world, stretches), max(1, USERS_AT_ONCE // size)
    for at, (begin, end) in enumerate(
        dealt_stretches(n_users, len(ranker), world, stretches, description)
    ):
        if at % together == 0:
            ranker.look_up(mine[at : at + together], size)
        positions, scores = ranker.best(begin, end, size, seen(begin, end), k)
        if end > begin:
            yield begin, positions, scores


def dealt_stretches(
    n_users: int,
    n_items: int,
    world: World,
    stretches: Sequence[int] | None = None,
    description: str = "rank items",
) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of this rank's stretches; every rank gets as many, empty ones included.

    Args:
        n_users: of all ranks.
        n_items: in the catalogue, for the pairs per second that rank 0 reports.
        world: the ranks.
        stretches: which ones; default: all.
        description: of the progress bar.
    """
    mine = _my_stretches(n_users, world, stretches)
    total = sum(end - begin for begin, end in mine) * n_items
    done, start, said = 0, time.monotonic(), time.monotonic()
    with progress(total, description, "pair", world.is_first) as bar:
        for begin, end in mine:
            yield begin, end
            bar.update((end - begin) * n_items)
            done += (end - begin) * n_items
            now = time.monotonic()
            if bar.disable and now - said > SAY_EVERY_S and done < total:
                said, rate = now, done / (now - start)
                log.info(
                    "%s: %.0f %% of this rank's pairs, %.3g M pairs/s, %.0f s left",
                    description,
                    100 * done / total,
                    rate / 1e6,
                    (total - done) / rate,
                )


def _my_stretches(
    n_users: int, world: World, stretches: Sequence[int] | None
) -> list[tuple[int, int]]:
    """What `dealt_stretches` yields: as many on every rank, empty ones where it has fewer."""
    size = users_per_chunk(n_users)
    left = list(range(-(-n_users // size))) if stretches is None else list(stretches)
    per_rank = -(-len(left) // world.world_size)
    mine = left[world.rank * per_rank : (world.rank + 1) * per_rank]
    spans = [(s * size, min((s + 1) * size, n_users)) for s in mine]
    return spans + [(n_users, n_users)] * (per_rank - len(mine))


def gather_ranked(ranked: Iterator[Ranked], k: int, world: World) -> Int64Array | None:
    """Positions of all users, ``[U, K]``, on rank 0; None elsewhere. All ranks."""
    pieces = world.gather_object([positions for _, positions, _ in ranked])
    if pieces is None:
        return None
    blocks = [block for piece in pieces for block in piece]
    return np.concatenate(blocks) if blocks else np.zeros((0, k), np.int64)
