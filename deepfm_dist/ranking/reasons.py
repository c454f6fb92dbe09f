"""Explains recommendations: divides a logit among the values of user, item and context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged
from deepfm_dist.data.schema import OUT_OF_VOCABULARY
from deepfm_dist.ranking.ranker import ModelRanker, Ranker

STEPS = 32
"""Number of points on the path over which the over-arch's gradient is averaged."""
USERS_AT_ONCE = 64
"""Number of users whose values are looked up together."""
PENALTY = "popularity_penalty"
"""The field name of the reason for the penalty of popular items."""
NO_ROW = -1
"""Table row of numbers and vectors, which have no table."""

COLUMN = pa.struct(
    [
        ("base", pa.float32()),
        (
            "reasons",
            pa.list_(
                pa.struct([("field", pa.string()), ("value", pa.string()), ("share", pa.float32())])
            ),
        ),
        ("other", pa.float32()),
        ("remainder", pa.float32()),
    ]
)
"""Type of an explanation in a file."""


@dataclass(frozen=True)
class Reason:
    """A value's share of a logit.

    Attributes:
        field: name of the field.
        value: the value, as in the input files; for a history, the item; None for numbers, vectors,
            hashed values, and values unknown to training.
        share: the share of the logit.
        item: row of the item that the value names; None if it is not an item.
    """

    field: str
    value: str | None
    share: float
    item: int | None = None


@dataclass(frozen=True)
class Explanation:
    """Shares of a logit; they sum to it.

    Attributes:
        base: the logit of a pair without values: the biases, and the over-arch at 0.
        reasons: the largest shares, largest first.
        other: sum of all other shares.
        remainder: error of the numerical integral.
    """

    base: float
    reasons: tuple[Reason, ...]
    other: float
    remainder: float

    def as_dict(self) -> dict[str, Any]:
        """As a cell of `COLUMN`."""
        return {
            "base": self.base,
            "reasons": [
                {"field": r.field, "value": r.value, "share": r.share} for r in self.reasons
            ],
            "other": self.other,
            "remainder": self.remainder,
        }


@dataclass(frozen=True)
class _Parts:
    """Individual values of users or items, each looked up separately.

    Attributes:
        owner: ``[v]`` int64: index of the user or item.
        field: ``[v]`` int64: index of its field.
        row: ``[v]`` int64: its row of the field's table, or `NO_ROW`.
        vectors: ``[v, W]`` float64: its contribution to its field's row.
    """

    owner: Tensor
    field: Tensor
    row: Tensor
    vectors: Tensor

    def select(self, flags: Tensor) -> "_Parts":
        """The flagged values."""
        return _Parts(self.owner[flags], self.field[flags], self.row[flags], self.vectors[flags])

    @staticmethod
    def joined(parts: Sequence["_Parts"]) -> "_Parts":
        """Concatenates parts."""
        columns = zip(*((p.owner, p.field, p.row, p.vectors) for p in parts), strict=True)
        return _Parts(*map(torch.cat, columns))

    def pooled(self, n: int, n_fields: int) -> Tensor:
        """``[n, F, W]`` rows of the fields."""
        sums = self.vectors.new_zeros(n * n_fields, self.vectors.shape[1])
        sums.index_add_(0, self.owner * n_fields + self.field, self.vectors)
        return sums.view(n, n_fields, self.vectors.shape[1])


