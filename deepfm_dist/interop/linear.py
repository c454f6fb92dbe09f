"""The closed-form part of a model that ranks: EASE as further columns of its FM, fitted to it.

What is trained and EASE know different things, and in one FM their scores add up. How strong EASE's
L2 is, what the items' fields say, how many columns are kept and what EASE's scores weigh next to
the trained ones is measured on validation rows (`search`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from deepfm_dist.data.jagged import Int32Array, Jagged
from deepfm_dist.ranking.baselines import Ease, co_counts
from deepfm_dist.ranking.metrics import hits, ndcg

log = logging.getLogger(__name__)
Float64Array = npt.NDArray[np.float64]
L2 = (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
FIELD_WEIGHTS = (0.0, 2.0, 6.0, 20.0, 60.0)
SHARES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Spread of EASE's weighted scores over that of the trained logits: at the last, EASE decides."""
COLUMNS = (64, 128, 256, 512)
SEARCHED_ITEMS = 4_000
"""Items among which the search ranks, the most popular ones: it fits EASE some ten times, and the
time of each grows with the cube of the items."""
_OVERSAMPLED = 24
_PASSES = 4


@dataclass(frozen=True)
class Linear:
    """How EASE is fitted and weighed.

    Attributes:
        l2: its weight decay.
        field_weight: each value of an item's field counts as this many users who have all of its
            items.
        columns: of the FM.
        weight: of its scores next to the trained part's logits; 0 leaves EASE out.
        ndcg: of both together on the validation users.
        ndcg_trained: of the trained part alone.
        ndcg_ease: of EASE alone.
    """

    l2: float = 500.0
    field_weight: float = 0.0
    columns: int = 256
    weight: float = 1.0
    ndcg: float = 0.0
    ndcg_trained: float = 0.0
    ndcg_ease: float = 0.0


@dataclass(frozen=True)
class Validation:
    """Users whose held-out items are to be ranked high.

    Attributes:
        bags: ``[U]`` lists of item rows: what the model sees of each user.
        relevant: ``[U]`` lists of the held-out item rows.
        masked: ``[U]`` lists of the item rows that are not ranked.
        trained: ``[U, I]`` logits of the trained part by item row.
        power: of the length of a bag by which pooling divides its sum.
        k: cut-off of the NDCG.
    """

    bags: Jagged
    relevant: Jagged
    masked: Jagged
    trained: Tensor
    power: float = 0.5
    k: int = 10

    def among(self, rows: Int32Array) -> "Validation":
        """The same ranking of some items alone, by their place, for users who have some of them."""
        place = np.full(self.trained.shape[1], -1, np.int32)
        place[rows] = np.arange(len(rows))
        bags, relevant, masked = (
            _renumber(lists, place) for lists in (self.bags, self.relevant, self.masked)
        )
        users = np.flatnonzero(relevant.lengths)
        trained = self.trained[torch.from_numpy(users)][:, torch.from_numpy(rows).long()]
        return replace(
            self,
            bags=_some(bags, users),
            relevant=_some(relevant, users),
            masked=_some(masked, users),
            trained=trained,
        )

    def scores(self, weights: Tensor) -> Tensor:
        """``[U, I]`` sums of EASE's rows over the bags, divided as the model divides."""
        offsets = torch.from_numpy(self.bags.offsets[:-1])
        bags = torch.from_numpy(self.bags.values).long()
        sums = embedding_bag(bags, weights, offsets, mode="sum")
        lengths = torch.from_numpy(self.bags.lengths).clamp(min=1)
        return sums / lengths.float().pow(self.power)[:, None]

    def ndcg(self, scores: Tensor) -> float:
        """Mean NDCG@K of a ranking by ``[U, I]`` scores."""
        return float(self.ndcg_by_user(scores).mean())

    def ndcg_by_user(self, scores: Tensor) -> Float64Array:
        """``[U]`` NDCG@K of a ranking by ``[U, I]`` scores."""
        owner = np.repeat(np.arange(len(self.masked)), self.masked.lengths)
        scores = scores.clone()
        scores[torch.from_numpy(owner), torch.from_numpy(self.masked.values).long()] = -torch.inf
        best, ranked = scores.topk(min(self.k, scores.shape[1]), dim=1)
        shown = np.full((len(ranked), self.k), -1)  # of a catalogue of fewer items, too
        shown[:, : ranked.shape[1]] = np.where(best.isfinite().numpy(), ranked.numpy(), -1)
        return ndcg(hits(shown, self.relevant), self.relevant.lengths, self.k)


