"""Parquet, Arrow (Feather) and ORC files."""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.orc
import pyarrow.parquet as pq

from deepfm_dist.data.sources.nested import is_list
from deepfm_dist.data.sources.reader import Reader
from deepfm_dist.data.sources.source import EmptyFile, Source
from deepfm_dist.errors import DataError
from deepfm_dist.messages import brief

_Read = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
_BATCH_ROWS, _BATCH_VECTORS = 1 << 20, 1 << 15  # a list array has at most 2**31 elements


class ColumnarReader(Reader):
    """Reads files with typed columns."""

    takes = frozenset({"decimal", "thousands", "optional"})
    _groups: Sequence[int] | None = None

    def read_only(self, groups: tuple[int, int]) -> int:
        """Restricts `batches` to some row groups of a Parquet file.

        Args:
            groups: the first one and the one after the last.

        Returns:
            Number of rows of the file before them.
        """
        self._groups = range(*groups)
        metadata = pq.ParquetFile(self.source.open()).metadata
        return sum(metadata.row_group(g).num_rows for g in range(groups[0]))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the requested columns with the file's types."""
        present, read = self._open()
        self.locate(present)
        names = self.names
        try:
            for batch in read(names):
                yield batch.select(names)
        except self.source.failures as error:
            path, suffix = self.source.path, self.source.suffix
            raise DataError(f"{path}: a damaged {suffix[1:]} file: {brief(error)}") from None

    def present(self) -> Sequence[str]:
        """The columns of the file's schema."""
        return self._open()[0]

    def _open(self) -> tuple[list[str], _Read]:
        path, suffix = self.source.path, self.source.suffix
        try:
            if self._groups is not None:
                return _parquet(self.source, self._groups)
            return _FORMATS[suffix](self.source)
        except self.source.failures as error:
            if "file size is 0 bytes" in str(error):
                raise EmptyFile(f"{path}: the file is empty") from None
            raise DataError(f"{path}: not a readable {suffix[1:]} file: {brief(error)}") from None


def parquet_groups(source: Source, n_bytes: int) -> list[tuple[int, int]]:
    """Divides a Parquet file at row groups.

    Args:
        source: the file.
        n_bytes: minimum uncompressed size of all pieces but the last.

    Returns:
        For each piece, its first row group and the one after its last.
    """
    metadata = pq.ParquetFile(source.open()).metadata
    pieces, begin, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= n_bytes or group == metadata.num_row_groups - 1:
            pieces.append((begin, group + 1))
            begin, size = group + 1, 0
    return pieces


def _parquet(source: Source, groups: Sequence[int] | None = None) -> tuple[list[str], _Read]:
    file = pq.ParquetFile(source.open())
    leaves = [file.schema.column(i) for i in range(len(file.schema.names))]
    int96 = {c.name for c in leaves if c.physical_type == "INT96" and c.path == c.name}

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        kinds = [file.schema_arrow.field(name).type for name in names]
        has_vectors = any(is_list(k) and pa.types.is_floating(k.value_type) for k in kinds)
        n_rows = _BATCH_VECTORS if has_vectors else _BATCH_ROWS
        batches = file.iter_batches(n_rows, groups, [*names])
        if not (far := int96.intersection(names)):
            return batches
        coarse = pq.ParquetFile(source.open(), coerce_int96_timestamp_unit="us")
        both = zip(batches, coarse.iter_batches(n_rows, groups, [*names]), strict=True)
        return (_without_overflow(*pair, sorted(far)) for pair in both)

    return file.schema_arrow.names, read


def _without_overflow(
    exact: pa.RecordBatch, coarse: pa.RecordBatch, names: Sequence[str]
) -> pa.RecordBatch:
    """INT96 timestamps in nanoseconds, or in microseconds if one is beyond the year 2262.

    Arrow's nanoseconds would silently wrap around.
    """
    for name in names:
        microseconds = pc.abs(coarse[name].cast(pa.int64()))
        if pc.any(pc.greater(microseconds, (2**63 - 1) // 1000)).as_py():
            exact = exact.set_column(exact.schema.get_field_index(name), name, coarse[name])
    return exact


def _arrow(source: Source) -> tuple[list[str], _Read]:
    """Both of Arrow's formats: the file, which Feather is, and the stream."""
    opened = source.open()
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    if not is_file:
        stream = pa.ipc.open_stream(opened)
        return stream.schema.names, lambda _: map(_validate, stream)
    file = pa.ipc.open_file(opened)
    return file.schema.names, lambda _: (
        _validate(file.get_batch(number)) for number in range(file.num_record_batches)
    )


def _validate(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Validates a batch: Arrow's formats are memory-mapped, including damaged offsets."""
    batch.validate(full=True)
    return batch


def _orc(source: Source) -> tuple[list[str], _Read]:
    file = pyarrow.orc.ORCFile(source.open())
    return file.schema.names, lambda names: (
        file.read_stripe(stripe, columns=[*names]) for stripe in range(file.nstripes)
    )


_FORMATS: dict[str, Callable[[Source], tuple[list[str], _Read]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".orc": _orc,
}
