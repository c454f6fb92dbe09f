"""The closed-form part of a model that ranks: EASE as further columns of its FM, fitted to it.

What is trained and EASE know different things, and in one FM their scores add up. How strong EASE's
L2 is, what the items' fields say, how many columns are kept and what EASE's scores weigh next to
the trained ones is measured on held-out items (`search`). Where these do not show that training
helps, EASE alone is used.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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
CLEARLY_BETTER = 2.5
"""Standard errors by which the model has to rank better than EASE alone to be used instead. Two
would do for one comparison; the model is the best of dozens."""
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
        trained: share of the trained part's logits: 1, or 0 for EASE alone.
        ndcg: of both together on the validation users.
        ndcg_trained: of the trained part alone.
        ndcg_ease: of EASE alone.
    """

    l2: float = 500.0
    field_weight: float = 0.0
    columns: int = 256
    weight: float = 1.0
    trained: float = 1.0
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
        ids: ``[U]`` numbers by which users are known again in other cuts; default: their places.
    """

    bags: Jagged
    relevant: Jagged
    masked: Jagged
    trained: Tensor
    power: float = 0.5
    k: int = 10
    ids: Int32Array | None = None

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
            ids=users.astype(np.int32) if self.ids is None else self.ids[users],
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


def search(
    cuts: Sequence[tuple[Jagged, Validation]], n_items: int, groups: Jagged | None
) -> Linear:
    """Finds what EASE adds to a trained model.

    One setting after the other: L2, the weight of the items' fields, the number of columns. For
    each, the weight next to the trained part that gives the best NDCG. Few users hardly tell one
    weight from another: see `_likely`. In the end the result has to be clearly better than EASE
    alone (`CLEARLY_BETTER`), which is the safer choice.

    Args:
        cuts: of the known items in two: each user's training items, rows below ``n_items``, each
            once; and users to measure on, with the logits of a model that was trained on the
            former. A user's figure is the mean over the cuts.
        n_items: rows of the item table.
        groups: items that have a value of a field in common; None: there are no fields.

    Returns:
        The best; with weight 0 where EASE adds nothing.
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
    columns = sorted({min(n, len(rows)) for n in COLUMNS})  # all of few items: nothing is cut
    fits_of_columns = measured.cut(best, columns)
    found, figure = max(fits_of_columns, key=lambda one: (one[0].ndcg, one[0].ndcg_ease))
    alone, of_ease = measured.ease_alone(columns[-1])
    return found if _z(figure - of_ease) >= CLEARLY_BETTER else alone


@dataclass(frozen=True)
class _Part:
    """A cut of the known items: ``[R, R]`` counts of pairs of training items, and the users."""

    gram: Tensor
    users: Validation


@dataclass(frozen=True)
class _Measured:
    """Settings with their NDCG on all cuts, and ``[users]`` that of each user.

    Attributes:
        parts: the cuts.
        group_gram: ``[R, R]`` counts of pairs of items that have a value of a field in common.
    """

    parts: Sequence[_Part]
    group_gram: Tensor | None

    @cached_property
    def trained(self) -> Float64Array:
        """``[users]`` figures of the trained part alone."""
        return self._by_user([part.users.trained for part in self.parts])

    def fit(self, l2: float, field_weight: float = 0.0) -> tuple[Linear, Float64Array]:
        """All columns, with the weight that the figures support."""
        matrices = self._matrices(l2, field_weight)
        scores = [part.users.scores(each) for part, each in self._with(matrices)]
        return self._with_likely_weight(Linear(l2, field_weight), scores)

    def cut(self, best: Linear, columns: Sequence[int]) -> list[tuple[Linear, Float64Array]]:
        """Some numbers of columns, each with the weight that the figures support."""
        matrices, found = self._matrices(best.l2, best.field_weight), []
        for n in columns:
            scores = []
            for part, weights in self._with(matrices):
                # Their own vectors, as the model gets them: the leading ones of more differ a bit.
                leading = leading_vectors(weights, part.gram, n)
                scores.append(part.users.scores(weights @ leading) @ leading.T)
            found.append(self._with_likely_weight(replace(best, columns=n), scores))
        return found

    def ease_alone(self, columns: int) -> tuple[Linear, Float64Array]:
        """EASE with its usual L2, without the trained part."""
        alone = Linear(columns=columns, trained=0.0, ndcg_trained=float(self.trained.mean()))
        matrices = self._matrices(alone.l2, 0.0)
        scores = [part.users.scores(each) for part, each in self._with(matrices)]
        figure = self._by_user_of_ease(scores)
        return replace(alone, ndcg=float(figure.mean()), ndcg_ease=float(figure.mean())), figure

    def _matrices(self, l2: float, field_weight: float) -> list[Tensor]:
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
        """`_by_user` by EASE's scores alone, which items that are not ranked have too."""
        ranked = [s.where(p.users.trained.isfinite(), -torch.inf) for p, s in self._with(scores)]
        return self._by_user(ranked)

    def _by_user(self, scores: Sequence[Tensor]) -> Float64Array:
        """Each user's NDCG, the mean over the cuts that the user is in."""
        ids = np.concatenate([p.users.ids for p in self.parts if p.users.ids is not None])
        figures = np.concatenate([p.users.ndcg_by_user(s) for p, s in self._with(scores)])
        _, place, n = np.unique(ids, return_inverse=True, return_counts=True)
        return np.bincount(place, figures) / n

    def _with(self, scores: Sequence[Tensor]) -> Iterator[tuple[_Part, Tensor]]:
        return zip(self.parts, scores, strict=True)


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

    distances = {setting: _z(best - figure) for setting, figure in figures.items()}
    is_alike = any((figure == best).all() for figure in figures.values())
    if start == 0 and (is_alike or min(distances.values()) > 1):
        return 0.0
    shares = {s: math.exp(-(z**2) / 2) for s, z in distances.items() if s >= start}
    mean = sum(share * math.log(s) for s, share in shares.items()) / sum(shares.values())
    return min(figures, key=lambda setting: abs(math.log(setting) - mean))


def _z(difference: Float64Array) -> float:
    """Mean difference between users' figures in standard errors."""
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) / error if error else 0.0


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
