"""Parquet files: columns with types of their own."""

from collections.abc import Iterator

import pyarrow as pa
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
        try:
            for batch in file.iter_batches(columns=names, batch_size=1 << 20):
                yield batch.select(names)
        except self.source.failures as error:
            raise DataError(f"{path}: a damaged parquet file: {brief(error)}") from None
