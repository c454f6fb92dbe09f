"""Rankings without a neural network, fitted on the same training positives as the model."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from deepfm_dist.compiled import compiled
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, Values
from deepfm_dist.errors import ConfigError
from deepfm_dist.ranking.topk import top_k

MAX_ITEMS = 30_000
"""Items up to which an item-item matrix is computed: float64 of this side takes 7 GB."""

Fitted = Callable[[Jagged, Int32Array], Tensor]
"""(each user's training items, ``[n]`` users) -> ``[n, I]`` float32 scores. Picklable."""


class Baseline(Protocol):
    """A way to rank."""

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """Learns from each user's training items, numbers below ``n_items``, each once."""
        ...


@dataclass(frozen=True)
class Popularity:
    """Items by their number of training positives, for everyone the same."""

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """See `Baseline`."""
        counts = np.bincount(train.values, minlength=n_items)
        return partial(_the_same, torch.from_numpy(counts.astype(np.float32)))


@dataclass(frozen=True)
class ItemKNN:
    """Every training item of a user votes for the items most similar to it.

    Attributes:
        neighbours: items that one item votes for; the weight is the cosine of both items' users.

    Source: Deshpande, Karypis, "Item-Based Top-N Recommendation Algorithms", 2004.
    """

    neighbours: int

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """See `Baseline`."""
        together = torch.from_numpy(_together(train, n_items, "item_knn"))
        norm = together.diagonal().sqrt().clamp(min=1)
        cosine = (together / norm[:, None] / norm).fill_diagonal_(0)
        nearest, cosines = top_k(cosine.float(), min(self.neighbours, n_items))
        weights = torch.zeros(n_items, n_items).scatter_(1, nearest, cosines)
        return partial(_linear, weights)


@dataclass(frozen=True)
class Ease:
    """The item-item matrix with a zero diagonal that best rebuilds the training positives.

    Attributes:
        l2: weight of its squared norm.

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019: with
    ``P = (X'X + l2 I)^-1``, ``B_ij = -P_ij / P_jj`` off the diagonal.
    """

    l2: float

    def fit(self, train: Jagged, n_items: int) -> Fitted:
        """See `Baseline`."""
        return partial(_linear, self._weights(_together(train, n_items, "ease")).float())

    def factors(
        self,
        train: Jagged,
        n_items: int,
        n_factors: int,
        groups: Jagged | None = None,
        group_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Two vectors an item that give nearly its scores.

        Of all rankings whose scores are ``<sum of the user's items' first vectors, second
        vector>``, this one's are nearest to EASE's for the training users, in squares: with B the
        item-item matrix and V the leading right singular vectors of XB, they are BV and V. Cut in
        this way EASE ranks unseen items better than it does whole, where users are few.

        Args:
            train: each user's training items, numbers below ``n_items``, each once.
            n_items: I.
            n_factors: length of a vector.
            groups: items that have something in common, such as a genre; each group counts as
                ``group_weight`` users who have all of its items.
            group_weight: see there.

        Returns:
            ``[I, n_factors]`` float32 each; what exceeds the items is 0.

        Source: Izenman, "Reduced-rank regression for the multivariate linear model", 1975;
        singular vectors by Halko, Martinsson, Tropp, "Finding structure with randomness", 2011;
        groups by Jeunen, Van Balen, Goethals, "Closed-form models for collaborative filtering with
        side-information", 2020.
        """
        together = _together(train, n_items, "ease")
        fitted_on = together
        if groups is not None and group_weight:
            fitted_on = together + group_weight * _together(groups, n_items, "ease")
        weights = self._weights(fitted_on).float()
        of_scores = weights.T @ torch.from_numpy(together).float() @ weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(n_items)
            spread = min(n_items, n_factors + 24)
            leading = torch.svd_lowrank(of_scores, q=spread, niter=4)[2][:, :n_factors]
        leading = pad(leading, (0, n_factors - leading.shape[1]))
        return weights @ leading, leading

    def _weights(self, together: npt.NDArray[np.float64]) -> Tensor:
        gram = torch.from_numpy(together).clone()
        gram.diagonal().add_(self.l2)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return (inverse / -inverse.diagonal()).fill_diagonal_(0)


@dataclass(frozen=True)
class Ials:
    """Weighted matrix factorisation by alternating least squares, by the library ``implicit``.

    Attributes:
        factors: length of a user's and an item's vector.
        l2: weight of their squared norms.
        alpha: weight of a positive; everything else has 1.
        iterations: passes over users and items.
        seed: of the first vectors.

    Source: Hu, Koren, Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", 2008.
    """

    factors: int
    l2: float
    alpha: float
    iterations: int
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
            factors=self.factors,
            regularization=self.l2,
            alpha=self.alpha,
            iterations=self.iterations,
            num_threads=torch.get_num_threads(),
            random_state=self.seed % 2**32,
        )
        model.fit(csr_matrix((ones, train.values, train.offsets), shape), show_progress=False)
        users, items = (torch.from_numpy(f) for f in (model.user_factors, model.item_factors))
        return partial(_product, users, items)


def ease_tables(
    dataset: PreparedDataset, columns: int, l2: float, weight: float, of_fields: float = 0.0
) -> dict[str, Tensor]:
    """EASE, fitted on the training positives, as columns of two tables.

    Args:
        dataset: the prepared dataset.
        columns: how many.
        l2: EASE's.
        weight: of its scores.
        of_fields: as how many users each value of an item's field counts, who have all of its
            items.

    Returns:
        ``[rows, columns]`` by table, whose products are ``weight`` times EASE's scores, up to the
        pooling of the history.

    Raises:
        ConfigError: there is no table of items or of histories of them.
    """
    manifest, n_items = dataset.manifest, dataset.manifest.entities["item"]
    of_items = [f for f in manifest.categorical if f.entity == "item"]
    items = [f for f in of_items if f.is_id]
    own = [
        f
        for f in manifest.features
        if f.history is not None
        and manifest.data.source_of(f).is_id
        and manifest.tables[f.table_name].features == (f.name,)
    ]
    if not items or not own:
        raise ConfigError(
            "combine: EASE needs the items' own id and a history of items with a table of its own "
            "among data.features: {name: item, entity: item}, {name: seen, entity: user, history: "
            "item}"
        )
    groups = [_items_by_value(dataset.entity_fields[f.name]) for f in of_items if not f.is_id]
    shared = Jagged.concatenated(groups) if groups else None
    first, second = Ease(l2).factors(distinct(dataset.history), n_items, columns, shared, of_fields)
    return {own[0].table_name: weight * first, items[0].table_name: second}


def _items_by_value(values: Values) -> Jagged:
    """For each value of an item's field but the unknown one, the items that have it."""
    of_item = np.arange(len(values))
    if isinstance(values, Jagged):
        of_item, values = np.repeat(of_item, values.lengths), values.values
    flat = values.astype(np.int32, copy=False)
    known = flat > 0
    n = int(flat.max(initial=0)) + 1
    return distinct(Jagged.from_pairs(flat[known], of_item[known], n))


def distinct(jagged: Jagged) -> Jagged:
    """The same rows, each value once and in ascending order; negative ones are left out."""
    owner = np.repeat(np.arange(len(jagged)), jagged.lengths)[jagged.values >= 0]
    pairs = np.unique(np.stack([owner, jagged.values[jagged.values >= 0]], 1), axis=0)
    return Jagged.from_pairs(pairs[:, 0], pairs[:, 1], len(jagged))


def _together(train: Jagged, n_items: int, name: str) -> npt.NDArray[np.float64]:
    """``[I, I]`` number of users who have both items.

    Raises:
        ConfigError: the matrix is too large.
    """
    if n_items > MAX_ITEMS:
        raise ConfigError(
            f"evaluate.baselines: {name} needs a matrix of {n_items:,} x {n_items:,} items "
            f"({n_items**2 * 8 / 1e9:,.0f} GB); it is made for at most {MAX_ITEMS:,} items: leave "
            f"it out"
        )
    return _co_counts(train.offsets, train.values, n_items)


@compiled
def _co_counts(offsets: Int64Array, values: Int32Array, n_items: int) -> Any:
    counts = np.zeros((n_items, n_items))
    for row in range(len(offsets) - 1):
        for a in range(offsets[row], offsets[row + 1]):
            for b in range(offsets[row], offsets[row + 1]):
                counts[values[a], values[b]] += 1
    return counts


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
