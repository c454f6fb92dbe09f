"""EASE as additional columns of a trained FM, tuned to complement it.

The trained part and EASE complement each other, and in one FM their scores add up. EASE's scores
are standardized by item (`standardized`). Its L2, the weight of the items' fields, the number of
columns and EASE's weight relative to the trained part are chosen on held-out items (`search`). If
these do not show that training helps, EASE alone is used.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from deepfm_dist.data.jagged import Int32Array, Jagged
from deepfm_dist.ranking.baselines import Ease, co_counts
from deepfm_dist.ranking.metrics import hits, ndcg
from deepfm_dist.ranking.settings import EASE_L2

log = logging.getLogger(__name__)
Float64Array = npt.NDArray[np.float64]
L2 = (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
FIELD_WEIGHTS = (0.0, 2.0, 6.0, 20.0, 60.0)
SHARES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Candidate ratios of the spread of EASE's weighted scores to that of the trained logits; at the
last, EASE decides.
"""
COLUMNS = (64, 128, 256, 512)
COLUMNS_ALONE = 1024
"""Maximum number of columns of EASE alone, where no trained part makes up for the others."""
SEARCHED_ITEMS = 4_000
"""Number of most popular items that the search uses: it fits EASE about ten times, each cubic in
the number of items.
"""
CLEARLY_BETTER = 2.0
"""Number of standard errors by which the model must beat EASE alone."""
_Each = TypeVar("_Each")
_OVERSAMPLED = 24
_PASSES = 4


@dataclass(frozen=True)
class Linear:
    """Settings of EASE and its weight.

    Attributes:
        l2: L2 regularisation.
        field_weight: each value of an item's field counts as this many users with all of its items.
        columns: number of columns in the FM.
        weight: the weight of its scores relative to the trained part's logits; 0 omits EASE.
        trained: share of the trained part's logits: 1, or 0 for EASE alone.
        l2_as_published: L2 with which EASE's scores as published rank best, alone.
        ndcg: NDCG of the combination on the validation users.
        ndcg_trained: NDCG of the trained part alone.
        ndcg_ease: NDCG of EASE alone, standardized.
        ndcg_as_published: NDCG of EASE alone, as published.
    """

    l2: float = EASE_L2
    field_weight: float = 0.0
    columns: int = 256
    weight: float = 1.0
    trained: float = 1.0
    l2_as_published: float = EASE_L2
    ndcg: float = 0.0
    ndcg_trained: float = 0.0
    ndcg_ease: float = 0.0
    ndcg_as_published: float = 0.0


@dataclass(frozen=True)
class Validation:
    """Users to measure rankings on.

    Attributes:
        bags: ``[U]`` lists of item rows: the histories that the model sees.
        relevant: ``[U]`` lists of the held-out item rows.
        masked: ``[U]`` lists of masked item rows.
        trained: ``[U, I]`` logits of the trained part by item row.
        power: exponent of a bag's length in pooling.
        k: cut-off of the NDCG.
        ids: ``[U]`` numbers that identify users across cuts; default: their indices.
    """

    bags: Jagged
    relevant: Jagged
    masked: Jagged
    trained: Tensor
    power: float = 0.5
    k: int = 10
    ids: Int32Array | None = None

    def among(self, rows: Int32Array) -> "Validation":
        """The same restricted to some items, renumbered, and to users with such items."""
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
            ids=users.astype(np.int32) if self.ids is None else self.ids[users],
        )

    def scores(self, weights: Tensor) -> Tensor:
        """``[U, I]`` sums of EASE's rows over the bags, pooled like the model's."""
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
        shown = np.full((len(ranked), self.k), -1)  # the catalogue may be smaller than k
        shown[:, : ranked.shape[1]] = np.where(best.isfinite().numpy(), ranked.numpy(), -1)
        return ndcg(hits(shown, self.relevant), self.relevant.lengths, self.k)


