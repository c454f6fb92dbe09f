"""Ranks on CPU with a kernel compiled by numba."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from deepfm_dist.data.jagged import Int64Array, Jagged
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.engines import numba_kernel as kernel
from deepfm_dist.ranking.types import Best
from deepfm_dist.vector_code import BLOCK, LANES, ROWS

USERS_PER_TASK = 64
"""Users per thread at a time."""


class NumbaEngine:
    """ReLU layers on CPU: one compiled pass over the catalogue.

    Args:
        layers: the layers of the over-arch above the first, in float64; empty where it has no
            hidden layer.
        threads: number of threads.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], threads: int) -> None:
        self.work_bytes = 0
        self.name = f"compiled kernel, {LANES * 32}-bit vectors"
        self._network = kernel.network_of([(w.numpy(), b.numpy()) for w, b in layers])
        self._pairwise = kernel.network_of([])
        self._threads = threads
        self._rows: tuple[kernel.FloatArray, kernel.FloatArray] | None = None

    def allocate(self, n: int, like: Side) -> kernel.Items:
        """Room for n items."""
        return kernel.empty_items(n, like.factor_sum.shape[1], like.hidden.shape[1])

    def fill(self, items: kernel.Items, begin: int, side: Side) -> None:
        """Writes items into place; ``begin`` is the start of one of the kernel's blocks."""
        n = min(items.n - begin, len(side.constant))
        items.constant[begin : begin + n] = side.constant[:n].numpy()
        first, blocks = begin // BLOCK, -(-n // BLOCK)
        for packed, values in ((items.factors, side.factor_sum), (items.hidden, side.hidden)):
            size = values.shape[1]
            room = torch.from_numpy(packed).view(-(-items.n // BLOCK), size, BLOCK)
            rows = values.new_zeros(blocks * BLOCK, size)
            rows[:n] = values[:n]
            room[first : first + blocks] = rows.view(blocks, BLOCK, size).transpose(1, 2)

    def take(self, items: kernel.Items, places: Int64Array) -> kernel.Items:
        """Some of the items; see `Engine`."""
        picked = kernel.empty_items(len(places), items.dim, items.units)
        kernel.copy_items(items, places, picked)
        return picked

    def users(self, sides: Sequence[Side]) -> kernel.Users:
        """Prepares users."""
        n = sum(len(s.constant) for s in sides)
        dim, units = sides[0].factor_sum.shape[1], sides[0].hidden.shape[1]
        height = -(-n // ROWS) * ROWS
        users = kernel.Users(
            kernel.aligned_zeros(height),
            kernel.aligned_zeros(height * dim),
            kernel.aligned_zeros(height * units),
        )
        side = Side(*map(torch.cat, zip(*(s.tensors for s in sides), strict=True)))
        users.constant[:n] = side.constant.numpy()
        users.hidden[: n * units] = side.hidden.flatten().numpy()
        factors = np.zeros((height, dim), np.float32)
        factors[:n] = side.factor_sum.numpy()
        users.factors[:] = factors.reshape(height // ROWS, ROWS, dim).transpose(0, 2, 1).ravel()
        return users

    def update(
        self,
        users: kernel.Users,
        items: kernel.Items,
        offset: int,
        seen: Jagged,
        best: Best,
        deep: bool = True,
    ) -> None:
        """Updates users' best items; see `Engine`."""
        network = self._network if deep else self._pairwise
        if not deep:
            items = items._replace(units=0)
        best_arrays = best.scores.numpy(), best.positions.numpy()

        def work(begin: int, end: int) -> None:
            kernel.update_top_k(
                users,
                begin,
                end,
                items,
                offset,
                network,
                seen.offsets,
                seen.values,
                *best_arrays,
                self._scratch(network),
            )

        self._over_users(work, len(best.scores))

    def update_of_candidates(
        self,
        users: kernel.Users,
        items: kernel.Items,
        offset: int,
        candidates: Tensor,
        best: Best,
    ) -> None:
        """Updates users' best from their own candidates; see `Engine`."""
        network, wanted, rows = self._network, candidates.numpy(), self._rows_of(items)
        best_arrays = best.scores.numpy(), best.positions.numpy()

        def work(begin: int, end: int) -> None:
            scratch = self._scratch(network)
            kernel.update_top_k_of_candidates(
                users, begin, end, items, rows, offset, network, wanted, *best_arrays, scratch
            )

        self._over_users(work, len(best.scores))

    def scores(self, users: kernel.Users, n_users: int, items: kernel.Items) -> Tensor:
        """``[n_users, items]`` float32."""
        out = np.empty((n_users, items.n), np.float32)

        def work(begin: int, end: int) -> None:
            scratch = self._scratch(self._network)
            kernel.all_scores(users, begin, end, items, self._network, out, scratch)

        self._over_users(work, n_users)
        return torch.from_numpy(out)

    def _rows_of(self, items: kernel.Items) -> kernel.FloatArray:
        """`kernel.rows_of`, cached for the next users with the same items."""
        kept = self._rows
        if kept is None or kept[0] is not items.factors:
            self._rows = kept = items.factors, kernel.rows_of(items)
        return kept[1]

    def _scratch(self, network: kernel.Network) -> kernel.FloatArray:
        return kernel.aligned_zeros((network.rows + ROWS) * BLOCK)

    def _over_users(self, work: Callable[[int, int], None], n: int) -> None:
        step = -(-USERS_PER_TASK // ROWS) * ROWS
        begins = range(0, n, step)
        if self._threads == 1 or len(begins) < 2:
            work(0, n)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            for done in [pool.submit(work, b, min(b + step, n)) for b in begins]:
                done.result()