class Explainer:
    """Divides logits among the values that produced them. All ranks.

    A logit is ``bias + sum_f w_f + sum_{f<g} <v_f, v_g> + deep(v)``. A field's share is its
    first-order weight, half of each of its pairs, and the over-arch's integrated gradient ``<v_f,
    int_0^1 d deep(a v) / d v_f da>``: from the point where all vectors are 0 they sum to ``deep(v)
    - deep(0)``. The halves are the pairs' Shapley values. Everything is linear in a value's
    contribution to its field's vector, so the share of a history is the sum of its items' shares;
    the closed-form columns are columns of the pairs. The integral is a mean over `STEPS` points;
    its error is the remainder.

    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", 2017, eq. 1 and 3,
    proposition 1.

    Args:
        ranker: the ranker of the model.
        dataset: the prepared dataset.
    """

    def __init__(self, ranker: ModelRanker, dataset: PreparedDataset) -> None:
        self._encoder, manifest = ranker.encoder, dataset.manifest
        self._model = self._encoder.model
        fields = (*manifest.categorical, *manifest.dense, *manifest.vector_fields)
        self._names = [field.name for field in fields]
        self._is_item = torch.tensor(manifest.is_item_field)
        self._n_tables = len(manifest.categorical)
        source_of = manifest.data.source_of
        self._names_item = [
            source_of(f).is_id if f.history is not None else f.is_id and f.entity == "item"
            for f in fields
        ]
        self._ids = [
            dataset.vocabulary(f.table_name).ids if f.table_name in manifest.vocabularies else None
            for f in manifest.categorical
        ]

    def explain(
        self,
        users: Sequence[tuple[npt.NDArray[np.bool_] | None, Batch]],
        items: Jagged,
        most: int,
    ) -> list[Explanation]:
        """Explains pairs. All ranks.

        Args:
            users: batches of n users each, with flags of the users that each batch describes; None:
                all.
            items: each user's item rows.
            most: maximum number of reasons per item.
        """
        n, n_fields = len(items), len(self._names)
        parts_of_users = []
        for flags, batch in users:
            parts = self._parts(batch, False)
            if flags is not None:
                parts = parts.select(torch.from_numpy(flags)[parts.owner])
            parts_of_users.append(parts)
        rows, inverse = np.unique(items.values, return_inverse=True)
        item_parts = self._parts(self._encoder.item_batch(rows.astype(np.int32)), True)
        user_parts, place = _Parts.joined(parts_of_users), torch.from_numpy(inverse)
        user_fields = user_parts.pooled(n, n_fields)
        item_fields = item_parts.pooled(len(rows), n_fields)
        by_user, by_item = _by_owner(user_parts, n), _by_owner(item_parts, len(rows))
        explanations = []
        for user, (begin, end) in enumerate(pairwise(items.offsets.tolist())):
            theirs = place[begin:end]
            weights, base, remainders = self._weights(user_fields[user] + item_fields[theirs])
            pairs = [by_item[number] for number in theirs.tolist()]
            their_rows = torch.from_numpy(rows)[theirs]
            shares = self._largest_shares(by_user[user], pairs, weights, their_rows, most)
            for (reasons, other), remainder in zip(shares, remainders, strict=True):
                explanations.append(Explanation(base, reasons, other, remainder))
        return explanations

    def _largest_shares(
        self, user: _Parts, items: Sequence[_Parts], weights_PFW: Tensor, rows: Tensor, most: int
    ) -> Iterator[tuple[tuple[Reason, ...], float]]:
        """The largest shares of each of a user's pairs, and the sum of the others.

        Args:
            user: values of the user.
            items: values of the item of each pair.
            weights_PFW: the result of `_weights`.
            rows: ``[P]`` item rows of the pairs.
            most: reasons of each.
        """
        user_shares = (weights_PFW[:, user.field] * user.vectors).sum(2).numpy()
        penalties = self._encoder.penalties
        for pair, item in enumerate(items):
            item_shares = (weights_PFW[pair, item.field] * item.vectors).sum(1).numpy()
            shares = np.concatenate([user_shares[pair], item_shares])
            if penalties is not None:
                shares = np.append(shares, -float(penalties[int(rows[pair])]))
            reasons = []
            for at in np.argsort(-shares, kind="stable")[:most].tolist():
                part, place = (user, at) if at < len(user.row) else (item, at - len(user.row))
                if place == len(part.row):
                    reasons.append(Reason(PENALTY, None, float(shares[at])))
                    continue
                field, row = int(part.field[place]), int(part.row[place])
                value = self._value(field, row)
                named = row if self._names_item[field] and row > OUT_OF_VOCABULARY else None
                reasons.append(Reason(self._names[field], value, float(shares[at]), named))
            yield tuple(reasons), float(shares.sum()) - sum(reason.share for reason in reasons)

    def _value(self, field: int, row: int) -> str | None:
        ids = self._ids[field] if field < self._n_tables else None
        known = ids is not None and row > OUT_OF_VOCABULARY
        return str(ids[row - 1].as_py()) if known and ids is not None else None

    @torch.no_grad()
    def _weights(self, pairs_PFW: Tensor) -> tuple[Tensor, float, list[float]]:
        """Weights that turn a value's vector into its share, the base and the remainders.

        Args:
            pairs_PFW: ``[P, F, W]`` float64 rows of all fields of some pairs.

        Returns:
            ``[P, F, W]`` float64, a number, and P numbers.
        """
        arch, dim = self._model.interaction_arch, self._model.interaction_arch.embedding_dim
        weights = torch.zeros_like(pairs_PFW)
        factors = pairs_PFW[:, :, :dim]
        base = float(arch.bias)
        scale = 1.0 if arch.scale is None else float(arch.scale)
        if arch.first_order:
            weights[:, :, dim] = 1
        if arch.fm is not None and arch.fm.sides_2F is None:
            weights[:, :, :dim] = (factors.sum(1, keepdim=True) - factors) / 2
        elif arch.fm is not None:  # only pairs across the sides count
            is_item = self._is_item[:, None]
            user_sum, item_sum = (
                (factors * flags).sum(1, keepdim=True) for flags in (~is_item, is_item)
            )
            weights[:, :, :dim] = torch.where(is_item, user_sum, item_sum) / 2
        weights *= scale
        remainders = [0.0] * len(pairs_PFW)
        if arch.over_arch is not None:
            deep, flat = self._encoder.scorer.deep, factors.flatten(1)
            steps = ((torch.arange(STEPS) + 0.5) / STEPS).double()
            path = (flat[:, None] * steps[:, None]).flatten(0, 1).requires_grad_()
            with torch.enable_grad():
                [gradient] = torch.autograd.grad(deep(path).sum(), path)
            mean = gradient.view(len(flat), STEPS, flat.shape[1]).mean(1)
            weights[:, :, :dim] += mean.view_as(factors)
            at_0 = float(deep(flat.new_zeros(1, flat.shape[1])))
            remainders = (deep(flat) - at_0 - (mean * flat).sum(1)).tolist()
            base += at_0
        return weights, base, remainders

    @torch.no_grad()
    def _parts(self, batch: Batch, is_item: bool) -> _Parts:
        """Looks up the values of users or items one by one. All ranks."""
        world, arch = self._encoder.world, self._model.embedding_arch
        sparse, n_tables = batch.sparse, self._n_tables
        lengths_FB = sparse.lengths().view(n_tables, len(batch.dense)).long()
        counts = lengths_FB.sum(1)
        # One bag per value; the same number on all ranks.
        height = max([1, *counts.tolist()])
        if world.world_size > 1:  # a service has one rank and no process group
            height = max(world.all_gather_object(height))
        alone = (torch.arange(height) < counts[:, None]).to(sparse.lengths().dtype)
        each = KeyedJaggedTensor(sparse.keys(), sparse.values(), lengths=alone.flatten())
        rows = world.to_host(arch.sums(each.to(world.device))).double()
        divisors = arch.divisors(sparse).double()
        owners, fields, vectors = [], [], []
        for field, count in enumerate(counts.tolist()):
            owner = torch.repeat_interleave(torch.arange(lengths_FB.shape[1]), lengths_FB[field])
            owners.append(owner)
            fields.append(torch.full((count,), field))
            vectors.append(rows[:count, field] / divisors[owner, field][:, None])
        sparse_parts = _Parts(
            torch.cat(owners), torch.cat(fields), sparse.values().long(), torch.cat(vectors)
        )
        return _Parts.joined([sparse_parts, *self._dense_parts(batch, is_item, rows)])

    def _dense_parts(self, batch: Batch, is_item: bool, like: Tensor) -> list[_Parts]:
        """Numbers and vectors of users or items."""
        if not batch.dense.shape[1]:
            return []
        interactions = self._model.interaction_arch
        device = interactions.bias.device
        dense = interactions.dense_fields(batch.dense.to(device), like.to(device))
        fields_BGW = self._encoder.world.to_host(torch.cat(dense, 1))
        parts = []
        for at in range(fields_BGW.shape[1]):
            field, n = self._n_tables + at, len(fields_BGW)
            if bool(self._is_item[field]) == is_item:
                column = torch.full((n,), field), torch.full((n,), NO_ROW)
                parts.append(_Parts(torch.arange(n), *column, fields_BGW[:, at]))
        return parts


