"""Every user's best items from the sharded model, or from given scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import ABSENT, padded
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, Values, offsets_of
from deepfm_dist.distributed.world import World
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.engines.selection import engine_for
from deepfm_dist.ranking.items import Catalogue
from deepfm_dist.ranking.lookup import ItemStore, SideEncoder
from deepfm_dist.ranking.nearest import NearestItems
from deepfm_dist.ranking.topk import best_of_keys, keys_of, mask_of, masked_top_k
from deepfm_dist.ranking.types import USER_BLOCK, Best, Engine, Precision

USERS_AT_ONCE = 8192
"""Maximum number of users looked up together. Ranks synchronise at each look-up: one per second
costs little, but with one every 60 ms two ranks were only 1.6 times as fast as one
(benchmarks/recommend.py).
"""
MEMORY_BYTES = 1 << 30
"""Default limit of the item side's bytes on a rank."""

Group = tuple[Any, int, Jagged]
"""(users prepared by the engine, their number, their masked positions)"""


class Ranker(Protocol):
    """Ranks the catalogue for chunks of users."""

    def prepare(self, chunks: Sequence[tuple[int, int]], height: int) -> Sequence[Any]:
        """Prepares the input of `best` for several chunks of users. All ranks.

        Args:
            chunks: (first user, last + 1) of each; the same number on all ranks; empty for a rank
                that has run out of users.
            height: users of the longest chunk of any rank.
        """

    def best(self, users: Any, seen: Jagged, k: int) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Positions and scores, ``[n, K]`` each. All ranks.

        Args:
            users: n users, from `prepare`.
            seen: the users' masked positions.
            k: K.
        """

    def __len__(self) -> int:
        """Number of items."""


@dataclass(frozen=True)
class Users:
    """The users to rank for, in order.

    Attributes:
        rows: ``[n]`` rows of the user table, or of ``histories``.
        histories: item rows of users from outside the dataset.
        attributes: fields of these users; None: they are known by their items alone.
        is_known: ``[n]`` bool, if some rows refer to the user table and others to ``histories``.
        context: context fields of each user; None: all use the ranker's.
    """

    rows: Int32Array
    histories: Jagged | None = None
    attributes: Mapping[str, Values] | None = None
    is_known: npt.NDArray[np.bool_] | None = None
    context: Mapping[str, Values] | None = None


@dataclass(frozen=True)
class UserChunk:
    """Users that have been looked up.

    Attributes:
        sides: in blocks, at least one; the last ones may be padding.
        n: number of users.
        height: users of the longest chunk of any rank.
    """

    sides: Sequence[Side]
    n: int
    height: int


@dataclass(frozen=True)
class ModelRanker:
    """Ranks by the model's logits. All ranks.

    Attributes:
        encoder: the encoder of users and items.
        engine: scores and ranks.
        items: the items of the catalogue.
        users: the users to rank for.
        candidates: number of items per user to score in full, the best without the over-arch; None:
            all.
        index: finds the candidates; None: by scoring all items without the over-arch.
    """

    encoder: SideEncoder
    engine: Engine
    items: ItemStore
    users: Users
    candidates: int | None = None
    index: NearestItems | None = None

    @classmethod
    def from_model(
        cls,
        model: DeepFM,
        world: World,
        dataset: PreparedDataset,
        catalogue: Catalogue,
        users: Users,
        context: Mapping[str, Values],
        *,
        memory_bytes: int = MEMORY_BYTES,
        precision: Precision = "fp32",
        penalties: npt.NDArray[np.float32] | None = None,
    ) -> Self:
        """Makes a ranker of a catalogue.

        Args:
            model: the DeepFM, sharded, in eval mode.
            world: the ranks.
            dataset: the prepared dataset.
            catalogue: its items.
            users: the users to rank for.
            context: one row of context fields.
            memory_bytes: limit of the item side on a rank; see `ItemStore`.
            precision: the precision of the over-arch's products on CUDA.
            penalties: by item row, subtracted from scores; None: nothing.
        """
        encoder = SideEncoder(model, world, dataset, context, penalties)
        engine = engine_for(encoder.scorer, world.device, precision)
        items = ItemStore(encoder, engine, catalogue.rows, memory_bytes)
        return cls(encoder, engine, items, users)

    @property
    def has_deep_part(self) -> bool:
        """Whether the over-arch is part of the scores."""
        return self.encoder.scorer.layers != []

    @property
    def _world(self) -> World:
        return self.encoder.world

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    def for_users(
        self, rows: Int32Array, candidates: int | None, index: NearestItems | None = None
    ) -> Self:
        """The same ranker for other users of the same kind; arguments as the attributes."""
        return replace(
            self, users=replace(self.users, rows=rows), candidates=candidates, index=index
        )

    def prepare(self, chunks: Sequence[tuple[int, int]], height: int) -> list[UserChunk]:
        """Looks the users of several chunks up together; see `Ranker`."""
        per_chunk = math.ceil(height / USER_BLOCK)
        # Index of each user in `users`.
        places = np.concatenate(
            [
                padded(np.arange(b, e, dtype=np.int32), per_chunk * USER_BLOCK, ABSENT)
                for b, e in chunks
            ]
        )
        sides = [
            side
            for first in range(0, len(places), USERS_AT_ONCE)
            for side in self._look_up(places[first : first + USERS_AT_ONCE])
        ]
        prepared = []
        for number, (begin, end) in enumerate(chunks):
            n_blocks = max(1, math.ceil((end - begin) / USER_BLOCK))
            mine = sides[number * per_chunk :][:n_blocks]
            prepared.append(UserChunk(mine, end - begin, height))
        return prepared

    def _look_up(self, places: Int32Array) -> list[Side]:
        """Sides of the users at ``[n]`` indices, in blocks. All ranks."""
        batches = self.user_batches(places)
        sides = [self.encoder.user_sides(batch) for _, batch in batches]
        if len(batches) == 1:
            return sides[0]
        is_known = batches[0][0]
        assert is_known is not None
        flags = torch.from_numpy(is_known).to(self._world.device).split(USER_BLOCK)
        return [a.where(flag, b) for flag, a, b in zip(flags, *sides, strict=True)]

    def user_batches(self, places: Int32Array) -> list[tuple[npt.NDArray[np.bool_] | None, Batch]]:
        """The fields of the users at ``[n]`` indices; `ABSENT` for padding.

        Returns:
            Batches of n users each, with flags of the users that each batch describes; None: all.
        """
        users, rows = self.users, np.full(len(places), ABSENT, np.int32)
        there = places >= 0
        rows[there] = users.rows[places[there]]
        batch_of = self.encoder.user_batch
        if users.context is not None:
            batch_of = partial(batch_of, context=users.context, context_rows=places)
        new = partial(batch_of, histories=users.histories, attributes=users.attributes)
        if users.is_known is None:
            return [(None, new(rows))]
        is_known = np.ones(len(places), bool)
        is_known[there] = users.is_known[places[there]]
        known = batch_of(np.where(is_known, rows, ABSENT).astype(np.int32))
        return [
            (is_known, known),
            (~is_known, new(np.where(is_known, ABSENT, rows).astype(np.int32))),
        ]

    def best(
        self, users: UserChunk, seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Ranks a chunk of users; see `Ranker`."""
        if self.items.is_shared:
            groups = self._from_all_ranks(users, seen)
        else:
            groups = [(self.engine.users(users.sides), users.n, seen)]
        if self.candidates is None:
            best = self._update(groups, k)
        else:
            candidates = self._candidates(groups, users, seen, max(k, self.candidates))
            best = self._update_of_candidates(groups, candidates, k)
        mine = self._merge(best, users)
        to_host = self._world.to_host
        return to_host(mine.positions).numpy(), to_host(mine.scores).numpy()

    def scores(self, begin: int, end: int, height: int) -> npt.NDArray[np.float32]:
        """``[end - begin, I]`` logits of a chunk of users; arguments as of `prepare`. All ranks."""
        [chunk] = self.prepare([(begin, end)], height)
        users = self.engine.users(chunk.sides)
        blocks = [self.engine.scores(users, chunk.n, i) for _, i in self.items.all_blocks()]
        return self._world.to_host(torch.cat(blocks, 1)).numpy()

    def item_vectors(self) -> Tensor:
        """``[I, D]`` each item's summed factor vector, to multiply with users' sums."""
        return torch.cat([side.factor_sum for _, side in self.items.sides()])[: len(self)]

    def make_index(self, kind: str, probes: int) -> NearestItems:
        """An index of all items; see `NearestItems`. All ranks.

        Raises:
            ConfigError: faiss is missing or cannot make it.
        """
        points = [
            self._world.to_host(torch.cat([side.factor_sum, side.constant[:, None]], 1))
            for _, side in self.items.sides()
        ]
        return NearestItems(torch.cat(points)[: len(self)].numpy(), kind, probes)

    def _candidates(
        self, groups: list[Group], users: UserChunk, seen: Jagged, count: int
    ) -> list[Tensor]:
        """``[n, count]`` positions for each group: the best items without the over-arch."""
        if self.index is None:
            mine = self._merge(self._update(groups, count, deep=False), users).positions
        else:
            sums = [self._world.to_host(side.factor_sum) for side in users.sides]
            candidates = self.index.candidates(sums, users.n, seen, count)
            mine = candidates.to(self._world.device)
        if not self.items.is_shared:
            return [mine]
        padded_rows = self._world.all_gather_tensor(_with_rows(mine, users.height))
        return [
            rows[:n]
            for rows, (_, n, _) in zip(padded_rows.split(users.height), groups, strict=True)
        ]

    def _from_all_ranks(self, chunk: UserChunk, seen: Jagged) -> list[Group]:
        """All ranks' users, gathered for this rank's share of the items."""
        world, height = self._world, chunk.height
        gather = world.all_gather_tensor
        mine = Side(*map(torch.cat, zip(*(s.tensors for s in chunk.sides), strict=True)))
        columns = [gather(_with_rows(t, height)).split(height) for t in mine.tensors]
        lengths = gather(_with_rows(torch.from_numpy(seen.lengths), height)).split(height)
        sizes = gather(torch.tensor([[chunk.n, len(seen.values)]]))
        counts, totals = world.to_host(sizes).T.tolist()
        longest = max(1, *totals)
        values = gather(_with_rows(torch.from_numpy(seen.values), longest)).split(longest)
        groups = []
        for rank, (count, total) in enumerate(zip(counts, totals, strict=True)):
            users = self.engine.users([Side(*(column[rank] for column in columns))])
            offsets = offsets_of(world.to_host(lengths[rank][:count]).numpy())
            masked = world.to_host(values[rank][:total]).numpy()
            groups.append((users, count, Jagged(offsets, masked)))
        return groups

    def _update(self, groups: list[Group], k: int, deep: bool = True) -> list[Best]:
        """This rank's best items for each group of users."""
        results = [Best.none(n, k, self._world.device) for _, n, _ in groups]
        for offset, items in self.items.blocks():
            for (users, _, seen), best in zip(groups, results, strict=True):
                self.engine.update(users, items, offset, seen, best, deep)
        return results

    def _update_of_candidates(
        self, groups: list[Group], candidates: list[Tensor], k: int
    ) -> list[Best]:
        results = [Best.none(len(wanted), k, self._world.device) for wanted in candidates]
        ordered = [wanted.sort(dim=1).values for wanted in candidates]
        for offset, items in self.items.blocks():
            for (users, _, _), wanted, best in zip(groups, ordered, results, strict=True):
                self.engine.update_of_candidates(users, items, offset, wanted, best)
        return results

    def _merge(self, results: list[Best], users: UserChunk) -> Best:
        """Sends each rank its users' best items of this share, and merges those received."""
        if not self.items.is_shared:
            return results[0]
        height = users.height
        keys = torch.cat([_with_rows(keys_of(b.scores, b.positions), height) for b in results])
        k = keys.shape[1]
        received = self._world.all_to_all(keys).view(-1, height, k)
        merged = received.transpose(0, 1).reshape(height, -1)[: users.n]
        return Best(*best_of_keys(merged, k))


