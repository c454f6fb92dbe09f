"""Ranks each user's best items within a set of items, such as those that pass a filter."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, offsets_of
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.ranker import ModelRanker, UserChunk
from deepfm_dist.ranking.topk import NO_ITEM
from deepfm_dist.ranking.types import Best

EVERYTHING = -1
"""Number of the set of all items."""
SHARED_BY = 4
"""Minimum number of users in a chunk for which their common set is packed; items of other users are
picked pair by pair.
"""
CELLS = 1 << 22
"""Number of pairs picked at a time."""


@dataclass(frozen=True)
class ItemSets:
    """The items that each of n users may get.

    Attributes:
        number: ``[n]`` int32: the set of each user; `EVERYTHING` for the whole catalogue.
        positions: positions in each set, ascending int32.
    """

    number: Int32Array
    positions: Sequence[Int32Array]

    def sizes(self, n_items: int) -> Int64Array:
        """``[n]`` int64: number of items that each user may get, of a catalogue of ``n_items``."""
        set_sizes = np.array([*map(len, self.positions), n_items], np.int64)
        sizes: Int64Array = set_sizes[self.number]
        return sizes


@dataclass(frozen=True)
class _Group:
    """Users of a chunk who are ranked together.

    Attributes:
        members: their indices in the chunk.
        users: prepared by the engine.
        best: their best items so far.
        number: the number of their common set.
        seen: their masked indices in the set.
        candidates: ``[n, N]`` positions of each user's
            own items, ascending, without seen ones, `NO_ITEM` first; None: they have a common set.
    """

    members: Int64Array
    users: Any
    best: Best
    number: int = EVERYTHING
    seen: Jagged | None = None
    candidates: Tensor | None = None


class SubsetRanker:
    """Ranks each user's items within a set. All ranks. A `Ranker`.

    Users with the same set are ranked together: its items are packed once, and the engine's kernel
    runs as over the whole catalogue, with bit-identical scores.

    Args:
        ranker: the ranker of the catalogue.
        sets: the sets of its users.
    """

    def __init__(self, ranker: ModelRanker, sets: ItemSets) -> None:
        self._ranker, self._sets = ranker, sets
        self._packed: OrderedDict[int, Any] = OrderedDict()
        self._n_packed = 0

    def __len__(self) -> int:
        """Number of items."""
        return len(self._ranker)

    def prepare(
        self, chunks: Sequence[tuple[int, int]], height: int
    ) -> list[tuple[Int32Array, UserChunk]]:
        """Looks the users of several chunks up together; see `Ranker`."""
        prepared = self._ranker.prepare(chunks, height)
        numbers = [self._sets.number[begin:end] for begin, end in chunks]
        return list(zip(numbers, prepared, strict=True))

    def best(
        self, users: tuple[Int32Array, UserChunk], seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Ranks a chunk of users within their sets; see `Ranker`."""
        numbers, chunk = users
        device, to_host = self._ranker.encoder.world.device, self._ranker.encoder.world.to_host
        side = Side(*map(torch.cat, zip(*(s.tensors for s in chunk.sides), strict=True)))
        groups = [
            *self._sharing(numbers, side, seen, k),
            *self._picking(numbers, side, seen, k),
        ]
        store = self._ranker.items
        for begin, items in store.all_blocks():  # on all ranks alike, with or without users
            for group in groups:
                self._update(group, items, begin, store.end_of_block(begin))
        best = Best.none(chunk.n, k, device)
        for group in groups:
            members = torch.from_numpy(group.members).to(device)
            positions = group.best.positions
            if group.candidates is None and group.number != EVERYTHING:
                in_set = torch.from_numpy(self._sets.positions[group.number]).to(device)
                there = positions != NO_ITEM
                positions[there] = in_set[positions[there]].long()
            best.scores[members], best.positions[members] = group.best.scores, positions
        return to_host(best.positions).numpy(), to_host(best.scores).numpy()

    def _update(self, group: _Group, items: Any, begin: int, end: int) -> None:
        """Updates some users' best with a block of items.

        Args:
            group: the users.
            items: the items of the block.
            begin: position of the first.
            end: after the last.
        """
        engine = self._ranker.engine
        if group.candidates is not None:
            engine.update_of_candidates(group.users, items, begin, group.candidates, group.best)
            return
        assert group.seen is not None
        if group.number == EVERYTHING:
            engine.update(group.users, items, begin, group.seen, group.best)
            return
        bounds = np.searchsorted(self._sets.positions[group.number], [begin, end])
        first, last = map(int, bounds)
        if first < last:
            some = self._pack(group.number, items, begin, slice(first, last))
            engine.update(group.users, some, first, group.seen, group.best)

    def _sharing(self, numbers: Int32Array, side: Side, seen: Jagged, k: int) -> Iterator[_Group]:
        """The users of a chunk who share a set with enough others; arguments as for `_picking`."""
        for members in _by_number(numbers):
            number = int(numbers[members[0]])
            if not self._is_shared(number, members):
                continue
            lengths, masked = seen.take(members)
            if number != EVERYTHING:
                masked = _places_in(self._sets.positions[number], masked)
            users, best = self._prepared(members, side, k)
            yield _Group(members, users, best, number, Jagged(offsets_of(lengths), masked))

    def _picking(self, numbers: Int32Array, side: Side, seen: Jagged, k: int) -> Iterator[_Group]:
        """The other users of a chunk, whose items are picked pair by pair.

        Args:
            numbers: the numbers of the users' sets.
            side: the users.
            seen: their masked positions.
            k: K.
        """
        by_number = _by_number(numbers)
        few = [m for m in by_number if not self._is_shared(int(numbers[m[0]]), m)]
        for members, candidates in self._candidates(few, numbers, seen):
            users, best = self._prepared(members, side, k)
            wanted = torch.from_numpy(candidates).to(side.constant.device)
            yield _Group(members, users, best, candidates=wanted)

    def _prepared(self, members: Int64Array, side: Side, k: int) -> tuple[Any, Best]:
        device = side.constant.device
        users = self._ranker.engine.users([side[torch.from_numpy(members).to(device)]])
        return users, Best.none(len(members), k, device)

    @staticmethod
    def _is_shared(number: int, members: Int64Array) -> bool:
        return number == EVERYTHING or len(members) >= SHARED_BY

    def _candidates(
        self, few: Sequence[Int64Array], numbers: Int32Array, seen: Jagged
    ) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Groups of users, those with the fewest items first, and their `_Group.candidates`.

        Args:
            few: indices of users.
            numbers: the numbers of the sets of all users.
            seen: masked positions of all users.
        """
        members = np.concatenate([np.zeros(0, np.int64), *few])
        sizes = np.array([len(self._sets.positions[number]) for number in numbers[members]])
        members, sizes = members[order := np.argsort(sizes, kind="stable")], sizes[order]
        begin = 0
        while begin < len(members):
            end = begin + 1
            while end < len(members) and (end + 1 - begin) * sizes[end] <= CELLS:
                end += 1
            some = members[begin:end]
            sets = [self._sets.positions[number] for number in numbers[some]]
            yield some, _without(sets, *seen.take(some))
            begin = end

    def _pack(self, number: int, items: Any, begin: int, part: slice) -> Any:
        """A set's items within a block; cached while memory allows."""
        positions = self._sets.positions[number][part]
        take = self._ranker.engine.take
        store = self._ranker.items
        if not store.is_kept_whole:
            return take(items, positions.astype(np.int64) - begin)
        if number not in self._packed:
            self._packed[number] = take(items, positions.astype(np.int64))
            self._n_packed += len(positions)
            while self._n_packed > store.most_kept and len(self._packed) > 1:
                dropped, _ = self._packed.popitem(last=False)
                self._n_packed -= len(self._sets.positions[dropped])
        self._packed.move_to_end(number)
        return self._packed[number]


