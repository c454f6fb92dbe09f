"""The base class of format readers; a new format is a new subclass."""

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

_MOST_NAMES = 100  # maximum number of columns listed in a message


class MissingColumnError(DataError):
    """A file lacks a column.

    Args:
        text: the message.
        column: the missing column.
        cure: advice if other files have the column; None if the message has a better one.
    """

    def __init__(self, text: str, column: str, cure: str | None) -> None:
        super().__init__(text)
        self.column, self.cure = column, cure


@dataclass(frozen=True)
class Place:
    """The source of a column's cells.

    Attributes:
        column: the file's column; None if a folder of the path provides the value.
        path: members of nested cells: ``genres.name`` is the member name of the column genres.
        value: the folder's value; None: all cells are null.
    """

    column: str | None
    path: tuple[str, ...] = ()
    value: str | None = None


class Reader(ABC):
    """Reads columns of a file with the file's types.

    Args:
        source: the file.
        columns: the columns to read.
        layout: what the file name does not show.
        dropped: counts of dropped rows by reason; updated; None: unreadable rows are errors.

    Attributes:
        places: sources of the columns, by name; complete after the first batch.
    """

    takes: frozenset[str] = frozenset(FileFormat.model_fields)
    """Settings of `FileFormat` that the format supports."""

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
        """Yields the columns named in `places`, with the file's types.

        Raises:
            EmptyFile: the file is empty.
            DataError: it is missing or malformed, or lacks a column.
        """

    @abstractmethod
    def present(self) -> Sequence[str]:
        """The file's columns, or the members of its first objects.

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
        """The place of a row, for messages.

        Args:
            row: its number among the rows of `batches`, from 0.
        """
        return f"row {row + 1}"

    def layout_hint(self, present: Sequence[str]) -> str:
        """Advice about the file's layout if a column is missing, to end a message.

        Args:
            present: the columns that the file appears to have.
        """
        return ""

    @property
    def names(self) -> list[str]:
        """Distinct columns of the file in `batches`."""
        named = [place.column for place in self.places.values() if place.column is not None]
        return list(dict.fromkeys(named))

    def locate(self, present: Sequence[str]) -> None:
        """Locates each column.

        A column of that name takes precedence, then a member of one, then a folder of the path;
        otherwise cells of an optional column are null.

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
        """Advice about a missing column that other files have."""
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