def search(train: Jagged, n_items: int, groups: Jagged | None, users: Validation) -> Linear:
    """Finds what EASE adds to a trained model.

    One setting after the other: L2, the weight of the items' fields, the number of columns. For
    each, the weight next to the trained part that gives the best NDCG. Few validation users hardly
    tell one weight from another: see `_likely`.

    Args:
        train: each user's training items, rows below ``n_items``, each once.
        n_items: rows of the item table.
        groups: items that have a value of a field in common; None: there are no fields.
        users: to measure on.

    Returns:
        The best; with weight 0 where EASE adds nothing.
    """
    counts = np.bincount(train.values, minlength=n_items)
    rows = np.sort(np.argsort(-counts, kind="stable")[:SEARCHED_ITEMS]).astype(np.int32)
    users = users.among(rows)
    if not len(users.relevant):
        return Linear(weight=0.0)
    gram = _gram(train, rows, n_items)
    group_gram = None if groups is None else _gram(groups, rows, n_items)
    trained, spread = users.ndcg_by_user(users.trained), _spread(users.trained)

    def with_likely_weight(linear: Linear, scores: Tensor) -> tuple[Linear, Float64Array]:
        """The settings with the weight that the figures support, and the users' figures."""
        unit = spread / max(_spread(scores), 1e-9)
        weights = [float(f"{share * unit:.2g}") for share in SHARES]
        figures = {w: users.ndcg_by_user(users.trained + w * scores) for w in weights}
        weight = _likely(figures, trained)
        figure = figures.get(weight, trained)
        found = replace(
            linear,
            weight=weight,
            ndcg=float(figure.mean()),
            ndcg_trained=float(trained.mean()),
            ndcg_ease=users.ndcg(scores),
        )
        return found, figure

    def fit(l2: float, field_weight: float) -> tuple[Linear, Float64Array]:
        weights = ease_weights(gram, l2, group_gram, field_weight)
        return with_likely_weight(Linear(l2, field_weight), users.scores(weights))

    fits = {l2: fit(l2, 0.0) for l2 in L2}
    best = fits[_likely({l2: figure for l2, (_, figure) in fits.items()}) or L2[0]][0]
    if group_gram is not None:
        best = _climb(FIELD_WEIGHTS, 0, lambda w: best if w == 0 else fit(best.l2, w)[0])
    weights = ease_weights(gram, best.l2, group_gram, best.field_weight)

    def cut(n: int) -> Linear:
        # Their own vectors, as the model gets them: the leading ones of more differ a little.
        leading = leading_vectors(weights, gram, n)
        scores = users.scores(weights @ leading) @ leading.T
        return with_likely_weight(replace(best, columns=n), scores)[0]

    options = sorted({min(n, len(rows)) for n in COLUMNS})  # all of few items: nothing is cut
    return max(map(cut, options), key=lambda linear: (linear.ndcg, linear.ndcg_ease))


def _gram(lists: Jagged, rows: Int32Array, n_items: int) -> Tensor:
    """``[R, R]`` float32: how many lists contain both of two items, for the items ``rows``."""
    place = np.full(n_items, -1, np.int32)
    place[rows] = np.arange(len(rows))
    return torch.from_numpy(co_counts(_renumber(lists, place), len(rows))).float()


def _spread(scores: Tensor) -> float:
    """Median over users of the standard deviation of their finite ``[U, I]`` scores."""
    finite = scores.isfinite()
    kept = torch.where(finite, scores, 0.0).double()
    n = finite.sum(1).clamp(min=1)
    mean = kept.sum(1) / n
    return float((kept.square().sum(1) / n - mean.square()).clamp(min=0).sqrt().median())


