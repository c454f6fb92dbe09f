"""Rankings without a neural network, fitted on the same training positives as the model."""

import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural
from deepfm_dist.ranking.settings import IalsConfig

log = logging.getLogger(__name__)
USABLE = 0.8
"""Share of the available memory that a baseline may take."""
_FIT_BYTES = 12
"""Bytes per cell of EASE's item-item matrix while it is fitted."""

Fitted = Callable[[Jagged, Int32Array], Tensor]
"""Maps (each user's training items, ``[n]`` users) to ``[n, I]`` float32 scores. Picklable."""


class Baseline(Protocol):
    """A ranking method that needs no gradient descent."""

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """Fits to each user's distinct training items, numbered below ``n_items``."""
        ...

    def fit_to_memory(self, n_items: int, room_bytes: int) -> tuple["Baseline", str]:
        """A variant of the baseline that fits into memory.

        Args:
            n_items: number of items in the catalogue.
            room_bytes: available memory.

        Returns:
            The variant, and a suffix for its name in tables; empty if it is unchanged.

        Raises:
            ConfigError: no variant fits.
        """
        ...


class AnySize:
    """A baseline whose memory grows linearly with the number of items."""

    def fit_to_memory(self, n_items: int, room_bytes: int) -> tuple["Baseline", str]:
        """See `Baseline`."""
        return cast(Baseline, self), ""


@dataclass(frozen=True)
class Popularity(AnySize):
    """Items by their number of training positives, the same for all users."""

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """See `Baseline`."""
        counts = np.bincount(train.values, minlength=n_items)
        return partial(_the_same, torch.from_numpy(counts.astype(np.float32)))


@dataclass(frozen=True)
class ItemKNN:
    """Every training item of a user votes for the items most similar to it.

    Attributes:
        neighbours: number of items that each item votes for, weighted by the cosine of the two
            items' users.

    Source: Deshpande, Karypis, "Item-Based Top-N Recommendation Algorithms", 2004.
    """

    neighbours: int

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """See `Baseline`."""
        owner = np.repeat(np.arange(len(train), dtype=np.int32), train.lengths)
        users = Jagged.from_pairs(train.values, owner, n_items)
        k = min(self.neighbours, n_items)
        nearest, cosines = np.full((n_items, k), -1, np.int32), np.zeros((n_items, k), np.float32)
        _neighbours(users.offsets, users.values, train.offsets, train.values, nearest, cosines)
        return partial(_votes, nearest, cosines)

    def fit_to_memory(self, n_items: int, room_bytes: int) -> tuple[Baseline, str]:
        """See `Baseline`."""
        needed = 8 * n_items * min(self.neighbours, n_items)
        if needed > USABLE * room_bytes:
            raise ConfigError(
                f"evaluate.baselines: item_knn keeps {self.neighbours:,} neighbours of each of "
                f"{n_items:,} items, {needed / 1e9:,.3g} GB, and {room_bytes / 1e9:,.3g} GB of "
                f"memory are available; set evaluate.item_knn_neighbours="
                f"{max(1, int(USABLE * room_bytes / 8 / n_items))}, or leave it out"
            )
        return self, ""


