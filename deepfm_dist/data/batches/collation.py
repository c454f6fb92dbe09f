"""Collates table rows of users, items and context into a batch."""

from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.histories import Bags, HistorySampler, latest
from deepfm_dist.data.batches.id_dropout import Hidden
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import FloatArray, Int32Array, Jagged, Values, offsets_of
from deepfm_dist.data.schema import OUT_OF_VOCABULARY, Feature

ABSENT = -1
"""Row number of a missing user or item: all of its bags are empty."""


class Collator:
    """Collates table rows of users, items and context into a batch.

    Attributes:
        keys: names of the categorical fields.
        categorical: these fields.
        dense: the numeric fields.
        vectors: the vector fields.
        fields: values of the fields that describe users and items.
        has_histories: whether some field is a bag of the user's items.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        manifest = dataset.manifest
        self.keys = [f.name for f in manifest.categorical]
        self.categorical, self.dense = manifest.categorical, manifest.dense
        self.vectors = manifest.vector_fields
        self._n_columns = len(self.dense) + sum(manifest.vectors.values())
        self.fields = dataset.entity_fields_with_cold
        self._targets = (len(manifest.targets),) if manifest.targets else ()
        self._source_of = manifest.data.source_of
        self._n_rows = manifest.entities
        self._cold = manifest.cold
        self._users_have_ids = True
        self.has_histories = manifest.has_history
        self._histories = HistorySampler(dataset) if manifest.has_history else None

    def for_new_users(self, fields: Mapping[str, Values]) -> "Collator":
        """A collator for users from outside the dataset, who have no ids.

        Args:
            fields: every field that describes users; element r belongs to row r.
        """
        other = copy(self)
        other.fields = {**self.fields, **fields}
        other._users_have_ids = False
        return other

    def __call__(
        self,
        users: Int32Array | None,
        items: Int32Array | None,
        context: Mapping[str, Values] | None = None,
        context_rows: npt.NDArray[np.integer] | None = None,
        labels: FloatArray | None = None,
        n_real: int | None = None,
        global_weight: Tensor | None = None,
        weights: FloatArray | None = None,
        bags: Bags | None = None,
        hidden: Hidden | None = None,
    ) -> Batch:
        """Looks up every field.

        Args:
            users: ``[b]`` rows of the user table; `ABSENT` leaves the user's fields empty.
            items: ``[b]`` rows of the item table, or of the cold items that follow
                (`Manifest.cold`); `ABSENT` leaves the item's fields empty.
            context: context fields of many rows; None leaves them empty.
            context_rows: ``[b]`` indices of these rows; `ABSENT` leaves the context empty.
            labels: ``[b]``, or ``[b, T]`` of several targets; default zeros.
            n_real: number of leading rows that are not padding; default: all.
            global_weight: weights that the loss is divided by; default ``n_real``.
            weights: ``[n_real]`` of the rows; default ones.
            bags: each row's bag of items, latest last, for history fields; default: the user's
                training items, nothing left out.
            hidden: rows whose user or item id is replaced by the unknown id; attributes stay.
        """
        given = {"user": users, "item": items, "context": context_rows}
        height = next(len(rows) for rows in given.values() if rows is not None)
        absent = np.full(height, ABSENT, np.int32)
        index: dict[str, npt.NDArray[np.integer]] = {
            entity: absent if rows is None else rows for entity, rows in given.items()
        }
        n_real = height if n_real is None else n_real
        row_weights = np.zeros(height, np.float32)
        row_weights[:n_real] = 1 if weights is None else weights
        return Batch(
            self._sparse(index, context, bags, hidden),
            self._numbers(index, context, height),
            torch.zeros(height, *self._targets) if labels is None else torch.from_numpy(labels),
            torch.from_numpy(row_weights),
            torch.tensor(float(n_real)) if global_weight is None else global_weight,
        )

    def _sparse(
        self,
        index: Mapping[str, npt.NDArray[np.integer]],
        context: Mapping[str, Values] | None,
        bags: Bags | None,
        hidden: Hidden | None,
    ) -> KeyedJaggedTensor:
        """The table rows of every categorical field; arguments as of `__call__`."""
        lengths, values = [], []
        if self._histories is not None and bags is None:
            bags = self._histories.full(index["user"])
        for feature in self.categorical:
            if feature.history is not None:
                assert bags is not None
                n, v = self._history_values(feature, bags)
            else:
                n, v = self._bags(feature, index[feature.entity], context)
                if hidden is not None and feature.names_entity and feature.entity in hidden:
                    known = index[feature.entity] >= 0  # each of these fields has one id per row
                    v = np.where(hidden[feature.entity][known], np.int32(OUT_OF_VOCABULARY), v)
            lengths.append(n)
            values.append(v)
        return KeyedJaggedTensor(
            self.keys,
            torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(np.concatenate(lengths)),
            # Passed since it is known here: TorchRec would sum the lengths, and wait for that on
            # CUDA.
            length_per_key=[len(of_field) for of_field in values],
        )

    def history(self, field: Feature, users: Int32Array) -> Jagged:
        """A history field's bags of some users outside training: no item is left out.

        Args:
            field: one of `categorical` with a history.
            users: ``[m]`` rows of the user table.

        Returns:
            ``[m]`` lists of rows of the field's table.
        """
        assert self._histories is not None
        lengths, rows = self._history_values(field, self._histories.full(users))
        return Jagged(offsets_of(lengths), rows)

    def _numbers(
        self,
        index: Mapping[str, npt.NDArray[np.integer]],
        context: Mapping[str, Values] | None,
        height: int,
    ) -> Tensor:
        """``[height, n_dense + sum of dims]``: numeric fields, then vectors; 0 without a row."""
        dense = np.zeros((height, self._n_columns), np.float32)
        for column, feature in enumerate(self.dense):
            rows = index[feature.entity]
            source = self._source(feature, context)
            if isinstance(source, np.ndarray):
                present = rows >= 0
                dense[present, column] = source[rows[present]]
        numbers, begin = torch.from_numpy(dense), len(self.dense)
        for feature in self.vectors:
            vectors, rows = self.fields[feature.name], index[feature.entity]
            assert isinstance(vectors, np.ndarray)
            columns = numbers[:, begin : begin + vectors.shape[1]]
            begin += vectors.shape[1]
            present = rows >= 0
            if present.all():
                columns.copy_(torch.from_numpy(vectors[rows]))  # torch is faster from float16
            elif present.any():
                columns[torch.from_numpy(present)] = torch.from_numpy(
                    vectors[rows[present]]
                ).float()
        return numbers

    def _history_values(self, history: Feature, bags: Bags) -> Bags:
        """Bags of items -> bags of all values that a history field has for these items."""
        field = self._source_of(history)
        if history.last is not None:
            bags = latest(bags, history.last)
        if field.is_id:
            return self._without_cold(bags)
        lengths, values = self._bags(field, bags[1], None)
        running = offsets_of(lengths)
        return np.diff(running[offsets_of(bags[0])]).astype(np.int32), values

    def _without_cold(self, bags: Bags) -> Bags:
        """Bags of items without the items that have no row in the item table."""
        lengths, items = bags
        if not self._cold.get("item") or not (items >= self._n_rows["item"]).any():
            return bags
        known = items < self._n_rows["item"]
        running = offsets_of(known)
        return np.diff(running[offsets_of(lengths)]).astype(np.int32), items[known]

    def _source(self, feature: Feature, context: Mapping[str, Values] | None) -> Values | None:
        if feature.entity == "context":
            return None if context is None else context[feature.name]
        return self.fields[feature.name]

    def _bags(
        self,
        feature: Feature,
        rows: npt.NDArray[np.integer],
        context: Mapping[str, Values] | None,
    ) -> tuple[Int32Array, Int32Array]:
        source = None if feature.is_id else self._source(feature, context)
        if isinstance(source, Jagged):
            return source.take(rows)
        has_ids = feature.is_id and (feature.entity != "user" or self._users_have_ids)
        if source is None and not has_ids:
            return np.zeros(len(rows), np.int32), np.zeros(0, np.int32)
        lengths = (rows >= 0).astype(np.int32)
        if not lengths.all():  # rare: only the last batch of an epoch is padded
            rows = rows[rows >= 0]
        values = rows if source is None else source[rows]
        if source is None and self._cold.get(feature.entity):
            values = np.where(values < self._n_rows[feature.entity], values, OUT_OF_VOCABULARY)
        return lengths, values.astype(np.int32, copy=False)


def padded(array: Any, height: int, value: float) -> Any:
    """``[m, ...]`` -> ``[height, ...]`` by appending ``value``; None stays None."""
    if array is None or len(array) == height:
        return array
    padding = np.full((height - len(array), *array.shape[1:]), value, array.dtype)
    return np.concatenate([array, padding])