def _by_number(numbers: Int32Array) -> list[Int64Array]:
    """Indices of equal numbers."""
    order = np.argsort(numbers, kind="stable")
    cuts = np.flatnonzero(np.diff(numbers[order])) + 1
    return np.split(order, cuts) if len(order) else []


def _places_in(positions: Int32Array, wanted: Int32Array) -> Int32Array:
    """Index of each position in an ascending list; -1 if it is not there."""
    if len(positions) == 0:
        return np.full(len(wanted), -1, np.int32)
    place = np.minimum(np.searchsorted(positions, wanted), len(positions) - 1)
    return np.where(positions[place] == wanted, place, -1).astype(np.int32)


def _without(sets: Sequence[Int32Array], lengths: Int32Array, seen: Int32Array) -> Int64Array:
    """``[n, N]`` int64: ascending lists without seen items, padded with `NO_ITEM` in front.

    Args:
        sets: n ascending lists.
        lengths: ``[n]`` number of seen items of each.
        seen: concatenated; negative ones are ignored.
    """
    bounds = offsets_of(np.array([len(positions) for positions in sets]))
    positions = np.concatenate(sets).astype(np.int64)
    key = np.repeat(np.arange(len(sets)) << 32, np.diff(bounds)) | positions
    masked = np.repeat(np.arange(len(sets)) << 32, lengths) | seen.astype(np.int64)
    masked = masked[seen >= 0]
    kept = np.ones(len(key), bool)
    if len(key):
        place = np.minimum(np.searchsorted(key, masked), len(key) - 1)
        kept[place[key[place] == masked]] = False
    running = np.append(0, np.cumsum(kept))[bounds]
    width = max(1, int(np.diff(running).max()))
    rectangle = np.full((len(sets), width), NO_ITEM, np.int64)
    kept_positions = positions[kept]
    for row, (begin, end) in enumerate(pairwise(running.tolist())):
        if begin < end:
            rectangle[row, begin - end :] = kept_positions[begin:end]
    return rectangle
