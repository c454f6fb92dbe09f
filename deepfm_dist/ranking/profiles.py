"""Ranking metrics by K, by user activity and by item popularity."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.jagged import Int64Array, Jagged
from deepfm_dist.ranking.metrics import found_items, hits, ndcg, recall
from deepfm_dist.ranking.reasons import Reason

FloatArray = npt.NDArray[np.float64]
GROUPS, EXAMPLES = 5, 5
"""Number of groups of users and of items, of about equal size; number of example users."""


@dataclass(frozen=True)
class Groups:
    """Values divided into groups of about equal size; equal values stay together.

    Attributes:
        of: ``[n]`` the group of each value.
        bounds: smallest and largest value of each group.
    """

    of: Int64Array
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def by_quantile(cls, values: Int64Array) -> "Groups":
        """Divides ``[n]`` values at their quantiles into at most `GROUPS` groups."""
        if len(values) == 0:
            return cls(np.zeros(0, np.int64), ())
        cuts = np.quantile(values, np.arange(1, GROUPS + 1) / GROUPS, method="inverted_cdf")
        tops = np.unique(cuts).astype(np.int64)
        of = np.searchsorted(tops, values)
        bounds = [(int(values[of == g].min()), int(top)) for g, top in enumerate(tops)]
        return cls(of.astype(np.int64), tuple(bounds))

    @property
    def sizes(self) -> list[int]:
        """Number of values in each group."""
        return np.bincount(self.of, minlength=len(self.bounds)).tolist()

    def means(self, figures: FloatArray) -> list[float]:
        """Mean of ``[n]`` figures by group."""
        sums = np.bincount(self.of, figures, minlength=len(self.bounds))
        return (sums / np.array(self.sizes)).tolist()


@dataclass(frozen=True)
class Profile:
    """Metrics of one ranking in detail.

    Attributes:
        recall: Recall@K at K = 1, 2, ...
        ndcg: NDCG@K in the same way.
        by_activity: mean NDCG at the largest K by group of users.
        by_popularity: recall at the largest K by group of held-out items.
    """

    recall: list[float]
    ndcg: list[float]
    by_activity: list[float]
    by_popularity: list[float]


def profile(ranked: Int64Array, relevant: Jagged, activity: Groups, popularity: Groups) -> Profile:
    """Computes the detailed metrics of a ranking.

    Args:
        ranked: ``[U, K]`` items, best first; negative values are padding.
        relevant: each user's relevant items, at least one each.
        activity: groups of the U users.
        popularity: groups of ``relevant.values``.
    """
    hit = hits(ranked, relevant)
    at = range(1, ranked.shape[1] + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no user: no mean
        return Profile(
            [float(recall(hit, relevant.lengths, k).mean()) for k in at],
            [float(ndcg(hit, relevant.lengths, k).mean()) for k in at],
            activity.means(ndcg(hit, relevant.lengths, ranked.shape[1])),
            popularity.means(found_items(ranked, relevant).astype(np.float64)),
        )


@dataclass(frozen=True)
class Example:
    """A user's ranking next to the user's items.

    Attributes:
        user: row of the user table.
        ranked: item rows, best first.
        history: item rows of training, latest last if times are known.
        held_out: rows of the relevant items.
        reasons: reasons for each recommended item.
    """

    user: int
    ranked: list[int]
    history: list[int]
    held_out: list[int]
    reasons: Sequence[Sequence[Reason]] = ()


def examples(
    users: npt.NDArray[np.integer],
    ranked: Int64Array,
    history: Jagged,
    relevant: Jagged,
) -> list[Example]:
    """Some users, from the least to the most active.

    Args:
        users: ``[U]`` rows of the user table.
        ranked: ``[U, K]`` item rows, best first; negative ones are empty places.
        history: the history of every row of the user table.
        relevant: relevant items of the U users.
    """
    by_activity = np.argsort(history.lengths[users], kind="stable")
    places = np.linspace(0, max(len(users) - 1, 0), min(EXAMPLES, len(users)))
    chosen = by_activity[places.round().astype(np.int64)]
    return [
        Example(
            int(users[u]),
            [int(item) for item in ranked[u] if item >= 0],
            _row(history, int(users[u])),
            _row(relevant, int(u)),
        )
        for u in chosen
    ]


def _row(lists: Jagged, row: int) -> list[int]:
    values: Sequence[int] = lists.values[lists.offsets[row] : lists.offsets[row + 1]].tolist()
    return list(values)


@dataclass(frozen=True)
class Insight:
    """Details behind a comparison's figures.

    Attributes:
        profiles: the profiles, by ranking.
        n_users: number of users ranked for.
        activity: bounds of their groups by training positives.
        n_held_out: number of held-out items.
        popularity: bounds of their groups by training positives.
        examples: some users with the model's ranking.
    """

    profiles: dict[str, Profile]
    n_users: int
    activity: tuple[tuple[int, int], ...]
    n_held_out: int
    popularity: tuple[tuple[int, int], ...]
    examples: list[Example]
