"""Encodes rows from outside the dataset with its vocabularies and statistics."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.data.encoding import Cell, FieldEncoder, WordEncoder, encoder_of
from deepfm_dist.data.fields import column_of, exploded, impressions_column
from deepfm_dist.data.jagged import Jagged, Values, taken
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.sources import Column
from deepfm_dist.data.spelling import Unseen
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import nearest, plural, short

_NEARLY_ALL = 0.95


def _count_empty(cells: pa.ChunkedArray) -> int:
    """Counts cells without a value: null, empty text, or an empty list."""
    is_list, is_text = pa.types.is_list(cells.type), pa.types.is_string(cells.type)
    sizes = pc.list_value_length(cells) if is_list else pc.utf8_length(cells) if is_text else None
    n_zero = 0 if sizes is None else pc.sum(pc.equal(sizes, 0)).as_py() or 0
    return int(cells.null_count + n_zero)


class RowEncoder:
    """Looks up users, items and context fields of new rows.

    Unknown ids get the out-of-vocabulary row; missing numbers get 0 after the transform, as in
    training.

    Args:
        dataset: provides vocabularies and statistics.

    Attributes:
        unknown: by field, the unknown values encoded so far.
        targets: the targets of the model, if there are several; see `Manifest.targets`.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        self._manifest, self.targets = dataset.manifest, dataset.manifest.targets
        rows = dataset.manifest.data.interactions
        self._entities = {
            name: (getattr(rows, name), dataset.entity_ids(name, cold=True).slice(1))
            for name in dataset.manifest.entities
        }
        self._context = [f for f in dataset.manifest.features if f.entity == "context"]
        self._encoders = {f.name: encoder_of(f, dataset) for f in self._context}
        self.unknown = {name: Unseen(name) for name in self._entities}
        self._words = _with_vocabulary(self._encoders)
        self.unknown |= {name: words.unseen for name, words in self._words.items()}
        self._n_rows, self._n_empty = 0, Counter[str]()
        self._unused: dict[str, str | float] = {}

    @property
    def columns(self) -> list[Column]:
        """The required columns of a file of rows."""
        impressions = self._manifest.data.interactions.impressions
        if impressions is None:
            return self.pair_columns
        others = [column for column in self.pair_columns if column.key != "item"]
        place = len(others) - len(self._context)
        others.insert(place, impressions_column(impressions, labelled=False))
        return others

    @property
    def pair_columns(self) -> list[Column]:
        """The required columns of a row for one item: ids by role, and context fields."""
        ids = [Column(column, purpose=name) for name, (column, _) in self._entities.items()]
        return [*ids, *map(column_of, self._context)]

    def in_rows(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """A file's batches with one row per scored item: impressions are expanded."""
        for batch in batches:
            yield exploded(batch) if "impressions" in batch.schema.names else batch

    def as_in_the_file(self, table: pa.Table) -> pa.Table:
        """The distinct columns that were read, by their names in the file."""
        columns = [(c.name, c.key) for c in self.columns if c.key != "impressions"]
        if len(columns) < len(self.columns):
            columns.append((self._entities["item"][0], "item"))
        first = dict(reversed(columns))
        names = list(dict.fromkeys(name for name, _ in columns))
        return table.select([first[name] for name in names]).rename_columns(names)

    def encode(self, table: pa.Table) -> Rows:
        """Encodes a table that has `columns`."""
        entity_rows: dict[str, np.ndarray] = {}
        for name, (_, ids) in self._entities.items():
            place = pc.index_in(table[name], value_set=ids).fill_null(-1)
            entity_rows[name] = place.to_numpy().astype(np.int32) + np.int32(1)
            self.unknown[name].add(table[name], entity_rows[name] > 0)
        self._count_empty(self._context, table)
        context = self.encode_context(table)
        return Rows(entity_rows.get("user"), entity_rows.get("item"), None, context, table.num_rows)

    def encode_context(self, table: pa.Table) -> dict[str, Values]:
        """The context fields of a table that has their `columns`."""
        return {f.name: self._column(f, table) for f in self._context}

    def _count_empty(self, features: Iterable[Feature], table: pa.Table) -> None:
        self._n_rows += table.num_rows
        for feature in features:
            self._n_empty[feature.name] += _count_empty(table[column_of(feature).key])

    def _column(self, feature: Feature, table: pa.Table) -> Values:
        return self._encoders[feature.name].encode(table[column_of(feature).key], table.num_rows)

    def unseen(self) -> list[str]:
        """Reports of unknown values encoded so far, by field."""
        reports = [self.unknown[name].report(ids) for name, (_, ids) in self._entities.items()]
        reports += [words.report() for words in self._words.values()]
        reports += map(self._report_empty, self._context)
        reports += [
            f"{name}: {plural(n, 'row')} without a value: recommend.context.{name}={value} is for "
            f"files without the column"
            for name, value in self._unused.items()
            if (n := self._n_empty[name])
        ]
        return [text for text in reports if text is not None]

    def _report_empty(self, feature: Feature) -> str | None:
        """A warning if nearly all rows leave a field empty, unlike in training."""
        n_empty, trained = self._n_empty[feature.name], self._manifest.profile.missing
        share = trained.get(feature.name, 0.0)
        if not n_empty or n_empty < _NEARLY_ALL * self._n_rows or share > 0.5:
            return None
        return (
            f"{feature.name}: {n_empty:,} of {self._n_rows:,} rows have no value, which only "
            f"{share:.1%} of the training rows lacked; is the column "
            f"{feature.column or feature.name!r} the right one?"
        )

    def context_columns(self, present: Sequence[str]) -> list[Column]:
        """The context fields' columns that a file has."""
        return [c for c in map(column_of, self._context) if c.name in present]

    def context_of_requests(
        self, table: pa.Table, fixed: Mapping[str, str | float]
    ) -> dict[str, Values]:
        """The context of each row of a table.

        Args:
            table: may have `context_columns`.
            fixed: values for fields without a column.

        Raises:
            ConfigError: see `fixed_context`.
        """
        given = {f.name for f in self._context if column_of(f).key in table.column_names}
        others = {name: value for name, value in fixed.items() if name not in given}
        constant = self.fixed_context(others, given)
        self._unused = {name: value for name, value in fixed.items() if name in given}
        self._count_empty([f for f in self._context if f.name in given], table)
        nowhere = np.zeros(table.num_rows, np.int32)
        return {
            f.name: self._column(f, table) if f.name in given else taken(constant[f.name], nowhere)
            for f in self._context
        }

    def fixed_context(
        self, values: Mapping[str, str | float], given: Collection[str] | None = None
    ) -> dict[str, Values]:
        """One row of context from the configuration, for recommendations.

        Args:
            values: the values, by name of the field.
            given: fields that a file of requests has columns for; None without such a file.

        Raises:
            ConfigError: a context field has no value, or a field or value is unknown.
        """
        known = [feature.name for feature in self._context]
        for name in values:
            if name not in known:
                near = nearest(name, known)
                hint = (
                    f"did you mean recommend.context.{near}?"
                    if near
                    else f"available: {', '.join(known)}"
                    if known
                    else "this model has none; leave it out"
                )
                raise ConfigError(f"recommend.context.{name}: unknown context field; {hint}")
        wanted = [f for f in self._context if f.name not in (given or ())]
        if missing := [feature for feature in wanted if feature.name not in values]:
            names = [feature.name for feature in missing]
            columns = ", ".join(repr(feature.column or feature.name) for feature in missing)
            kind = "a column" if len(missing) == 1 else "columns"
            also = "" if given is None else f", or give the requests {kind} {columns}"
            raise ConfigError(
                f"recommend.context.{names[0]}: this model depends on {', '.join(names)}; give "
                f"the value to recommend for: recommend.context."
                f"{'=VALUE recommend.context.'.join(names)}=VALUE{also}"
            )
        return {f.name: self._fixed(f.name, values[f.name]) for f in wanted}

    def _fixed(self, name: str, value: str | float) -> Values:
        return self._encoders[name].encode_one(value, f"recommend.context.{name}={value!r}")


class UserAttributes:
    """Looks up the attributes of users from outside the dataset.

    Args:
        dataset: provides vocabularies and statistics.

    Attributes:
        names: the names of the fields, in the model's order.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        fields = [f for f in dataset.manifest.features if f.entity == "user" and f.describes_entity]
        self._hashed_ids = [f.name for f in fields if f.names_entity]
        self._fields = {f.name: f for f in fields if not f.names_entity}
        self._encoders = {name: encoder_of(f, dataset) for name, f in self._fields.items()}
        self.names = list(self._fields)

    def encode(self, values: Mapping[str, Cell]) -> dict[str, Values]:
        """Encodes one user's fields; those without a value are empty, and so is a hashed id.

        Args:
            values: the values, by name of the field.

        Raises:
            ConfigError: a field or value is unknown, or a value has the wrong type.
        """
        for name in values:
            if name not in self._fields:
                known = ", ".join(self.names) or "none"
                raise ConfigError(f"attributes.{name}: unknown field; available: {known}")
        fields: dict[str, Values] = dict.fromkeys(self._hashed_ids, Jagged.empty(1))
        for name, encoder in self._encoders.items():
            value = values.get(name)
            fields[name] = encoder.encode_one(value, f"attributes.{name}={short(value)}")
        return fields

    @property
    def all_columns(self) -> list[Column]:
        """The fields' columns."""
        return [column_of(feature) for feature in self._fields.values()]

    def columns(self, present: Sequence[str]) -> list[Column]:
        """The columns of `all_columns` that a file has."""
        return [column for column in self.all_columns if column.name in present]

    def encode_columns(self, columns: Mapping[str, pa.Array], n: int) -> dict[str, Values]:
        """Encodes the fields of n users; unknown values are counted.

        Args:
            columns: ``[n]`` cells by the key of `columns`; fields without one are empty.
            n: number of users.
        """
        fields: dict[str, Values] = dict.fromkeys(self._hashed_ids, Jagged.empty(n))
        for name, encoder in self._encoders.items():
            fields[name] = encoder.encode(columns.get(column_of(self._fields[name]).key), n)
        return fields

    def unseen(self) -> list[str]:
        """Reports of unknown values in `encode_columns`."""
        reports = [words.report() for words in _with_vocabulary(self._encoders).values()]
        return [text for text in reports if text is not None]


def _with_vocabulary(encoders: Mapping[str, FieldEncoder]) -> dict[str, WordEncoder]:
    return {
        name: encoder
        for name, encoder in encoders.items()
        if isinstance(encoder, WordEncoder) and encoder.has_vocabulary
    }
