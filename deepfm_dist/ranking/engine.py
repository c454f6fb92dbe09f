"""What scores and ranks: a kernel on CPU or CUDA, or torch for the models neither is for."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.errors import ConfigError
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking import kernel
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.topk import NO_ITEM, mask_of, masked_top_k, top_k

log = logging.getLogger(__name__)

USER_BLOCK = 512
"""Users looked up and multiplied together: a GEMM's last digits depend on its height."""
Precision = Literal["fp32", "tf32", "bf16"]
"""Of the over-arch's products on CUDA."""

USERS_PER_TASK = 64
"""Users that a thread takes at a time."""


@dataclass(frozen=True)
class Best:
    """The best items of some users so far.

    Attributes:
        scores: ``[n, K]`` float32, best first; ``-inf`` in empty places.
        positions: ``[n, K]`` int64; `NO_ITEM` in empty places.
    """

    scores: Tensor
    positions: Tensor

    @classmethod
    def none(cls, n: int, k: int, device: torch.device) -> Self:
        """No item for any of n users."""
        scores = torch.full((n, k), float("-inf"), device=device)
        return cls(scores, torch.full((n, k), NO_ITEM, dtype=torch.int64, device=device))


class Engine(Protocol):
    """Ranks items for users, both prepared by it.

    Attributes:
        name: what it is.
        work_bytes: memory it works in, beside the item itself, for every item of a block.
    """

    name: str
    work_bytes: int

    def allocate(self, n: int, like: Side) -> Any:
        """Room for n items."""

    def fill(self, items: Any, begin: int, side: Side) -> None:
        """Puts items into their place; what is past the end is left out."""

    def users(self, sides: Sequence[Side]) -> Any:
        """Prepares users, in blocks of `USER_BLOCK`."""

    def update(
        self, users: Any, items: Any, offset: int, seen: Jagged, best: Best, deep: bool = True
    ) -> None:
        """Runs items past the first ``len(best.scores)`` users.

        Args:
            users: from `users`.
            items: from `allocate`, filled; of higher positions than any that came before.
            offset: position of the first.
            seen: each user's masked positions.
            best: changed in place.
            deep: whether the over-arch counts.
        """

    def update_of_candidates(
        self, users: Any, items: Any, offset: int, candidates: Tensor, best: Best
    ) -> None:
        """`update` for each user's own items, ``[n, N]`` positions, ascending, `NO_ITEM` first."""

    def scores(self, users: Any, n_users: int, items: Any) -> Tensor:
        """``[n_users, items]`` float32."""


class TorchEngine:
    """Any model on any device.

    Args:
        scorer: of the model.
    """

    def __init__(self, scorer: CatalogueScorer) -> None:
        self.name = "torch"
        # Scores, and in the top-K keys of eight bytes, their shifted halves and the mask's copy.
        self.work_bytes = USER_BLOCK * (4 + 3 * 8)
        self._scorer = scorer

    def allocate(self, n: int, like: Side) -> Side:
        """Room for n items."""
        return Side(*(t.new_empty(n, *t.shape[1:]) for t in like.tensors))

    def fill(self, items: Side, begin: int, side: Side) -> None:
        """Puts items into their place; what is past the end is left out."""
        for target, source in zip(items.tensors, side.tensors, strict=True):
            room = target[begin : begin + len(source)]
            room.copy_(source[: len(room)])

    def users(self, sides: Sequence[Side]) -> Side:
        """Prepares users."""
        return Side(*map(torch.cat, zip(*(s.tensors for s in sides), strict=True)))

    def update(
        self, users: Side, items: Side, offset: int, seen: Jagged, best: Best, deep: bool = True
    ) -> None:
        """Runs items past users; see `Engine`."""
        n, k = best.scores.shape
        mask = mask_of(seen, best.scores.device)
        for begin in range(0, n, USER_BLOCK):
            end = min(begin + USER_BLOCK, n)
            scores = self._scorer.scores(users[begin : begin + USER_BLOCK], items, deep)
            rows, places = mask(begin, end)
            places -= offset
            here = (places >= 0) & (places < scores.shape[1])
            found = masked_top_k(scores[: end - begin], (rows[here], places[here]), k)
            self._merge(best, slice(begin, end), found[1], found[0] + offset)

    def update_of_candidates(
        self, users: Side, items: Side, offset: int, candidates: Tensor, best: Best
    ) -> None:
        """Runs each user's own items past it; see `Engine`."""
        for begin in range(0, len(best.scores), USER_BLOCK):
            block = slice(begin, min(begin + USER_BLOCK, len(best.scores)))
            places = candidates[block] - offset
            here = (places >= 0) & (places < len(items.constant))
            scores = self._scorer.scores_of_pairs(users[block], items, places.where(here, 0))
            scores[~here] = float("-inf")
            self._merge(best, block, scores, candidates[block])

    def _merge(self, best: Best, users: slice, scores: Tensor, positions: Tensor) -> None:
        """Equal scores stay in the order of their positions: those before come first."""
        joined = torch.cat([best.scores[users], scores], 1)
        order, merged = top_k(joined, best.scores.shape[1])
        positions = torch.cat([best.positions[users], positions], 1)
        best.scores[users] = merged
        best.positions[users] = positions.gather(1, order.clamp(min=0)).where(order >= 0, NO_ITEM)

    def scores(self, users: Side, n_users: int, items: Side) -> Tensor:
        """``[n_users, items]`` float32."""
        out = items.constant.new_empty(n_users, len(items.constant))
        for begin in range(0, n_users, USER_BLOCK):
            scores = self._scorer.scores(users[begin : begin + USER_BLOCK], items)
            room = out[begin : begin + USER_BLOCK]
            room.copy_(scores[: len(room)])
        return out


