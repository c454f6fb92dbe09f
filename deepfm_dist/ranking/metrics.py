"""Per-user ranking metrics over the whole catalogue, and bootstrap intervals of their means."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.jagged import Int64Array, Jagged
from deepfm_dist.log import progress

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 2000
"""Bootstrap samples behind an interval."""


def hits(ranked: Int64Array, relevant: Jagged) -> npt.NDArray[np.bool_]:
    """Which ranked items are relevant.

    Args:
        ranked: ``[U, K]`` items, best first; negative ones are empty slots.
        relevant: each user's relevant items.

    Returns:
        ``[U, K]`` bool.
    """
    shown, wanted = _pairs(ranked, relevant)
    return np.isin(shown, wanted) & (ranked >= 0)


def found_items(ranked: Int64Array, relevant: Jagged) -> npt.NDArray[np.bool_]:
    """Which of ``relevant.values`` appear in their user's ranking; arguments as for `hits`."""
    shown, wanted = _pairs(ranked, relevant)
    return np.isin(wanted, shown[ranked >= 0])


def _pairs(ranked: Int64Array, relevant: Jagged) -> tuple[Int64Array, Int64Array]:
    """Ranked and relevant items, each combined with its user into one number."""
    n = int(max(ranked.max(initial=0), relevant.values.max(initial=0))) + 1
    owner = np.repeat(np.arange(len(relevant), dtype=np.int64), relevant.lengths)
    return np.arange(len(ranked), dtype=np.int64)[:, None] * n + ranked, owner * n + relevant.values


def recall(hit: npt.NDArray[np.bool_], n_relevant: Int64Array, k: int) -> FloatArray:
    """``[U]`` hits among the first K divided by the number of relevant items.

    Args:
        hit: ``[U, at least K]``, of `hits`.
        n_relevant: ``[U]``, at least 1 each.
        k: K.
    """
    return np.asarray(hit[:, :k].sum(1) / n_relevant)


def capped_recall(hit: npt.NDArray[np.bool_], n_relevant: Int64Array, k: int) -> FloatArray:
    """``[U]`` hits among the first K divided by min(relevant items, K), so that 1 can be reached.

    Source: Liang et al., "Variational Autoencoders for Collaborative Filtering", 2018, section 4.2,
    whose Recall@K it is, as that of EASE and others who compare with it.

    Args:
        hit: ``[U, at least K]``, of `hits`.
        n_relevant: ``[U]``, at least 1 each.
        k: K.
    """
    return np.asarray(hit[:, :k].sum(1) / np.minimum(n_relevant, k))


