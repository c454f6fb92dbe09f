"""Negatives for training rows, drawn during training."""

import logging

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array
from deepfm_dist.data.negatives import item_weights, put_negatives, users_short_of_negatives
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)


class NegativeSampler:
    """Draws the negatives of training rows as configured.

    Attributes:
        n_items: number of items.
        seen: what each user's negatives avoid, counted from 0.
        some_are_short: whether some users have fewer unseen items than configured negatives.

    Raises:
        DataError: no user has an unseen item.
    """

    def __init__(self, dataset: PreparedDataset, seed: int) -> None:
        self._spec, self._seed = dataset.manifest.data.negatives, seed
        self.n_items = dataset.manifest.entities["item"] - 1
        self.seen = dataset.seen(self._spec.avoid == "all")
        self._weights = None
        if self._spec.popularity_power:
            self._weights = item_weights(dataset.popularity()[1:], self._spec.popularity_power)
        active = np.flatnonzero(self.seen.lengths)
        wanted = self._spec.per_positive
        n_short = users_short_of_negatives(wanted, self.seen, active, self.n_items)
        self.some_are_short = n_short > 0
        self._n_unseen = self.n_items - self.seen.lengths if n_short else None
        if n_short and (self.seen.lengths[active] == self.n_items).all():
            raise DataError(
                f"{dataset.folder}: every user has interacted with all "
                f"{plural(self.n_items, 'item')}, so there are no negatives; add items, "
                f"or label the rows (data.task=ctr)"
            )
        if n_short:
            log.warning(
                "data.negatives.per_positive=%d: too few unseen items for %s of %s, who "
                "get fewer negatives",
                wanted,
                f"{n_short:,}",
                plural(len(active), "user"),
            )

    def put(
        self,
        items: Int32Array,
        rows: Int64Array,
        slots: Int64Array,
        negative_users: Int32Array,
        epoch: int,
    ) -> None:
        """Overwrites item rows with the negatives of an epoch.

        Args:
            items: ``[m]`` rows of the item table; those with slot 0 and those that are `absent`
                stay.
            rows: ``[m]`` training rows.
            slots: ``[m]`` number of the negative of its row, from 1.
            negative_users: ``[m]`` users to draw negatives for.
            epoch: the epoch, counted from 0.
        """
        put_negatives(
            items,
            rows,
            slots,
            negative_users,
            self.per_positive,
            history=self.seen,
            n_items=self.n_items,
            seed=self.seed_of(epoch),
            weights=self._weights,
            first_item=1,
        )

    @property
    def per_positive(self) -> int:
        """Number of negatives per positive."""
        return self._spec.per_positive

    def seed_of(self, epoch: int) -> int:
        """The seed of an epoch's draws."""
        return derive_seed(self._seed, "negatives", epoch if self._spec.redraw else 0)

    def absent(
        self, slots: Int64Array, negative_users: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.bool_]:
        """``[m]`` bool: rows whose negative does not exist; see `put`."""
        if self._n_unseen is None:
            return np.zeros(len(slots), bool)
        return slots > self._n_unseen[negative_users]
