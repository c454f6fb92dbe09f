"""What every format's reader offers; a new format is one more subclass."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources.cells import Column, plain_numbers
from deepfm_dist.data.sources.nested import members
from deepfm_dist.data.sources.source import Source
from deepfm_dist.errors import DataError
from deepfm_dist.messages import nearest

_MOST_NAMES = 100  # of columns, that an error line lists


class MissingColumnError(DataError):
    """A file lacks a column.

    Args:
        text: the error line.
        column: that is missing.
        cure: what to do where other files have it; None: the line names a better cure.
    """

    def __init__(self, text: str, column: str, cure: str | None) -> None:
        super().__init__(text)
        self.column, self.cure = column, cure


@dataclass(frozen=True)
class Place:
    """Where a column's cells come from.

    Attributes:
        column: the file's column; None where a folder of the path gives the value.
        path: members of nested cells to follow: ``genres.name`` is the member name of the column
            genres.
        value: what the folder gives; None: all cells are null.
    """

    column: str | None
    path: tuple[str, ...] = ()
    value: str | None = None


class Reader(ABC):
    """Reads some columns of a file, as the file has them.

    Args:
        source: the file.
        columns: to read.
        layout: what the file's name does not tell.
        dropped: counts of dropped rows by reason, added to; None: a row that cannot be read is an
            error.

    Attributes:
        places: where the columns come from, by name; complete when the first batch is there.
    """

    takes: frozenset[str] = frozenset(FileFormat.model_fields)
    """Settings of `FileFormat` that the format has a use for."""

    def __init__(
        self,
        source: Source,
        columns: Sequence[Column],
        layout: FileFormat,
        dropped: Counter[str] | None,
    ) -> None:
        self.source, self.columns, self.layout = source, tuple(columns), layout
        self.dropped = dropped
        self.places = {column.name: Place(column.name) for column in columns}

        for setting, field in FileFormat.model_fields.items():
            if setting not in self.takes and getattr(layout, setting) != field.default:
                raise DataError(
                    f"{source.path}: {setting} does not apply to {source.suffix} files; leave it "
                    f"out of data.files"
                )

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """The file's columns that `places` names, with the file's own types.

        Raises:
            EmptyFile: the file is empty.
            DataError: it is missing or malformed, or lacks a column.
        """

    @abstractmethod
    def present(self) -> Sequence[str]:
        """The columns that the file has, those of objects in its first lines.

        Raises:
            DataError: the file cannot be read.
        """

    def cells(self, batch: pa.RecordBatch, column: Column) -> pa.Array:
        """``[n]``: a column's cells in one of the `batches`.

        Raises:
            NestedError: the column lacks these members.
        """
        place = self.places[column.name]
        if place.column is None:
            return pa.repeat(pa.scalar(place.value, pa.string()), batch.num_rows)
        cells = members(batch.column(place.column), place.path, column.type == "text")
        return plain_numbers(cells, column.derived_from or column.type, self.layout)

    def where(self, row: int) -> str:
        """Where a row stands, for an error line.

        Args:
            row: its number among the rows that `batches` gives, from 0.
        """
        return f"row {row + 1}"

    def layout_hint(self, present: Sequence[str]) -> str:
        """What a lacking column says about the file's layout, to end an error line with.

        Args:
            present: the columns that the file seems to have.
        """
        return ""

    @property
    def names(self) -> list[str]:
        """Columns of the file that `batches` gives, each once."""
        named = [place.column for place in self.places.values() if place.column is not None]
        return list(dict.fromkeys(named))

    def locate(self, present: Sequence[str]) -> None:
        """Finds out where each column comes from.

        A column of that name comes first, then a member of one, then a folder of the path; else
        the cells of an optional one are null.

        Args:
            present: the columns that the file has.

        Raises:
            MissingColumnError: a column is missing.
            DataError: two columns have its name.
        """
        for column in self.columns:
            place = self._place(column.name, present)
            if place is None and column.name in self.layout.optional and not column.required:
                place = Place(None)
            if place is None:
                known = [*present, *self.source.partitions]
                near = nearest(column.name, known)
                hint = f"did you mean {near!r}? " if near else ""
                names = ", ".join(n if n.isprintable() else repr(n) for n in known[:_MOST_NAMES])
                names += ", ..." if len(known) > _MOST_NAMES else ""
                layout_hint = self.layout_hint(present)
                cure = None if layout_hint else self._cure_for_lacking(column)
                raise MissingColumnError(
                    f"{self.source.path}: no column {column.name!r}; {hint}it has: {names}"
                    + layout_hint,
                    column.name,
                    cure,
                )
            if place.column is not None and list(present).count(place.column) > 1:
                raise DataError(
                    f"{self.source.path}: two columns are called {place.column!r}; rename one"
                )
            self.places[column.name] = place

    def _cure_for_lacking(self, column: Column) -> str:
        """What to do about a column that other files have."""
        if column.required:
            needed = "every row needs it, so `optional` has no effect: "
            needed = needed if column.name in self.layout.optional else ""
            return f"{needed}add the column to this file, or leave the file out"
        name = json.dumps(column.name, ensure_ascii=False)  # as YAML
        name = column.name if column.name.isidentifier() else name
        meant = "to read this file with empty cells, say so"
        return self.source.cure(meant, f"optional: [{name}]", "add the column to this file")

    def _place(self, name: str, present: Sequence[str]) -> Place | None:
        if name in present:
            return Place(name)
        if name in self.source.partitions:
            return Place(None, value=self.source.partitions[name])
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            if (head := ".".join(parts[:cut])) in present:
                return Place(head, tuple(parts[cut:]))
        return None
