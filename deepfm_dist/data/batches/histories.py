"""Bags of users' training items for a step, as pure functions of seed and step."""

from typing import Any

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, offsets_of
from deepfm_dist.seeding import derive_seed, mix

Bags = tuple[Int32Array, Int32Array]
"""Lengths ``[b]`` and concatenated values of rows' bags."""


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

    Each item is kept independently with probability ``1 - dropout``; the bag is a uniform sample of
    at most ``max_length`` kept items.

    Args:
        history: each user's distinct items.
        users: ``[m]`` rows of ``history``; negative ones have no items.
        keys: ``[m]`` seeds the draws of a row: the number of a training row, or a user.
        seed: the seed of an epoch's draws.
        dropout: probability that an item is left out, in [0, 1).
        max_length: maximum number of items in a bag.
        left_out: ``[m]`` an item of each row that is never kept.

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
    """The flagged values, and their number per row."""
    lengths, values = bags
    running = np.concatenate([[0], np.cumsum(flags)])
    ends = np.cumsum(lengths)
    return (running[ends] - running[ends - lengths]).astype(np.int32), values[flags]


def latest(bags: Bags, n: int) -> Bags:
    """The last ``n`` values of each bag."""
    before_end = np.repeat(np.cumsum(bags[0]), bags[0]) - np.arange(len(bags[1]))
    return chosen(bags, before_end <= n)


def hold_out(dataset: PreparedDataset, share: float, draw: int = 0) -> PreparedDataset:
    """A dataset some of whose training items serve as validation items.

    Each item of a user is drawn independently, by the dataset's seed; with ``history.targets:
    later``, they are the user's last ones, rounded up. A user keeps one at least.

    Args:
        dataset: the prepared dataset.
        share: share of the items to hold out.
        draw: number of the draw, if there are several with different items.
    """
    history = dataset.training_history
    users = np.arange(len(history))
    if dataset.manifest.data.history.targets == "later":
        exact = np.round(history.lengths * share, 9)  # 25 * 0.28 is a little more than 7
        n_held_out = np.ceil(exact).astype(np.int64)
        kept = _leading(history.lengths, np.maximum(history.lengths - n_held_out, 1))
    else:
        seed = derive_seed(dataset.manifest.seed, "hold out", *[draw] * bool(draw))
        kept = kept_in_bags(history, users, users, seed, share)
        n_kept, _ = chosen(history.take(users), kept)
        kept |= np.repeat(n_kept == 0, history.lengths)
    lengths, items = chosen(history.take(users), ~kept)
    return dataset.holding_out(Jagged(offsets_of(lengths), items))


class HistorySampler:
    """Draws the bags of items for history fields."""

    def __init__(self, dataset: PreparedDataset, seed: int = 0) -> None:
        spec = dataset.manifest.data.history
        self.dropout, self.max_length, self._targets = spec.dropout, spec.max_length, spec.targets
        self._history, self._seed = dataset.history, seed
        self._fixed_seed = derive_seed(dataset.manifest.seed, "history")

    def full(self, users: npt.NDArray[np.integer], history: Jagged | None = None) -> Bags:
        """All of the users' items in order, or a fixed choice of ``max_length`` of them.

        Args:
            users: ``[m]`` rows of the histories.
            history: items of other users than those of training.
        """
        history = self._history if history is None else history
        items = history.take(users)
        if self.max_length is None or not (items[0] > self.max_length).any():
            return items
        if self._targets == "later":
            return latest(items, self.max_length)
        cut = kept_in_bags(history, users, users, self._fixed_seed, max_length=self.max_length)
        return chosen(items, cut)

    def excluding_target(
        self, users: Int32Array, targets: Int32Array, rows: Int64Array, epoch: int
    ) -> Bags:
        """Bags in training: the users' items without the row's own, after dropout.

        Args:
            users: ``[m]`` the rows' users.
            targets: ``[m]`` the positive of each row, or the positive that a negative belongs to:
                the missing item must not reveal the label.
            rows: ``[m]`` number of that positive among all training rows.
            epoch: the epoch, counted from 0.
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
        """Splits users' items into the bag and the targets, which are not in it."""
        items, seed = self._history.take(users), self._seed_of(epoch)
        if self._targets == "random":
            flags = kept_in_bags(self._history, users, users, seed, self.dropout, self.max_length)
            return chosen(items, flags), chosen(items, ~flags)
        is_past = _leading(items[0], _cuts(items[0], users, derive_seed(seed, "cut")))
        past = chosen(items, is_past)
        if self.dropout:
            lists, rows = Jagged(offsets_of(past[0]), past[1]), np.arange(len(users))
            past = chosen(past, kept_in_bags(lists, rows, users, seed, self.dropout))
        if self.max_length is not None:
            past = latest(past, self.max_length)
        return past, chosen(items, ~is_past)

    def _seed_of(self, epoch: int) -> int:
        return derive_seed(self._seed, "history", epoch)


def _leading(lengths: npt.NDArray[np.integer], n: Int64Array) -> npt.NDArray[np.bool_]:
    """For each value of some bags, whether it is among the first ``n`` of its bag."""
    begins = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) < np.repeat(begins + n, lengths)


@compiled
def _cuts(lengths: Int32Array, keys: Int32Array, seed: int) -> Int64Array:
    """``[m]``: number of a row's items that are its past: at least one, never all.

    A single item is predicted from nothing.
    """
    cuts = np.zeros(len(lengths), np.int64)
    key = mix(np.uint64(seed))
    for row in range(len(lengths)):
        if lengths[row] > 1:
            word = mix(key ^ np.uint64(keys[row])) >> np.uint64(32)
            cuts[row] = 1 + np.int64((word * np.uint64(lengths[row] - 1)) >> np.uint64(32))
    return cuts


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
        if n > max_length:  # keep the largest words
            least = np.sort(words[:n])[n - max_length]
            for i in range(begin, end):
                if flags[i] and mix(of_row ^ np.uint64(items[i])) < least:
                    flags[i] = False
        begin = end
    return flags
