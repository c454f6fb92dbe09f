"""What every format's reader offers; a new format is one more subclass."""

import difflib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources.cells import Column
from deepfm_dist.data.sources.source import Source
from deepfm_dist.errors import DataError


class Reader(ABC):
    """Reads some columns of a file, as the file has them.

    Args:
        source: the file.
        columns: what is wanted.
        layout: what the file's name does not tell.
        dropped: counts of dropped rows by reason, added to; None: a row that cannot be read is an
            error.
    """

    def __init__(
        self,
        source: Source,
        columns: Sequence[Column],
        layout: FileFormat,
        dropped: Counter[str] | None,
    ) -> None:
        self.source, self.columns, self.layout = source, tuple(columns), layout
        self.dropped = dropped

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """The columns wanted, by name, with the file's own types.

        Raises:
            EmptyFile: the file is empty.
            DataError: it is missing or malformed, or lacks a column.
        """

    def cells(self, batch: pa.RecordBatch, column: Column) -> pa.Array:
        """A column's cells in a batch of `batches`."""
        return batch.column(column.name)

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

    def check_columns(self, present: Sequence[str]) -> None:
        """Refuses a file that lacks a column, or has it twice.

        Args:
            present: the columns that the file has.

        Raises:
            DataError: a column is missing, or two have its name.
        """
        for column in self.columns:
            if column.name not in present:
                near = difflib.get_close_matches(column.name, present, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                names = ", ".join(n if n.isprintable() else repr(n) for n in present)
                raise DataError(
                    f"{self.source.path}: no column {column.name!r}; {hint}it has: {names}"
                    + self.layout_hint(present)
                )
            if list(present).count(column.name) > 1:
                raise DataError(
                    f"{self.source.path}: two columns are called {column.name!r}; rename one"
                )