@dataclass(frozen=True)
class Ease:
    """The item-item matrix with a zero diagonal that best reconstructs the training positives.

    Its memory grows with the square of the items, and its time with the cube. If memory does not
    suffice, it is fitted on the most popular items, and the others follow by popularity.

    Attributes:
        l2: L2 regularisation.
        n_fitted: number of most popular items to fit; None: all.

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019: with
    ``P = (X'X + l2 I)^-1``, ``B_ij = -P_ij / P_jj`` off the diagonal.
    """

    l2: float
    n_fitted: int | None = None

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """See `Baseline`."""
        if self.n_fitted is None:
            return partial(_linear, self.weights(co_counts(train, n_items)))
        counts = np.bincount(train.values, minlength=n_items)
        popular = np.sort(np.argsort(-counts, kind="stable")[: self.n_fitted])
        place = np.full(n_items, -1, np.int32)
        place[popular] = np.arange(len(popular))
        log.warning(
            "ease: fitted on the %s most popular of %s items, which have %.1f %% of the training "
            "positives; then all others by popularity",
            f"{len(popular):,}",
            f"{n_items:,}",
            100 * counts[popular].sum() / max(1, counts.sum()),
        )
        kept = distinct(Jagged(train.offsets, place[train.values]))
        weights = self.weights(co_counts(kept, len(popular)))
        # Integers that float32 represents exactly, below every score.
        tail = torch.from_numpy(counts - float(2**24)).float()
        return partial(_linear_among, weights, popular, place, tail)

    def fit_to_memory(self, n_items: int, room_bytes: int) -> tuple[Baseline, str]:
        """See `Baseline`."""
        room = int(math.sqrt(USABLE * room_bytes / _FIT_BYTES))
        if n_items <= room:
            return self, ""
        step = 10_000 if room >= 10_000 else 1_000  # stable despite small changes of free memory
        n_fitted = room // step * step
        if n_fitted == 0:
            raise ConfigError(
                f"evaluate.baselines: ease takes {_FIT_BYTES * n_items**2 / 1e9:,.1f} GB for a "
                f"matrix of {n_items:,} x {n_items:,} items, and {room_bytes / 1e9:,.2f} GB of "
                f"memory are available; leave it out"
            )
        return replace(self, n_fitted=n_fitted), f" on {plural(n_fitted, 'item')}"

    def weights(self, together: npt.NDArray[np.float64]) -> Tensor:
        """``[I, I]`` B in float32, from `co_counts`, which are overwritten to save memory."""
        return self.weights_and_deviations(together)[0]

    def weights_and_deviations(self, together: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """`weights`, and the items' residual standard deviations times the root of the users.

        Returns:
            ``[I, I]`` B and ``[I]`` ``P_jj^(-1/2)``, float32: the minimum that B's column j attains
            in ``|x_j - X b|^2 + l2 |b|^2`` with ``b_j = 0`` is ``1 / P_jj - l2``.
        """
        gram = torch.from_numpy(together)
        gram.diagonal().add_(self.l2)
        columns = gram.T  # column-major for LAPACK; the matrix is symmetric
        torch.linalg.cholesky(columns, out=columns)
        inverse = torch.cholesky_inverse(columns, out=columns)
        precisions = inverse.diagonal().clone()
        inverse.div_(-precisions).fill_diagonal_(0)
        weights = inverse.to(torch.float32, memory_format=torch.contiguous_format)
        return weights, precisions.rsqrt().float()


@dataclass(frozen=True)
class Ials(AnySize):
    """Weighted matrix factorisation by alternating least squares, with the library implicit.

    Attributes:
        config: its settings.
        seed: the seed of the initial vectors.

    Source: Hu, Koren, Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", 2008.
    """

    config: IalsConfig
    seed: int

    def __post_init__(self) -> None:
        if importlib.util.find_spec("implicit") is None:
            raise ConfigError(
                "evaluate.baselines: ials needs the library implicit, which is not installed; "
                "pip install implicit, or leave ials out"
            )

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """See `Baseline`."""
        from implicit.cpu.als import AlternatingLeastSquares
        from scipy.sparse import csr_matrix

        ones = np.ones(len(train.values), np.float32)
        shape = (len(train), n_items)
        model = AlternatingLeastSquares(
            factors=self.config.factors,
            regularization=self.config.l2,
            alpha=self.config.alpha,
            iterations=self.config.iterations,
            num_threads=torch.get_num_threads(),
            random_state=self.seed % 2**32,
        )
        model.fit(csr_matrix((ones, train.values, train.offsets), shape), show_progress=False)
        users, items = (torch.from_numpy(f) for f in (model.user_factors, model.item_factors))
        return partial(_product, users, items)


def distinct(jagged: Jagged) -> Jagged:
    """The rows with their distinct non-negative values in ascending order."""
    owner = np.repeat(np.arange(len(jagged)), jagged.lengths)[jagged.values >= 0]
    pairs = np.unique(np.stack([owner, jagged.values[jagged.values >= 0]], 1), axis=0)
    return Jagged.from_pairs(pairs[:, 0], pairs[:, 1], len(jagged))


def co_counts(train: Jagged, n_items: int) -> npt.NDArray[np.float64]:
    """``[I, I]`` number of users with both items."""
    counts: npt.NDArray[np.float64] = _co_counts(train.offsets, train.values, n_items)
    return counts


@compiled
def _co_counts(offsets: Int64Array, values: Int32Array, n_items: int) -> Any:
    counts = np.zeros((n_items, n_items))
    for row in range(len(offsets) - 1):
        for a in range(offsets[row], offsets[row + 1]):
            for b in range(offsets[row], offsets[row + 1]):
                counts[values[a], values[b]] += 1
    return counts


@compiled
def _neighbours(
    user_offsets: Int64Array,
    users: Int32Array,
    item_offsets: Int64Array,
    items: Int32Array,
    nearest: Any,
    cosines: Any,
) -> None:
    """Fills ``[I, K]`` with the K items of highest cosine, equal ones in ascending order.

    One item at a time: counts of what its users have, then the best of these.

    Source: Gustavson, "Two fast algorithms for sparse matrices", 1978.

    Args:
        user_offsets: ``[I + 1]`` into ``users``: of each item.
        users: users of the items.
        item_offsets: ``[U + 1]`` into ``items``: of each user.
        items: items of the users.
        nearest: ``[I, K]`` int32; entries without a neighbour keep their value.
        cosines: ``[I, K]`` float32, in the same order.
    """
    n_items, k = nearest.shape
    norm = np.sqrt(np.maximum(np.diff(user_offsets), 1).astype(np.float64))
    counts, met = np.zeros(n_items), np.empty(n_items, np.int32)
    for item in range(n_items):
        n = 0
        for user in users[user_offsets[item] : user_offsets[item + 1]]:
            for other in items[item_offsets[user] : item_offsets[user + 1]]:
                if counts[other] == 0 and other != item:
                    met[n] = other
                    n += 1
                counts[other] += other != item
        candidates = np.sort(met[:n])
        cosine = np.empty(n, np.float32)
        for at, other in enumerate(candidates):
            cosine[at] = counts[other] / norm[item] / norm[other]
            counts[other] = 0
        n_kept = min(k, n)
        bound = np.partition(cosine, n - n_kept)[n - n_kept] if n_kept else np.float32(0)
        n_tied = n_kept - (cosine > bound).sum()  # among equal values at the cut, the first ones
        place = 0
        for at, other in enumerate(candidates):
            tied = cosine[at] == bound
            if cosine[at] > bound or (tied and n_tied > 0):
                n_tied -= tied
                nearest[item, place], cosines[item, place] = other, cosine[at]
                place += 1


@compiled
def _vote(offsets: Int64Array, items: Int32Array, nearest: Any, cosines: Any, scores: Any) -> None:
    """Adds the votes of each user's items for their neighbours to the scores."""
    for user in range(len(offsets) - 1):
        for item in items[offsets[user] : offsets[user + 1]]:
            for place in range(nearest.shape[1]):
                if nearest[item, place] >= 0:
                    scores[user, nearest[item, place]] += cosines[item, place]


def _votes(nearest: Any, cosines: Any, train: Jagged, users: Int32Array) -> Tensor:
    lengths, items = train.take(users)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    scores = np.zeros((len(users), len(nearest)), np.float32)
    _vote(offsets, items, nearest, cosines, scores)
    return torch.from_numpy(scores)


def _linear_among(
    weights: Tensor,
    fitted: Int64Array,
    place: Int32Array,
    others: Tensor,
    train: Jagged,
    users: Int32Array,
) -> Tensor:
    """Scores of the fitted items by their weights; the others keep the given scores."""
    lengths, items = train.take(users)
    owner = np.repeat(np.arange(len(users)), lengths)[place[items] >= 0]
    among = Jagged.from_pairs(owner, place[items][place[items] >= 0], len(users))
    scores = others.repeat(len(users), 1)
    scores[:, torch.from_numpy(fitted)] = _linear(
        weights, among, np.arange(len(users), dtype=np.int32)
    )
    return scores


def _the_same(per_item: Tensor, train: Jagged, users: Int32Array) -> Tensor:
    return per_item.repeat(len(users), 1)


def _linear(weights: Tensor, train: Jagged, users: Int32Array) -> Tensor:
    lengths, items = train.take(users)
    offsets = np.cumsum(lengths) - lengths
    bags = torch.from_numpy(items).long(), torch.from_numpy(offsets).long()
    return embedding_bag(bags[0], weights, bags[1], mode="sum")


def _product(
    user_factors: Tensor, item_factors: Tensor, train: Jagged, users: Int32Array
) -> Tensor:
    return user_factors[torch.from_numpy(users).long()] @ item_factors.T
