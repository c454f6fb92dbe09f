"""Batches of users of a prepared dataset, for losses over the catalogue (bpr, softmax)."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from deepfm_dist.data.batches.batch import UserBatch, local_batch_size
from deepfm_dist.data.batches.collation import ABSENT, Collator, padded
from deepfm_dist.data.batches.histories import Bags, HistorySampler, chosen, kept_in_bags
from deepfm_dist.data.batches.id_dropout import IdDropout
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, offsets_of
from deepfm_dist.data.negatives import draw_with_replacement, item_weights
from deepfm_dist.data.prefetch import read_ahead
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural
from deepfm_dist.seeding import derive_seed, permute

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidates:
    """The items that a step's targets are compared with.

    Attributes:
        sampled: number drawn in every step, with replacement; None: the whole catalogue.
        popularity_power: they are drawn in proportion to (training positives) ** this.
        targets_per_user: maximum number of a user's targets in a step with sampled candidates.
    """

    sampled: int | None = None
    popularity_power: float = 0.0
    targets_per_user: int = 16


class UserBatches:
    """The batches of a training run on users instead of rows.

    The global batch of a step is a function of (seed, step) alone. An epoch visits every user with
    training items. If the model has a history field, each epoch splits a user's items into the bag
    that the model sees and the targets, which are not in it.

    Args:
        dataset: the prepared dataset.
        batch_size: users per step over all ranks.
        rank: this rank.
        world_size: number of ranks.
        seed: the seed of order, bags and candidates.
        candidates: see `Candidates`.
        threads: number of threads that prefetch batches.
        id_dropout: share of user and item ids that a step replaces by the unknown one.

    Raises:
        ConfigError: the data does not fit this kind of training, or a rank would have no user.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        candidates: Candidates,
        threads: int = 0,
        id_dropout: float = 0.0,
    ) -> None:
        manifest = dataset.manifest
        _check(dataset)
        self._id_dropout = IdDropout(id_dropout, seed)
        self._collate, self._history = Collator(dataset), dataset.history
        self._seen = dataset.seen(manifest.data.negatives.avoid == "all")
        self._drawn = HistorySampler(dataset, seed) if manifest.has_history else None
        self._seed, self._candidates, self.threads = seed, candidates, threads
        self._users = np.flatnonzero(dataset.training_history.lengths).astype(np.int32)
        if n_rare := len(dataset.rare_history.values):
            log.info(
                "%s of users below min_count: in no batch of users",
                plural(n_rare, "training row"),
            )
        self.batch_size = min(batch_size, len(self._users))
        self._local = local_batch_size(self.batch_size, world_size, "user")
        self.steps_per_epoch = -(-len(self._users) // self.batch_size)
        self._rank, self._world_size = rank, world_size
        self._n_items = manifest.entities["item"] - 1
        self._weights: Int64Array | None = None
        n_candidates = self._n_items
        if candidates.sampled is not None:
            counts = dataset.popularity()[1:]
            self._weights = item_weights(counts, candidates.popularity_power)
            n_candidates = candidates.sampled
        self._n_candidates = n_candidates
        self._n_shared = -(-n_candidates // world_size)

    def batch(self, step: int) -> UserBatch:
        """This rank's part of global step ``step``, counted from 1."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        begin = at * self.batch_size
        places = np.arange(begin, min(begin + self.batch_size, len(self._users)))
        order = derive_seed(self._seed, "order", epoch)
        users = self._users[permute(places, len(self._users), order)]
        bags, targets = self._cut(users, epoch)
        global_weight = float(max(1, targets[0].sum()))  # a small batch of users may have no target
        first = self._rank * self._local
        mine = slice(first, first + self._local)
        users, bags, targets = users[mine], _rows(bags, mine), _rows(targets, mine)
        rows, log_expected = self._drawn_candidates(step)
        shared = rows[self._rank * self._n_shared :][: self._n_shared]
        shared = padded(shared, self._n_shared, ABSENT)
        target_items = targets[1].astype(np.int64) - 1
        items = shared
        if self._weights is not None:
            most = self._local * self._candidates.targets_per_user
            items = np.concatenate([shared, padded(targets[1], most, ABSENT)])
            target_items = np.zeros(0, np.int64)
        height = max(self._local, len(items))
        n_users, users = len(users), padded(users, height, ABSENT)
        items = padded(items, height, ABSENT)
        looked_up = self._collate(
            users,
            items,
            bags=(padded(bags[0], height, 0), bags[1]),
            hidden=self._id_dropout.hidden(step, user=users, item=items),
        )
        users = users[:n_users]
        seen_counts, seen_items = self._seen.take(users)
        known_users, known_items = _places_of(seen_counts, seen_items + np.int32(1), rows)
        return UserBatch(
            sparse=looked_up.sparse,
            dense=looked_up.dense,
            n_users=self._local,
            n_shared=self._n_shared,
            n_candidates=self._n_candidates,
            target_users=torch.from_numpy(np.repeat(np.arange(len(users)), targets[0])),
            target_items=torch.from_numpy(target_items),
            target_weights=torch.ones(len(targets[1])),
            known_users=torch.from_numpy(known_users),
            known_items=torch.from_numpy(known_items),
            log_expected=torch.from_numpy(log_expected),
            global_weight=torch.tensor(global_weight),
            first=first,
        )

    def steps(self, first: int, last: int) -> Iterator[UserBatch]:
        """Batches of steps ``first`` to ``last``, both included."""
        return read_ahead(self.batch, first, last, self.threads)

    def _cut(self, users: Int32Array, epoch: int) -> tuple[Bags, Bags]:
        """Splits users' items into bags and targets."""
        if self._drawn is not None:
            bags, targets = self._drawn.split(users, epoch)
        else:
            bags = np.zeros(len(users), np.int32), np.zeros(0, np.int32)
            targets = self._history.take(users)
        if self._weights is not None:
            seed = derive_seed(self._seed, "targets", epoch)
            targets = at_most(targets, users, self._candidates.targets_per_user, seed)
        return bags, targets

    def _drawn_candidates(self, step: int) -> tuple[Int32Array, npt.NDArray[np.float32]]:
        """Item rows of the step's candidates, and the log of their expected counts."""
        if self._weights is None:
            rows = np.arange(1, self._n_items + 1, dtype=np.int32)
            return rows, np.zeros(self._n_items, np.float32)
        seed = derive_seed(self._seed, "candidates", step)
        drawn = draw_with_replacement(self._n_candidates, self._weights, seed)
        expected = self._n_candidates * (self._weights[drawn] / self._weights.sum())
        return drawn + np.int32(1), np.log(expected).astype(np.float32)


def _check(dataset: PreparedDataset) -> None:
    manifest = dataset.manifest
    setting = "trainer.loss=bpr or softmax"
    if not manifest.sampled:
        raise ConfigError(f"{setting}: needs positives (data.task=implicit), not labelled rows")
    if weight := manifest.data.interactions.weight:
        raise ConfigError(
            f"{setting}: all of a user's targets have the same weight; leave "
            f"interactions.weight={weight} out, or use trainer.loss=bce"
        )
    if context := [f.name for f in manifest.features if f.entity == "context"]:
        raise ConfigError(
            f"{setting}: ranks the catalogue for users, and {context[0]} belongs to single rows; "
            f"leave the field out, or use trainer.loss=bce"
        )
    history = manifest.data.history
    if manifest.has_history and history.targets == "random" and history.dropout == 0:
        raise ConfigError(
            f"{setting}: the loss predicts items dropped from a user's history; set "
            f"data.history.dropout, to 0.5 for example"
        )


def _rows(bags: Bags, rows: slice) -> Bags:
    offsets = offsets_of(bags[0])
    lengths = bags[0][rows]
    begin = offsets[min(rows.start, len(bags[0]))]
    return lengths, bags[1][begin : begin + lengths.sum()]


def at_most(bags: Bags, users: Int32Array, n: int, seed: int) -> Bags:
    """At most ``n`` values of each bag, drawn by seed and user."""
    jagged = Jagged(offsets_of(bags[0]), bags[1])
    flags = kept_in_bags(jagged, np.arange(len(users)), users, seed, max_length=n)
    return chosen(bags, flags)


def _places_of(
    lengths: Int32Array, items: Int32Array, candidates: Int32Array
) -> tuple[Int64Array, Int64Array]:
    """(row, index) of each occurrence of the rows' items among the candidates."""
    order = np.argsort(candidates, kind="stable")
    low = np.searchsorted(candidates, items, "left", order)
    times = np.searchsorted(candidates, items, "right", order) - low
    first = np.cumsum(times) - times
    owner = np.repeat(np.arange(len(lengths)), lengths)
    places = order[np.repeat(low - first, times) + np.arange(times.sum())]
    return np.repeat(owner, times), places
