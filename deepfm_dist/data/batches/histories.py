"""Which of a user's training items are in the bag that a step sees: draws without memory."""

from typing import Any

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, offsets_of
from deepfm_dist.seeding import derive_seed, mix

Bags = tuple[Int32Array, Int32Array]
"""Lengths ``[b]`` and values of some rows' bags, one after the other."""


def kept_in_bags(
    history: Jagged,
    users: npt.NDArray[np.integer],
    keys: npt.NDArray[np.integer],
    seed: int,
    dropout: float = 0.0,
    max_length: int | None = None,
    left_out: Int32Array | None = None,
) -> npt.NDArray[np.bool_]:
    """Draws bags from users' items: a pure function of (seed, key, item) for each of them.

    Every item of a row stays with probability ``1 - dropout``, independently of the others; of
    those that stay, ``max_length`` at random, all alike, make the bag.

    Args:
        history: each user's items, each once.
        users: ``[m]`` rows of ``history``; a negative one has no items.
        keys: ``[m]`` what the draws of a row belong to: the number of a training row, or a user.
        seed: of an epoch's draws.
        dropout: probability that an item is left out, in [0, 1).
        max_length: most items of a bag.
        left_out: ``[m]`` an item of each row that never stays.

    Returns:
        For each value of ``history.take(users)``, whether it is in the bag.
    """
    lengths, items = history.take(users)
    flags: npt.NDArray[np.bool_] = _kept(
        lengths,
        items,
        keys.astype(np.int64),
        np.full(len(users), -1, np.int32) if left_out is None else left_out,
        np.uint64(min(int(dropout * 2.0**64), 2**64 - 1)),
        np.iinfo(np.int64).max if max_length is None else max_length,
        seed,
    )
    return flags


def chosen(bags: Bags, flags: npt.NDArray[np.bool_]) -> Bags:
    """The values that are flagged, and how many each row has."""
    lengths, values = bags
    running = np.concatenate([[0], np.cumsum(flags)])
    ends = np.cumsum(lengths)
    return (running[ends] - running[ends - lengths]).astype(np.int32), values[flags]


def hold_out(dataset: PreparedDataset, share: float) -> PreparedDataset:
    """A dataset without validation rows, some of whose training items serve as validation items.

    Each item of a user is drawn independently, by the dataset's seed; a user keeps one at least.

    Args:
        dataset: the prepared dataset.
        share: of the items that is held out.
    """
    history = dataset.training_history
    users = np.arange(len(history))
    seed = derive_seed(dataset.manifest.seed, "hold out")
    kept = kept_in_bags(history, users, users, seed, share)
    n_kept, _ = chosen(history.take(users), kept)
    kept |= np.repeat(n_kept == 0, history.lengths)
    lengths, items = chosen(history.take(users), ~kept)
    return dataset.holding_out(Jagged(offsets_of(lengths), items))


class HistorySampler:
    """The bags of items that history fields are of."""

    def __init__(self, dataset: PreparedDataset, seed: int = 0) -> None:
        spec = dataset.manifest.data.history
        self.dropout, self.max_length = spec.dropout, spec.max_length
        self._history, self._seed = dataset.history, seed
        self._fixed_seed = derive_seed(dataset.manifest.seed, "history")

    def full(self, users: npt.NDArray[np.integer], history: Jagged | None = None) -> Bags:
        """All of the users' items, or ``max_length`` of them, always the same ones.

        Args:
            users: ``[m]`` rows of the histories.
            history: of others than the users of training.
        """
        history = self._history if history is None else history
        items = history.take(users)
        if self.max_length is None or not (items[0] > self.max_length).any():
            return items
        cut = kept_in_bags(history, users, users, self._fixed_seed, max_length=self.max_length)
        return chosen(items, cut)

    def excluding_target(
        self, users: Int32Array, targets: Int32Array, rows: Int64Array, epoch: int
    ) -> Bags:
        """What rows see in training: their users' items but the row's own, thinned out.

        Args:
            users: ``[m]`` the rows' users.
            targets: ``[m]`` the positive of each row, or of the positive its negative goes with:
                what a bag lacks must not tell one from the other.
            rows: ``[m]`` number of that positive among all training rows.
            epoch: from 0.
        """
        flags = kept_in_bags(
            self._history,
            users,
            rows,
            self._seed_of(epoch),
            self.dropout,
            self.max_length,
            left_out=targets,
        )
        return chosen(self._history.take(users), flags)

    def split(self, users: Int32Array, epoch: int) -> tuple[Bags, Bags]:
        """Users' items in two: the bag, and what was left out of it."""
        flags = kept_in_bags(
            self._history, users, users, self._seed_of(epoch), self.dropout, self.max_length
        )
        items = self._history.take(users)
        return chosen(items, flags), chosen(items, ~flags)

    def _seed_of(self, epoch: int) -> int:
        return derive_seed(self._seed, "history", epoch)


@compiled
def _kept(
    lengths: Int32Array,
    items: Int32Array,
    keys: Int64Array,
    left_out: Int32Array,
    threshold: Any,
    max_length: int,
    seed: int,
) -> npt.NDArray[np.bool_]:
    flags = np.zeros(len(items), np.bool_)
    key = mix(np.uint64(seed))
    begin = 0
    for row in range(len(lengths)):
        end = begin + lengths[row]
        of_row = mix(key ^ np.uint64(keys[row]))
        words = np.empty(end - begin, np.uint64)
        n = 0
        for i in range(begin, end):
            word = mix(of_row ^ np.uint64(items[i]))
            if word >= threshold and items[i] != left_out[row]:
                flags[i] = True
                words[n] = word
                n += 1
        if n > max_length:  # the largest words stay
            least = np.sort(words[:n])[n - max_length]
            for i in range(begin, end):
                if flags[i] and mix(of_row ^ np.uint64(items[i])) < least:
                    flags[i] = False
        begin = end
    return flags
