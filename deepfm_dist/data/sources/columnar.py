"""Parquet files: columns with types of their own."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfm_dist.data.sources.reader import Reader
from deepfm_dist.data.sources.source import EmptyFile, brief
from deepfm_dist.errors import DataError


class ParquetReader(Reader):
    """Reads Parquet files."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The columns wanted, with the types that the file says."""
        opened, path = self.source.open(), self.source.path
        try:
            file = pq.ParquetFile(opened)
        except self.source.failures as error:
            if "file size is 0 bytes" in str(error):
                raise EmptyFile(f"{path}: the file is empty") from None
            raise DataError(f"{path}: not a readable parquet file: {brief(error)}") from None
        self.check_columns(file.schema_arrow.names)
        names = [c.name for c in self.columns]
        leaves = [file.schema.column(i) for i in range(len(file.schema.names))]
        int96 = [c.name for c in leaves if c.physical_type == "INT96" and c.path in names]
        try:
            if int96:
                coarse = pq.ParquetFile(self.source.open(), coerce_int96_timestamp_unit="us")
                batches = zip(_batches(file, names), _batches(coarse, names), strict=True)
                yield from (_without_overflow(*both, int96) for both in batches)
            else:
                yield from _batches(file, names)
        except self.source.failures as error:
            raise DataError(f"{path}: a damaged parquet file: {brief(error)}") from None


def _batches(file: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    for batch in file.iter_batches(columns=names, batch_size=1 << 20):
        yield batch.select(names)


def _without_overflow(
    exact: pa.RecordBatch, coarse: pa.RecordBatch, names: list[str]
) -> pa.RecordBatch:
    """Timestamps of INT96, in nanoseconds, or in microseconds where one is beyond the year 2262.

    Arrow makes nanoseconds of them, which wrap around there without a word.
    """
    for name in names:
        microseconds = pc.abs(coarse[name].cast(pa.int64()))
        if pc.any(pc.greater(microseconds, (2**63 - 1) // 1000)).as_py():
            exact = exact.set_column(exact.schema.get_field_index(name), name, coarse[name])
    return exact