def search(
    cuts: Sequence[tuple[Jagged, Validation]], n_items: int, groups: Jagged | None
) -> Linear:
    """Chooses EASE's settings for a trained model.

    It tunes L2, the weight of the items' fields and the number of columns one by one, each with the
    weight that gives the best NDCG. Few users hardly distinguish weights: see `_likely`. The result
    must be clearly better than EASE alone with its best L2 (`CLEARLY_BETTER`), which is the safer
    choice.

    Args:
        cuts: pairs of each user's distinct training items, rows below ``n_items``, and users to
            measure on, with logits of a model trained on these items. A user's figure is the mean
            over the cuts.
        n_items: rows of the item table.
        groups: items that share a value of a field; None without fields.

    Returns:
        The best settings; with weight 0 if EASE adds nothing.
    """
    most = int(SEARCHED_ITEMS / len(cuts) ** (1 / 3))  # so that all cuts take the time of one
    counts = np.bincount(cuts[0][0].values, minlength=n_items)
    rows = np.sort(np.argsort(-counts, kind="stable")[:most]).astype(np.int32)
    parts = [
        _Part(_gram(train, rows, n_items), users)
        for train, validation in cuts
        if len((users := validation.among(rows)).relevant)
    ]
    if not parts:
        return Linear(weight=0.0)
    measured = _Measured(parts, None if groups is None else _gram(groups, rows, n_items))
    fits = {l2: measured.fit(l2) for l2 in L2}
    best = fits[_likely({l2: figure for l2, (_, figure) in fits.items()}) or L2[0]][0]
    if groups is not None:
        best = _climb(FIELD_WEIGHTS, 0, lambda w: measured.fit(best.l2, w)[0] if w else best)
    columns = sorted({min(n, len(rows)) for n in COLUMNS})  # few items: keep all columns
    fits_of_columns = measured.cut(best, columns)
    found, figure = max(fits_of_columns, key=lambda one: (one[0].ndcg, one[0].ndcg_ease))
    l2_alone = max(L2, key=lambda l2: fits[l2][0].ndcg_ease)
    alone, of_ease = measured.ease_alone(l2_alone, min(COLUMNS_ALONE, len(rows)))
    chosen = found if _z(figure - of_ease) >= CLEARLY_BETTER else alone
    as_published = max(L2, key=lambda l2: fits[l2][0].ndcg_as_published)
    return replace(chosen, l2_as_published=as_published)


@dataclass(frozen=True)
class _Part:
    """A cut: ``[R, R]`` co-occurrence counts of training items, and the users."""

    gram: Tensor
    users: Validation


@dataclass(frozen=True)
class _Measured:
    """Measures settings: mean NDCG over all cuts, and ``[users]`` per user.

    Attributes:
        parts: the cuts.
        group_gram: ``[R, R]`` counts of pairs of items that share a value of a field.
    """

    parts: Sequence[_Part]
    group_gram: Tensor | None

    @cached_property
    def trained(self) -> Float64Array:
        """``[users]`` figures of the trained part alone."""
        return self._by_user([part.users.trained for part in self.parts])

    def fit(self, l2: float, field_weight: float = 0.0) -> tuple[Linear, Float64Array]:
        """Measures EASE with all columns, at the best supported weight."""
        scores, as_published = self._scores_of_ease(l2, field_weight)
        figure = float(self._by_user_of_ease(as_published).mean())
        linear = Linear(l2, field_weight, ndcg_as_published=figure)
        return self._with_likely_weight(linear, scores)

    def cut(self, best: Linear, columns: Sequence[int]) -> list[tuple[Linear, Float64Array]]:
        """Measures several numbers of columns, each at the best supported weight."""
        matrices = [standardized(*each) for each in self._matrices(best.l2, best.field_weight)]
        found = []
        for n in columns:
            scores = []
            for part, weights in self._with(matrices):
                # Vectors computed for this number of columns: prefixes of more would differ
                # slightly.
                leading = leading_vectors(weights, part.gram, n)
                scores.append(part.users.scores(weights @ leading) @ leading.T)
            found.append(self._with_likely_weight(replace(best, columns=n), scores))
        return found

    def ease_alone(self, l2: float, columns: int) -> tuple[Linear, Float64Array]:
        """EASE without the items' fields and without the trained part."""
        alone = Linear(l2, columns=columns, trained=0.0)
        alone = replace(alone, ndcg_trained=float(self.trained.mean()))
        figure = self._by_user_of_ease(self._scores_of_ease(l2, 0.0)[0])
        return replace(alone, ndcg=float(figure.mean()), ndcg_ease=float(figure.mean())), figure

    def _scores_of_ease(self, l2: float, field_weight: float) -> tuple[list[Tensor], list[Tensor]]:
        """Each cut's ``[U, I]`` scores: standardized, and as published."""
        matrices = self._matrices(l2, field_weight)
        as_published = [part.users.scores(weights) for part, (weights, _) in self._with(matrices)]
        pairs = zip(as_published, matrices, strict=True)
        return [scores / deviations for scores, (_, deviations) in pairs], as_published

    def _matrices(self, l2: float, field_weight: float) -> list[tuple[Tensor, Tensor]]:
        return [ease_weights(part.gram, l2, self.group_gram, field_weight) for part in self.parts]

    def _with_likely_weight(
        self, linear: Linear, scores: Sequence[Tensor]
    ) -> tuple[Linear, Float64Array]:
        spreads = [(_spread(p.users.trained), _spread(s)) for p, s in self._with(scores)]
        trained, ease = np.mean(spreads, axis=0).tolist()
        unit = trained / max(ease, 1e-9)
        figures = {
            weight: self._by_user([p.users.trained + weight * s for p, s in self._with(scores)])
            for weight in (float(f"{share * unit:.2g}") for share in SHARES)
        }
        weight = _likely(figures, self.trained)
        figure = figures.get(weight, self.trained)
        found = replace(
            linear,
            weight=weight,
            ndcg=float(figure.mean()),
            ndcg_trained=float(self.trained.mean()),
            ndcg_ease=float(self._by_user_of_ease(scores).mean()),
        )
        return found, figure

    def _by_user_of_ease(self, scores: Sequence[Tensor]) -> Float64Array:
        """`_by_user` by EASE's scores alone, which masked items have, too."""
        ranked = [s.where(p.users.trained.isfinite(), -torch.inf) for p, s in self._with(scores)]
        return self._by_user(ranked)

    def _by_user(self, scores: Sequence[Tensor]) -> Float64Array:
        """Each user's NDCG, averaged over the cuts with the user."""
        ids = np.concatenate([p.users.ids for p in self.parts if p.users.ids is not None])
        figures = np.concatenate([p.users.ndcg_by_user(s) for p, s in self._with(scores)])
        _, place, n = np.unique(ids, return_inverse=True, return_counts=True)
        return np.bincount(place, figures) / n

    def _with(self, scores: Sequence[_Each]) -> Iterator[tuple[_Part, _Each]]:
        return zip(self.parts, scores, strict=True)