def _with_rows(tensor: Tensor, n: int) -> Tensor:
    """Pads with rows of zeros up to n."""
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, n - len(tensor)])


class FixedRanker:
    """Ranks by given scores, such as popularity.

    Args:
        scores: (first user, last + 1) -> ``[users, I]`` scores, which may be changed.
        n_items: I.
    """

    def __init__(self, scores: Callable[[int, int], Tensor], n_items: int) -> None:
        self._scores, self._n_items = scores, n_items

    def __len__(self) -> int:
        """Number of items."""
        return self._n_items

    def prepare(self, chunks: Sequence[tuple[int, int]], height: int) -> Sequence[tuple[int, int]]:
        """Nothing to prepare; see `Ranker`."""
        return chunks

    def best(
        self, users: tuple[int, int], seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Ranks a chunk of users; see `Ranker`."""
        begin, end = users
        positions = np.empty((end - begin, k), np.int64)
        best = np.empty((end - begin, k), np.float32)
        for first in range(begin, end, USER_BLOCK):
            last = min(first + USER_BLOCK, end)
            scores = self._scores(first, last)
            mask = mask_of(seen, scores.device, 0, len(self))(first - begin, last - begin)
            block = slice(first - begin, last - begin)
            positions[block], best[block] = (t.cpu() for t in masked_top_k(scores, mask, k))
        return positions, best