class KernelEngine:
    """ReLU layers on CPU: one compiled pass over the catalogue.

    Args:
        layers: of the over-arch above the first, in float64; empty where it has no hidden layer.
        threads: how many users are worked on at a time.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], threads: int) -> None:
        self.work_bytes = 0
        self.name = f"compiled kernel, {kernel.LANES * 32}-bit vectors"
        self._network = kernel.network_of([(w.numpy(), b.numpy()) for w, b in layers])
        self._pairwise = kernel.network_of([])
        self._threads = threads

    def allocate(self, n: int, like: Side) -> kernel.Items:
        """Room for n items."""
        blocks, dim, units = -(-n // kernel.BLOCK), like.factor_sum.shape[1], like.hidden.shape[1]
        constant = kernel.aligned(blocks * kernel.BLOCK)
        constant[n:] = -np.inf
        factors, hidden = (kernel.aligned(blocks * size * kernel.BLOCK) for size in (dim, units))
        return kernel.Items(constant, factors, hidden, n, dim, units)

    def fill(self, items: kernel.Items, begin: int, side: Side) -> None:
        """Puts items into their place; ``begin`` is that of a block of the kernel's."""
        n = min(items.n - begin, len(side.constant))
        items.constant[begin : begin + n] = side.constant[:n].numpy()
        first, blocks = begin // kernel.BLOCK, -(-n // kernel.BLOCK)
        for packed, values in ((items.factors, side.factor_sum), (items.hidden, side.hidden)):
            size = values.shape[1]
            room = torch.from_numpy(packed).view(-(-items.n // kernel.BLOCK), size, kernel.BLOCK)
            rows = values.new_zeros(blocks * kernel.BLOCK, size)
            rows[:n] = values[:n]
            room[first : first + blocks] = rows.view(blocks, kernel.BLOCK, size).transpose(1, 2)

    def users(self, sides: Sequence[Side]) -> kernel.Users:
        """Prepares users."""
        n = sum(len(s.constant) for s in sides)
        dim, units = sides[0].factor_sum.shape[1], sides[0].hidden.shape[1]
        height = -(-n // kernel.ROWS) * kernel.ROWS
        users = kernel.Users(
            kernel.aligned(height), kernel.aligned(height * dim), kernel.aligned(height * units)
        )
        side = Side(*map(torch.cat, zip(*(s.tensors for s in sides), strict=True)))
        users.constant[:n] = side.constant.numpy()
        users.hidden[: n * units] = side.hidden.flatten().numpy()
        factors = np.zeros((height, dim), np.float32)
        factors[:n] = side.factor_sum.numpy()
        users.factors[:] = (
            factors.reshape(height // kernel.ROWS, kernel.ROWS, dim).transpose(0, 2, 1).ravel()
        )
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
        """Runs items past users; see `Engine`."""
        network = self._network if deep else self._pairwise
        if not deep:
            items = items._replace(units=0)
        found = best.scores.numpy(), best.positions.numpy()

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
                *found,
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
        """Runs each user's own items past it; see `Engine`."""
        network, wanted = self._network, candidates.numpy()
        found = best.scores.numpy(), best.positions.numpy()

        def work(begin: int, end: int) -> None:
            scratch = self._scratch(network)
            kernel.update_top_k_of_candidates(
                users, begin, end, items, offset, network, wanted, *found, scratch
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

    def _scratch(self, network: kernel.Network) -> kernel.FloatArray:
        return kernel.aligned((network.rows + kernel.ROWS) * kernel.BLOCK)

    def _over_users(self, work: Callable[[int, int], None], n: int) -> None:
        step = -(-USERS_PER_TASK // kernel.ROWS) * kernel.ROWS
        begins = range(0, n, step)
        if self._threads == 1 or len(begins) < 2:
            work(0, n)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            for done in [pool.submit(work, b, min(b + step, n)) for b in begins]:
                done.result()


def engine_for(
    scorer: CatalogueScorer, device: torch.device, precision: Precision = "fp32"
) -> Engine:
    """The kernel of the device where it can be used, else torch; says which, and why.

    Args:
        scorer: of the model.
        device: where it is.
        precision: of the over-arch's products on CUDA.

    Raises:
        ConfigError: less than ``fp32`` is asked for where there is no kernel that computes so.
    """
    layers = scorer.layers
    reason = None
    if layers is None:
        reason = "the over-arch cannot be split into a user's and an item's part"
    elif layers and not isinstance(scorer.activation, nn.ReLU):
        reason = f"the activation is {type(scorer.activation).__name__}, not ReLU"
    elif device.type == "cpu" and not kernel.HAS_FMA:
        reason = "this processor has no fused multiply-add"
    elif device.type != "cpu" and find_spec("triton") is None:
        reason = "triton is not installed"
    elif device.type != "cpu":
        from deepfm_dist.ranking import triton_kernel

        sizes = [weight.shape[1] for weight, _ in layers]
        reason = triton_kernel.reason_against(sizes, precision)
    if precision != "fp32" and (device.type == "cpu" or reason is not None):
        raise ConfigError(
            f"recommend.precision={precision}: "
            f"{'a CPU' if device.type == 'cpu' else 'torch'} computes in fp32 here"
            f"{'' if reason is None else f' ({reason})'}; leave it out"
        )
    engine: Engine
    if reason is not None or layers is None:
        engine = TorchEngine(scorer)
        log.info("catalogue: torch, since %s", reason)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        engine = KernelEngine(layers, threads)
        log.info("catalogue: %s, %d thread%s", engine.name, threads, "s" * (threads > 1))
    else:
        engine = triton_kernel.TritonEngine(layers, precision, device)
        log.info("catalogue: %s", engine.name)
    return engine
