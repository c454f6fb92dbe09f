"""The ranking engine for CUDA, which launches the Triton kernel."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from deepfm_dist.data.jagged import Int64Array, Jagged
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.engines.triton_kernel import (
    DIM_STEP,
    ITEM_TILE,
    MOST_K,
    USERS,
    TileConfig,
    power_of_two,
    rank_pairs,
    round_up,
    unsupported_reason,
    weight_dtype,
)
from deepfm_dist.ranking.topk import best_of_keys, keys_of, mask_of
from deepfm_dist.ranking.types import USER_BLOCK, Best, Precision

__all__ = ["Items", "TritonEngine", "unsupported_reason"]

log = logging.getLogger(__name__)

PROGRAMS = 2048
"""Programs that keep a large GPU busy; with fewer blocks of users, the catalogue is split."""


class Items(NamedTuple):
    """The item side.

    Attributes:
        side: padded to whole tiles with items whose constant is ``-inf``, and to whole blocks of
            dimensions and units.
        n: number of items.
    """

    side: Side
    n: int


class TritonEngine:
    """Ranks models with ReLU layers on CUDA, in one pass over the catalogue.

    Args:
        layers: weights and biases of the over-arch above its first layer, in float64; empty if it
            has no hidden layer.
        precision: of matrix products: ``fp32`` uses three tf32 products for each, for the accuracy
            of float32; ``tf32`` uses one; ``bf16`` also stores the hidden units in bfloat16.
        device: a CUDA device.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], precision: Precision, device: torch.device
    ) -> None:
        self.name = f"Triton kernel, {precision}"
        self.work_bytes = 0
        self._device = device
        kind = weight_dtype(precision)
        self._input_precision = "tf32" if precision == "tf32" else "tf32x3"
        sizes = [weight.shape[1] for weight, _ in layers]
        self._tiles = tiles = TileConfig.of(sizes, precision)
        model = layers[0][0].device if layers else device
        nothing = torch.zeros(0, dtype=torch.float64, device=model)
        weights, biases = [nothing], [nothing]
        padded = tiles.sizes
        for (weight, bias), n_in, n_out in zip(layers[:-1], padded, padded[1:], strict=False):
            weights.append(_pad(weight, n_out, n_in).flatten())
            biases.append(_pad(bias[:, None], n_out, 1).flatten())
        output = _pad(layers[-1][0], 1, padded[-1]).flatten() if layers else nothing
        self._weights = torch.cat(weights).to(device, kind)
        self._biases = torch.cat(biases).to(device, torch.float32)
        self._output = output.to(device, torch.float32)

    def allocate(self, n: int, like: Side) -> Items:
        """Allocates n items."""
        rows = round_up(n, ITEM_TILE)
        side = Side(
            like.constant.new_full((rows,), float("-inf")),
            like.factor_sum.new_zeros(rows, _columns(like.factor_sum)),
            like.hidden.new_zeros(rows, self._tiles.units),
        )
        return Items(side, n)

    def fill(self, items: Items, begin: int, side: Side) -> None:
        """Copies items to positions from ``begin`` on; leaves out those past the end."""
        n = min(items.n - begin, len(side.constant))
        for target, source in zip(items.side.tensors, side.tensors, strict=True):
            room = target[begin : begin + n]
            if source.dim() > 1:
                room = room[:, : source.shape[1]]
            room.copy_(source[:n])

    def take(self, items: Items, places: Int64Array) -> Items:
        """Selects items; see `Engine`."""
        picked = self.allocate(len(places), items.side)
        wanted = torch.from_numpy(places).to(items.side.constant.device)
        self.fill(picked, 0, items.side[wanted])
        return picked

    def users(self, sides: Sequence[Side]) -> Side:
        """Prepares users."""
        n = sum(len(side.constant) for side in sides)
        users = self.allocate(n, sides[0])
        begin = 0
        for side in sides:
            self.fill(users, begin, side)
            begin += len(side.constant)
        return users.side

    def update(
        self, users: Side, items: Items, offset: int, seen: Jagged, best: Best, deep: bool = True
    ) -> None:
        """Ranks items for users; see `Engine`."""
        n, k = best.scores.shape
        if k > MOST_K:
            self._update_from_scores(users, items, offset, seen, best, deep)
            return
        columns = len(items.side.constant)
        splits, width = self._splits(n, columns)
        rows, positions = mask_of(seen, self._device, offset, items.n)(0, n)
        order = ((rows << 32) | positions).sort().values
        owners = torch.arange(n, device=self._device) << 32
        firsts = torch.arange(splits, device=self._device) * width
        begins = torch.searchsorted(order, owners + firsts[:, None])
        ends = torch.searchsorted(order, owners + (1 << 32))
        seen_ranges = order & 0xFFFFFFFF, begins, ends
        self._launch(users, items, offset, n, columns, best, deep=deep, seen=seen_ranges)

    def _update_from_scores(
        self, users: Side, items: Items, offset: int, seen: Jagged, best: Best, deep: bool
    ) -> None:
        positions = torch.arange(offset, offset + items.n, device=self._device)
        mask = mask_of(seen, self._device, offset, items.n)
        for begin in range(0, len(best.scores), USER_BLOCK):
            part = slice(begin, min(begin + USER_BLOCK, len(best.scores)))
            scores = self._scores(users[part], len(best.scores[part]), items, deep)
            scores[mask(part.start, part.stop)] = float("-inf")
            self._merge(best, part, keys_of(scores, positions))

    def update_of_candidates(
        self, users: Side, items: Items, offset: int, candidates: Tensor, best: Best
    ) -> None:
        """Ranks each user's own items; see `Engine`."""
        n, columns = candidates.shape
        candidates = candidates.contiguous()
        if best.scores.shape[1] > MOST_K:
            out = torch.empty(n, columns, device=self._device)
            self._launch(users, items, offset, n, columns, None, candidates=candidates, out=out)
            self._merge(best, slice(0, n), keys_of(out, candidates))
            return
        self._launch(users, items, offset, n, columns, best, candidates=candidates)

    def scores(self, users: Side, n_users: int, items: Items) -> Tensor:
        """``[n_users, items]`` float32."""
        return self._scores(users, n_users, items)

    def _scores(self, users: Side, n_users: int, items: Items, deep: bool = True) -> Tensor:
        out = torch.empty(n_users, items.n, device=self._device)
        columns = len(items.side.constant)
        self._launch(users, items, 0, n_users, columns, None, deep=deep, out=out)
        return out

    def _merge(self, best: Best, users: slice, keys: Tensor) -> None:
        scores, positions = best.scores[users], best.positions[users]
        keys = torch.cat([keys_of(scores, positions), keys], 1)
        scores[:], positions[:] = best_of_keys(keys, scores.shape[1])

    def _splits(self, n_users: int, columns: int) -> tuple[int, int]:
        """The number of splits of the catalogue, and the number of columns of each."""
        wanted = -(-PROGRAMS * USERS // max(n_users, 1))
        tiles = -(-columns // ITEM_TILE)
        width = -(-tiles // min(wanted, tiles)) * ITEM_TILE
        return -(-columns // width), width

    def _launch(
        self,
        users: Side,
        items: Items,
        offset: int,
        n: int,
        columns: int,
        best: Best | None,
        deep: bool = True,
        seen: tuple[Tensor, Tensor, Tensor] | None = None,
        candidates: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        unused = users.constant
        splits, width = self._splits(n, columns)
        k = 1 if best is None else best.scores.shape[1]
        keys = torch.empty(splits, n, k, dtype=torch.int64, device=self._device)
        arguments = (
            *users.tensors,
            *items.side.tensors,
            self._weights,
            self._biases,
            self._output,
            unused if candidates is None else candidates,
            *((unused,) * 3 if seen is None else seen),
            keys,
            unused if out is None else out,
            n,
            items.n,
            columns,
            width,
            offset,
            k,
        )
        while True:
            options = self._tiles.options(deep, users.factor_sum.shape[1], k)
            options |= {"OF_CANDIDATES": candidates is not None, "KEEP_SCORES": out is not None}
            options["PRECISION"] = self._input_precision
            try:
                rank_pairs[-(-n // USERS), splits](*arguments, **options)
                break
            except OutOfResources as error:
                leaner = self._tiles.leaner
                if leaner is None:
                    raise
                log.info("catalogue: tiles of %d pairs, since %s", leaner.pairs, error)
                self._tiles = leaner
        if best is not None:
            self._merge(best, slice(0, n), keys.transpose(0, 1).reshape(n, splits * k))


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    room = matrix.new_zeros(rows, columns)
    room[: matrix.shape[0], : matrix.shape[1]] = matrix
    return room


def _columns(factors: Tensor) -> int:
    """The padded dimension: a multiple of `DIM_STEP`, or a smaller power of two."""
    dim = factors.shape[1]
    return round_up(dim, power_of_two(dim, DIM_STEP, 1)) if dim else 0
