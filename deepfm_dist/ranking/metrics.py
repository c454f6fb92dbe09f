"""Ranking metrics over the whole catalogue."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.jagged import Int64Array, Jagged

FloatArray = npt.NDArray[np.float64]


def hits(ranked: Int64Array, relevant: Jagged) -> npt.NDArray[np.bool_]:
    """Which ranked items are relevant.

    Args:
        ranked: ``[U, K]`` items, best first; negative ones are empty places.
        relevant: each user's relevant items.

    Returns:
        ``[U, K]``.
    """
    n = int(max(ranked.max(initial=0), relevant.values.max(initial=0))) + 1
    owner = np.repeat(np.arange(len(relevant), dtype=np.int64), relevant.lengths)
    wanted = owner * n + relevant.values
    found = np.arange(len(ranked), dtype=np.int64)[:, None] * n + ranked
    return np.isin(found, wanted) & (ranked >= 0)


def ranking_metrics(
    ranked: Int64Array, relevant: Jagged, cutoffs: Sequence[int]
) -> dict[str, float]:
    """Means over users of Recall@K, NDCG@K and HitRate@K.

    Args:
        ranked: ``[U, K]`` items, best first, K at least the largest cut-off.
        relevant: each user's relevant items, at least one each; those that cannot be
            recommended (outside the vocabulary) still count.
        cutoffs: values of K.

    Returns:
        ``recall@K`` = hits / |relevant|; ``ndcg@K`` with binary gain, discount
        ``1 / log2(rank + 1)`` and the ideal cut at ``min(|relevant|, K)``; ``hit_rate@K`` = share
        of users with a hit.

    Source: Järvelin, Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002.
    """
    hit = hits(ranked, relevant)
    n_relevant = relevant.lengths
    discounts = 1 / np.log2(np.arange(2, max(cutoffs) + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    figures = {}
    for k in cutoffs:
        at_k = hit[:, :k]
        gain = at_k @ discounts[: at_k.shape[1]]
        figures[f"recall@{k}"] = float(np.mean(at_k.sum(1) / n_relevant))
        figures[f"ndcg@{k}"] = float(np.mean(gain / ideal[np.minimum(n_relevant, k)]))
        figures[f"hit_rate@{k}"] = float(np.mean(at_k.any(1)))
    return figures