def _likely(figures: Mapping[float, Float64Array], without: Float64Array | None = None) -> float:
    """The setting that the figures support: with few users, not simply the best one.

    The best of many settings is better by chance, too. From the best one up, towards EASE alone and
    a strong L2, which are safer for few users, each setting counts by how well its difference from
    the best one can be chance, exp(-z^2 / 2), and the geometric mean decides: of many users that is
    the best one.

    Args:
        figures: ``[U]`` of each setting, in ascending order.
        without: ``[U]`` of setting 0, if it is one.

    Returns:
        One of the settings; 0 if that is better than each by more than its standard error, or the
        same to every user.
    """
    start, best = max(figures.items(), key=lambda item: float(item[1].mean()))
    if without is not None and without.mean() >= best.mean():
        start, best = 0.0, without

    def z(figure: Float64Array) -> float:
        difference = best - figure
        error = float(difference.std()) / len(difference) ** 0.5
        return float(difference.mean()) / error if error else 0.0

    distances = {setting: z(figure) for setting, figure in figures.items()}
    is_alike = any((figure == best).all() for figure in figures.values())
    if start == 0 and (is_alike or min(distances.values()) > 1):
        return 0.0
    shares = {s: math.exp(-(z**2) / 2) for s, z in distances.items() if s >= start}
    mean = sum(share * math.log(s) for s, share in shares.items()) / sum(shares.values())
    return min(figures, key=lambda setting: abs(math.log(setting) - mean))


def _climb(grid: Sequence[float], start: int, at: Callable[[float], Linear]) -> Linear:
    """The best place of a grid on which one hill is expected, from a start uphill."""
    tried = {start: at(grid[start])}

    def value(place: int) -> float:
        if place not in tried:
            tried[place] = at(grid[place])
        return tried[place].ndcg

    here = start
    while True:
        around = [p for p in (here - 1, here + 1) if 0 <= p < len(grid)]
        best = max(around, key=value)
        if value(best) <= value(here):
            return tried[here]
        here = best


def ease_weights(
    gram: Tensor, l2: float, group_gram: Tensor | None = None, field_weight: float = 0.0
) -> Tensor:
    """EASE's matrix, in the precision of the ``[I, I]`` counts, which are not changed."""
    fitted_on = gram.clone()
    if group_gram is not None and field_weight:
        fitted_on.add_(group_gram, alpha=field_weight)
    return Ease(l2).weights(fitted_on.numpy())


def leading_vectors(weights: Tensor, gram: Tensor, n: int) -> Tensor:
    """``[I, n]`` leading right singular vectors of EASE's scores of the training users.

    They are eigenvectors of ``B' G B``, which is not formed: it would take longer than all else.

    Args:
        weights: ``[I, I]`` B.
        gram: ``[I, I]`` G, counts of pairs of items.
        n: number of vectors; those beyond the items are 0.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011.
    """
    n_items = len(weights)

    def product(vectors: Tensor) -> Tensor:
        return weights.T @ (gram @ (weights @ vectors))

    generator = torch.Generator().manual_seed(n_items)
    basis = torch.randn(n_items, min(n_items, n + _OVERSAMPLED), generator=generator)
    for _ in range(_PASSES):
        basis = torch.linalg.qr(product(basis.to(weights.dtype))).Q
    inside = basis.T @ product(basis)
    vectors = torch.linalg.eigh((inside + inside.T) / 2).eigenvectors.flip(1)[:, :n]
    return pad(basis @ vectors, (0, n - vectors.shape[1]))


def _renumber(lists: Jagged, place: npt.NDArray[np.int32]) -> Jagged:
    """Lists of item rows as lists of their places; those without one are left out.

    Rows behind the item table are cold items, which have no place.
    """
    places = np.pad(place, (0, 1), constant_values=-1)[np.minimum(lists.values, len(place))]
    owner = np.repeat(np.arange(len(lists)), lists.lengths)[places >= 0]
    return Jagged.from_pairs(owner, places[places >= 0], len(lists))


def _some(lists: Jagged, which: Iterable[int]) -> Jagged:
    rows = np.asarray(which)
    return Jagged.from_pairs(
        np.repeat(np.arange(len(rows)), lists.lengths[rows]), lists.take(rows)[1], len(rows)
    )
