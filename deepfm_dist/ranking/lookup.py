"""Users and items looked up in the sharded tables and prepared for the engines."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import ABSENT, Collator, padded
from deepfm_dist.data.batches.histories import HistorySampler
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import FloatArray, Int32Array, Jagged, Values
from deepfm_dist.distributed.world import World
from deepfm_dist.messages import plural
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.types import USER_BLOCK, Engine

log = logging.getLogger(__name__)

ITEM_BLOCK = 1024
"""Items looked up and multiplied together."""


class SideEncoder:
    """Computes the user and item sides of a model's scores. All ranks.

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        dataset: the prepared dataset.
        context: one row of context fields.
        penalties: ``[items]`` float32, by item row: subtracted from scores; None: nothing.

    Attributes:
        model: the DeepFM.
        scorer: scores pairs of the two sides, without penalties.
        world: the ranks.
    """

    def __init__(
        self,
        model: DeepFM,
        world: World,
        dataset: PreparedDataset,
        context: Mapping[str, Values],
        penalties: FloatArray | None = None,
    ) -> None:
        self.world, self.penalties = world, penalties
        self.model, self._dataset, self._context = model, dataset, context
        self._collate = Collator(dataset)
        manifest = dataset.manifest
        self.scorer = CatalogueScorer(
            model.interaction_arch, manifest.is_item_field, len(manifest.categorical)
        )

    @cached_property
    def _drawn(self) -> HistorySampler:
        return HistorySampler(self._dataset)

    @torch.no_grad()
    def users(
        self,
        rows: Int32Array,
        block: int = USER_BLOCK,
        histories: Jagged | None = None,
        attributes: Mapping[str, Values] | None = None,
        context: Mapping[str, Values] | None = None,
        context_rows: Int32Array | None = None,
    ) -> list[Side]:
        """Looks users up together and returns their sides in blocks of one size.

        Args:
            rows: see `user_batch`, also for the other arguments.
            block: number of users per block.
            histories: the histories of users from outside the dataset.
            attributes: the attributes of these users.
            context: the context of some rows.
            context_rows: the row of each user's context.
        """
        batch = self.user_batch(rows, histories, attributes, context, context_rows)
        return self.user_sides(batch, block)

    def user_batch(
        self,
        rows: Int32Array,
        histories: Jagged | None = None,
        attributes: Mapping[str, Values] | None = None,
        context: Mapping[str, Values] | None = None,
        context_rows: Int32Array | None = None,
    ) -> Batch:
        """The fields of users and of their context.

        Args:
            rows: ``[n]`` rows of the user table or of ``histories``; `ABSENT` for padding.
            histories: item rows of users from outside the dataset.
            attributes: fields of these users, by row of ``histories``; None: they have none.
            context: rows of context fields; default: the encoder's.
            context_rows: ``[n]`` row of each user; default: the first.
        """
        known, bags, collate = rows, None, self._collate
        if histories is not None:
            known = np.full(len(rows), ABSENT, np.int32)
            bags = self._drawn.full(rows, histories) if self._collate.has_histories else None
        if attributes is not None:
            known, collate = rows, self._collate.for_new_users(attributes)
        if context_rows is None:
            context_rows = np.zeros(len(rows), np.int32)
        context = self._context if context is None else context
        return collate(known, None, context, context_rows, bags=bags)

    @torch.no_grad()
    def user_sides(self, batch: Batch, block: int = USER_BLOCK) -> list[Side]:
        """Looks a `user_batch` up and returns its sides in blocks of one size."""
        return self._sides("user", batch, block)

    def item_batch(self, rows: Int32Array) -> Batch:
        """The fields of items."""
        return self._collate(None, rows)

    @torch.no_grad()
    def items(self, rows: Int32Array) -> Side:
        """The side of items, padded to at least `ITEM_BLOCK`."""
        rows = padded(rows, max(len(rows), ITEM_BLOCK), ABSENT)
        [side] = self._sides("item", self.item_batch(rows), len(rows))
        if self.penalties is None:
            return side
        penalties = torch.from_numpy(self.penalties[rows]).to(side.constant.device)
        return replace(side, constant=side.constant - penalties)

    def _sides(self, which: str, batch: Any, block: int) -> list[Side]:
        batch = batch.to(self.world.device)
        factors, first_order = self.model.embedding_arch(batch.sparse)
        blocks = zip(*(t.split(block) for t in (factors, first_order, batch.dense)), strict=True)
        return [self.scorer.side(which, *parts) for parts in blocks]


class ItemStore:
    """The items of a catalogue, prepared by an engine and kept in memory if they fit.

    If the catalogue exceeds the limit, each rank keeps a share and ranks all users for it. If the
    shares exceed it, too, items are recomputed in blocks for every chunk of users.

    Args:
        encoder: encodes items with the model. All ranks.
        engine: the engine that ranks.
        rows: ``[I]`` item rows by position.
        memory_bytes: maximum bytes that a rank keeps.

    Attributes:
        is_shared: whether each rank keeps only a share of the items.
        most_kept: items that the memory has room for.
    """

    def __init__(
        self, encoder: SideEncoder, engine: Engine, rows: Int32Array, memory_bytes: int
    ) -> None:
        self._encoder, self._engine, self._rows = encoder, engine, rows
        self._world = encoder.world
        n, size = len(rows), self._world.world_size
        item_bytes = sum(t[0].nbytes for t in encoder.items(rows[:1]).tensors) + engine.work_bytes
        self.most_kept = max(1, memory_bytes // item_bytes)
        self._per_block = max(1, self.most_kept // ITEM_BLOCK) * ITEM_BLOCK
        # Full kernel blocks, so that an item's place within its block is the same everywhere.
        self._share = -(-n // (size * ITEM_BLOCK)) * ITEM_BLOCK
        self.is_shared = self._per_block < n and self._share <= self._per_block
        kept = self._share if self.is_shared else min(self._per_block, n)
        if kept < n:
            log.info(
                "catalogue: %s, %s of them in memory %s, %.1f MB of %.1f MB",
                plural(n, "item"),
                f"{kept:,}",
                "of each rank" if self.is_shared else "at a time",
                item_bytes * kept / 1e6,
                item_bytes * n / 1e6,
            )
        self._kept: Any = None
        if self.is_shared:
            self._kept = self._my_share()
        elif self._per_block >= n:
            self._kept = self._block(0)

    def __len__(self) -> int:
        """Number of items."""
        return len(self._rows)

    @property
    def is_kept_whole(self) -> bool:
        """Whether this rank keeps all items."""
        return self._kept is not None and not self.is_shared

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """(position of the first, items) of this rank's share, or of all items, in order."""
        if not self.is_shared:
            yield from self.all_blocks()
        elif (begin := self._world.rank * self._share) < len(self._rows):
            yield begin, self._kept

    def all_blocks(self) -> Iterator[tuple[int, Any]]:
        """(position of the first, items) of all items, in order. All ranks."""
        if self.is_kept_whole:
            yield 0, self._kept
            return
        for begin in range(0, len(self._rows), self._per_block):
            yield begin, self._block(begin)

    def end_of_block(self, begin: int) -> int:
        """Position after the last item of the block of `all_blocks` that begins there."""
        return min(begin + self._per_block, len(self._rows))

    def sides(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Side]]:
        """Items computed by all ranks and gathered on each, one block per rank at a time.

        The padding of the last one comes after all items. All ranks.
        """
        size, end = self._world.world_size, len(self._rows) if end is None else end
        for first in range(begin, end, size * ITEM_BLOCK):
            mine = first + self._world.rank * ITEM_BLOCK
            side = self._encoder.items(self._rows[min(mine, end) : min(mine + ITEM_BLOCK, end)])
            yield first, Side(*map(self._world.all_gather_tensor, side.tensors))

    def _block(self, begin: int) -> Any:
        n = min(self._per_block, len(self._rows) - begin)
        items = None
        for at, side in self.sides(begin, begin + n):
            if items is None:
                items = self._engine.allocate(n, side)
            self._engine.fill(items, at - begin, side)
        return items

    def _my_share(self) -> Any:
        """This rank's items, looked up in the same number of steps on every rank."""
        begin = min(self._world.rank * self._share, len(self._rows))
        mine = self._rows[begin : begin + self._share]
        items = None
        for first in range(0, self._share, ITEM_BLOCK):
            side = self._encoder.items(mine[first : first + ITEM_BLOCK])
            if items is None:
                items = self._engine.allocate(len(mine), side)
            if first < len(mine):
                self._engine.fill(items, first, side)
        return items