def ndcg(hit: npt.NDArray[np.bool_], n_relevant: Int64Array, k: int) -> FloatArray:
    """``[U]`` NDCG@K: binary gain, discount ``1 / log2(rank + 1)``, ideal of min(|relevant|, K).

    Args:
        hit: ``[U, at least K]``, of `hits`.
        n_relevant: ``[U]``, at least 1 each.
        k: K.
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.minimum(n_relevant, k) - 1]
    return np.asarray(hit[:, :k] @ discounts / ideal)


def user_metrics(
    ranked: Int64Array,
    relevant: Jagged,
    cutoffs: Sequence[int],
    counts: Int64Array,
    n_users: int,
    strong: bool = False,
) -> dict[str, FloatArray]:
    """Figures per user; a ranking's figures are their means.

    Args:
        ranked: ``[U, K]`` items, best first, K at least the largest cut-off; negative ones are
            empty places.
        relevant: each user's relevant items, at least one each; those that cannot be
            recommended (outside the vocabulary) still count.
        cutoffs: values of K.
        counts: ``[items]`` training positives of each item.
        n_users: users with training positives.
        strong: whether to add `capped_recall`.

    Returns:
        ``[U]`` each, NaN where a user has none: ``recall@K`` = hits / |relevant|;
        ``precision@K`` = hits / K; ``hit_rate@K`` = 1 if there is a hit; ``ndcg@K`` with binary
        gain, discount ``1 / log2(rank + 1)`` and the ideal cut at ``min(|relevant|, K)``;
        ``map@K`` = sum of the precisions at the ranks of hits / ``min(|relevant|, K)``;
        ``mrr@K`` = 1 / rank of the first hit, or 0; ``popularity@K`` = mean training positives of
        the recommended items; ``novelty@K`` = their mean ``-log2(max(count, 1) / n_users)``.

    Source: Järvelin, Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002 (NDCG);
    Castells et al., "Novelty and Diversity in Recommender Systems", 2015 (novelty).
    """
    hit = hits(ranked, relevant)
    n_relevant = relevant.lengths
    ranks = np.arange(1, ranked.shape[1] + 1)
    precisions = hit.cumsum(1) / ranks
    filled = ranked >= 0
    items = np.where(filled, ranked, 0)
    popularity = np.where(filled, counts[items], 0)
    novelty = np.where(filled, -np.log2(np.maximum(counts[items], 1) / n_users), 0.0)
    has_items = filled[:, :1].any(1)
    figures: dict[str, FloatArray] = {}
    for k in cutoffs:
        at_k = hit[:, :k]
        best_possible = np.minimum(n_relevant, k)
        n_filled = np.where(has_items, filled[:, :k].sum(1), np.nan)
        if strong:
            figures[f"capped_recall@{k}"] = capped_recall(hit, n_relevant, k)
        figures |= {
            f"recall@{k}": recall(hit, n_relevant, k),
            f"ndcg@{k}": ndcg(hit, n_relevant, k),
            f"hit_rate@{k}": np.asarray(at_k.any(1), np.float64),
            f"precision@{k}": np.asarray(at_k.sum(1) / k),
            f"map@{k}": (at_k * precisions[:, :k]).sum(1) / best_possible,
            f"mrr@{k}": np.asarray((at_k / ranks[:k]).max(1, initial=0)),
            f"popularity@{k}": popularity[:, :k].sum(1) / n_filled,
            f"novelty@{k}": novelty[:, :k].sum(1) / n_filled,
        }
    return figures


def coverage(ranked: Int64Array, cutoffs: Sequence[int], n_items: int) -> dict[str, float]:
    """``coverage@K``: share of the catalogue's ``n_items`` items recommended to at least one user.

    Args:
        ranked: as `user_metrics` takes it.
        cutoffs: values of K.
        n_items: size of the catalogue.
    """
    shown = {k: np.unique(ranked[:, :k]) for k in cutoffs}
    return {f"coverage@{k}": int((items >= 0).sum()) / n_items for k, items in shown.items()}


def means(by_metric: Mapping[str, FloatArray]) -> dict[str, float]:
    """Means over the users with a figure; NaN if there are none."""
    return {name: float(_means(values[:, None])[0]) for name, values in by_metric.items()}


def resampled_means(by_metric: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Means over users drawn with replacement, `RESAMPLES` times.

    Args:
        by_metric: ``[U]`` figures by name.

    Returns:
        ``[RESAMPLES]`` by name. The draws depend on U alone, so that two rankings of the same users
        are resampled alike: the percentiles of their differences are a paired bootstrap.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    values = np.stack(list(by_metric.values()), 1)
    n_users = len(values)
    random = np.random.default_rng(n_users)
    means = np.empty((RESAMPLES, values.shape[1]))
    with progress(RESAMPLES, "bootstrap", "sample", is_first=True) as bar:
        for sample in range(RESAMPLES):
            times_drawn = np.bincount(random.integers(0, n_users, n_users), minlength=n_users)
            means[sample] = _means(values, times_drawn.astype(np.float64))
            bar.update()
    return dict(zip(by_metric, means.T, strict=True))


def interval(samples: FloatArray) -> tuple[float, float]:
    """The middle 95 % of resampled means."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def _means(values: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """``[U, M]`` -> ``[M]``."""
    known = ~np.isnan(values)
    weights = np.ones(len(values)) if weights is None else weights
    with np.errstate(invalid="ignore"):
        result: FloatArray = (weights @ np.where(known, values, 0)) / (weights @ known)
    return result
