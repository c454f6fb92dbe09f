"""Corrects log-odds for the rate at which training draws pairs as negatives."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.dataset import PreparedDataset, drawable_items
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.negatives import item_weights

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NegativeRate:
    """Expected draws of an unseen pair as a negative per epoch, relative to one of each positive.

    Training on positives and drawn negatives fits the log-odds of that mixture. For a user with P
    positives, each followed by k negatives from the user's unseen items, item i is drawn ``r = P k
    w_i / W`` times an epoch, with the items' weights w and W their sum over the unseen items. A
    pair with odds o of being a positive has odds o / r in the mixture, so its log-odds are the
    logit + log r.

    Source: King, Zeng, "Logistic Regression in Rare Events Data", 2001, section 4.1 (prior
    correction); He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", 2014,
    section 6.3, which has one rate for all pairs.

    Attributes:
        log_of_user: ``[users]`` float64: log(P k / W); row 0 and users without draws have the value
            of all users together.
        log_of_item: ``[items]`` float64: log(w_i), cold items included.
        per_positive: k.
        n_items: number of items to draw from.
        log_of_all: float: log(P k / W) of all users together.
        shifts: ``[2, n]`` float64: ascending values of log(P k / W), and the shifts of
            ``log_of_user`` there, interpolated linearly; see `shifted`.
    """

    log_of_user: FloatArray
    log_of_item: FloatArray
    per_positive: int
    n_items: int
    log_of_all: float
    shifts: FloatArray = field(default_factory=lambda: np.zeros((2, 1)))

    @classmethod
    def from_dataset(cls, dataset: PreparedDataset) -> Self | None:
        """The rate for training on a dataset; None if the rows have labels.

        Negatives drawn before the split (``data.negatives.fixed_per_user``) are labelled rows of
        the dataset, too.
        """
        manifest = dataset.manifest
        if not manifest.sampled:
            return None
        spec, n_items = manifest.data.negatives, manifest.entities["item"] - 1
        weights = np.ones(n_items)
        if spec.popularity_power:
            drawn = item_weights(dataset.popularity()[1:], spec.popularity_power)
            weights = drawn / drawn.mean()
        n_users = manifest.entities["user"]
        seen = dataset.seen(spec.avoid == "all")
        n_positives = np.concatenate(
            [bags.lengths for bags in (dataset.training_history, dataset.rare_history)]
        )[: len(seen)]
        wanted, unseen = _draws_and_unseen_weight(n_positives, seen, weights, spec.per_positive)
        log_of_all = np.log(wanted.sum() / unseen[wanted > 0].sum())
        n_cold = manifest.cold.get("item", 0)
        return cls(
            log_of_user=_log_ratio(wanted, unseen, log_of_all)[:n_users],
            log_of_item=np.log(np.pad(weights, (1, n_cold), constant_values=weights.min())),
            per_positive=spec.per_positive,
            n_items=n_items,
            log_of_all=float(log_of_all),
        )

    def shifted(self, log_rates: FloatArray, shifts: FloatArray) -> Self:
        """The same with users' log-odds shifted by activity.

        Args:
            log_rates: ``[n]`` ascending values of ``log_of_user``.
            shifts: ``[n]`` shifts there; interpolated linearly in between, constant beyond.
        """
        log_of_user = self.log_of_user + np.interp(self.log_of_user, log_rates, shifts)
        return replace(self, log_of_user=log_of_user, shifts=np.stack([log_rates, shifts]))

    def for_histories(self, histories: Jagged, others: Sequence[Jagged] = ()) -> Self:
        """The same for users from outside the dataset.

        Args:
            histories: rows of each user's positives.
            others: rows of other items they interacted with, which are never drawn.
        """
        trained = histories.values <= self.n_items  # cold items are neither in training nor drawn
        owners = np.repeat(np.arange(len(histories)), histories.lengths)[trained]
        n_positives = np.bincount(owners, minlength=len(histories))
        seen = drawable_items([histories, *others], self.n_items + 1)
        weights = np.exp(self.log_of_item[1 : self.n_items + 1])
        wanted, unseen = _draws_and_unseen_weight(n_positives, seen, weights, self.per_positive)
        log_of_user = _log_ratio(wanted, unseen, self.log_of_all)
        return replace(self, log_of_user=log_of_user).shifted(*self.shifts)

    def log_rates(
        self,
        users: npt.NDArray[np.integer],
        items: npt.NDArray[np.integer],
    ) -> FloatArray:
        """``[n]`` log r of pairs of a user row and an item row, to add to logits.

        The probability of the pair is the sigmoid of logit + log r.
        """
        rates: FloatArray = self.log_of_user[users] + self.log_of_item[items]
        return rates


def _draws_and_unseen_weight(
    n_positives: npt.NDArray[np.integer], seen: Jagged, weights: FloatArray, per_positive: int
) -> tuple[FloatArray, FloatArray]:
    """Each user's number of negatives per epoch, and the total weight of the items to draw from."""
    n_unseen = len(weights) - seen.lengths
    running = np.append(0, np.cumsum(weights[seen.values]))
    unseen = weights.sum() - np.diff(running[seen.offsets])
    wanted = n_positives * np.minimum(per_positive, n_unseen)
    return wanted.astype(np.float64), np.where(n_unseen > 0, unseen, 0.0)


def _log_ratio(wanted: FloatArray, unseen: FloatArray, otherwise: float) -> FloatArray:
    defined = (wanted > 0) & (unseen > 0)
    logs: FloatArray = np.full(len(wanted), otherwise)
    logs[defined] = np.log(wanted[defined] / unseen[defined])
    return logs