def _by_owner(parts: _Parts, n: int) -> list[_Parts]:
    """The values of each of n owners."""
    order = torch.argsort(parts.owner, stable=True)
    bounds = torch.searchsorted(parts.owner[order], torch.arange(n + 1)).tolist()
    return [parts.select(order[begin:end]) for begin, end in pairwise(bounds)]


class ExplainingRanker:
    """A ranker that explains its results. All ranks. A `Ranker`.

    Args:
        ranker: ranks.
        model_ranker: the ranker of the same users.
        explainer: the explainer of the model.
        rows: ``[I]`` item rows by position.
        most: maximum number of reasons per item.
        wanted: ``[users]`` number of items to explain; None: all ranked items.

    Attributes:
        latest: explanations for the users ranked last, item by item.
    """

    def __init__(
        self,
        ranker: Ranker,
        model_ranker: ModelRanker,
        explainer: Explainer,
        rows: Int32Array,
        most: int,
        wanted: Int32Array | None = None,
    ) -> None:
        self._ranker, self._model_ranker, self._explainer = ranker, model_ranker, explainer
        self._rows, self._most, self._wanted = rows, most, wanted
        self.latest: list[list[Explanation]] = []

    def __len__(self) -> int:
        """Number of items."""
        return len(self._ranker)

    def prepare(self, chunks: Sequence[tuple[int, int]], height: int) -> list[Any]:
        """Looks the users of several chunks up together; see `Ranker`."""
        prepared = self._ranker.prepare(chunks, height)
        return [(*chunk, height, users) for chunk, users in zip(chunks, prepared, strict=True)]

    def best(
        self, users: tuple[int, int, int, Any], seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        """Ranks a chunk of users and explains it; see `Ranker`."""
        begin, end, height, prepared = users
        positions, scores = self._ranker.best(prepared, seen, k)
        self.latest = []
        for first in range(0, height, USERS_AT_ONCE):
            some = slice(min(first, end - begin), min(first + USERS_AT_ONCE, end - begin))
            there = positions[some] >= 0
            if self._wanted is not None:
                wanted = self._wanted[begin + some.start : begin + some.stop]
                there &= np.arange(k) < wanted[:, None]
            owners, ranks = np.nonzero(there)
            rows = self._rows[positions[some][owners, ranks]]
            items = Jagged.from_pairs(owners, rows, len(there))
            places = np.arange(begin + some.start, begin + some.stop, dtype=np.int32)
            batches = self._model_ranker.user_batches(places)
            explained = self._explainer.explain(batches, items, self._most)
            self.latest += [explained[a:b] for a, b in pairwise(items.offsets)]
        return positions, scores

    def column(self, owners: Int64Array, ranks: Int64Array) -> pa.Array:
        """``[n]`` of `COLUMN`: explanations for the users ranked last.

        Args:
            owners: ``[n]`` indices of users in their chunk.
            ranks: ``[n]`` indices of items in their rankings.
        """
        cells = [self.latest[o][r].as_dict() for o, r in zip(owners, ranks, strict=True)]
        return pa.array(cells, COLUMN)