def _gram(lists: Jagged, rows: Int32Array, n_items: int) -> Tensor:
    """``[R, R]`` float32: number of lists that contain both items, for the items ``rows``."""
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
    """The best supported setting: with few users, not simply the best one.

    The best of many settings is partly best by chance. Settings from the best one towards EASE
    alone and a strong L2, which are safer for few users, are averaged geometrically, weighted by
    the likelihood exp(-z^2 / 2) that their difference from the best one is chance. With many users,
    that is the best one.

    Args:
        figures: ``[U]`` of each setting, in ascending order.
        without: ``[U]`` of setting 0, if it is one.

    Returns:
        One of the settings; 0 if it beats all others by more than their standard errors, or is
        equal for every user.
    """
    start, best = max(figures.items(), key=lambda item: float(item[1].mean()))
    if without is not None and without.mean() >= best.mean():
        start, best = 0.0, without

    distances = {setting: _z(best - figure) for setting, figure in figures.items()}
    is_alike = any((figure == best).all() for figure in figures.values())
    if start == 0 and (is_alike or min(distances.values()) > 1):
        return 0.0
    shares = {s: math.exp(-(z**2) / 2) for s, z in distances.items() if s >= start}
    mean = sum(share * math.log(s) for s, share in shares.items()) / sum(shares.values())
    return min(figures, key=lambda setting: abs(math.log(setting) - mean))


def _z(difference: Float64Array) -> float:
    """Mean difference of users' figures in standard errors."""
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) / error if error else 0.0


def _climb(grid: Sequence[float], start: int, at: Callable[[float], Linear]) -> Linear:
    """Hill-climbs a unimodal grid from a start; returns the best index."""
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
) -> tuple[Tensor, Tensor]:
    """``[I, I]`` EASE's matrix and ``[I]`` its items' deviations, by `Ease.weights_and_deviations`.

    The ``[I, I]`` counts are not modified.
    """
    fitted_on = gram.clone()
    if group_gram is not None and field_weight:
        fitted_on.add_(group_gram, alpha=field_weight)
    return Ease(l2).weights_and_deviations(fitted_on.numpy())


def standardized(weights: Tensor, deviations: Tensor) -> Tensor:
    """EASE's matrix for scores in units of each item's residual deviation.

    EASE is a regression of each item on the others. An item of few users has small scores and small
    residuals, so that dividing by their deviation ranks it higher. With its best L2, EASE alone had
    a higher NDCG@10 on seven of eight logs and 0.0005 less on one (docs/quality-notes.md,
    "Standardized scores").

    Args:
        weights: ``[I, I]`` B.
        deviations: ``[I]`` of the residuals.
    """
    return weights / deviations


def leading_vectors(weights: Tensor, gram: Tensor, n: int) -> Tensor:
    """``[I, n]`` leading right singular vectors of EASE's scores of the training users.

    They are eigenvectors of ``B' G B``, which is not formed, since that would dominate the time.

    Args:
        weights: ``[I, I]`` B.
        gram: ``[I, I]`` G, counts of pairs of items.
        n: number of vectors; those beyond the number of items are 0.

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
    """Lists of item rows, renumbered; rows without a new number are left out.

    Rows after the item table are cold items, which have none.
    """
    places = np.pad(place, (0, 1), constant_values=-1)[np.minimum(lists.values, len(place))]
    owner = np.repeat(np.arange(len(lists)), lists.lengths)[places >= 0]
    return Jagged.from_pairs(owner, places[places >= 0], len(lists))


def _some(lists: Jagged, which: Iterable[int]) -> Jagged:
    rows = np.asarray(which)
    return Jagged.from_pairs(
        np.repeat(np.arange(len(rows)), lists.lengths[rows]), lists.take(rows)[1], len(rows)
    )
