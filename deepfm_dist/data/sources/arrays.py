"""NumPy files: one vector for each row of a file of ids."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.sources.files import InputFile
from deepfm_dist.data.sources.source import EmptyFile, Source
from deepfm_dist.errors import DataError
from deepfm_dist.messages import brief, plural

_ROWS_AT_ONCE = 1 << 14
_MAGIC = b"\x93NUMPY"


def open_array(file: InputFile) -> npt.NDArray[np.generic]:
    """``[n, dim]`` numbers of a ``.npy`` file; a local one is mapped into memory.

    Raises:
        DataError: it is not an array of one vector per row.
    """
    source = Source(file.path, file.pattern)
    array: npt.NDArray[np.generic] = _load(source)
    cure = "save an array of shape [rows, numbers], as numpy.save does"
    if array.dtype.kind not in "fiu":
        raise DataError(f"{file.path}: holds {array.dtype} where numbers are expected; {cure}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"{file.path}: has the shape {list(array.shape)}; {cure}")
    return array


def read_vectors(
    files: Sequence[InputFile], ids_file: str, n_ids: int, dim: int, skip_bad: bool
) -> tuple[npt.NDArray[np.float32], int]:
    """Reads the vectors of NumPy files, concatenated.

    Args:
        files: the NumPy files.
        ids_file: name of the file with the ids, for messages.
        n_ids: its rows.
        dim: length of every vector.
        skip_bad: whether to skip a vector with NaN or infinity; otherwise it is an error.

    Returns:
        ``[n_ids, dim]`` float32 with NaN in skipped rows, and their number.

    Raises:
        DataError: the shapes do not fit, or a number is not finite.
    """
    arrays = [open_array(file) for file in files]
    names = ", ".join(file.name for file in files)
    n_vectors = sum(map(len, arrays))
    if n_vectors != n_ids:
        raise DataError(
            f"{names}: {plural(n_vectors, 'vector')}, where {ids_file} has {plural(n_ids, 'row')}; "
            f"write one vector for each row, in the same order"
        )
    vectors, at, n_bad = np.empty((n_ids, dim), np.float32), 0, 0
    for file, array in zip(files, arrays, strict=True):
        if array.shape[1] != dim:
            raise DataError(
                f"{file.path}: vectors of {plural(array.shape[1], 'number')}, not {dim}; all "
                f"vectors of a field have the same length"
            )
        for begin in range(0, len(array), _ROWS_AT_ONCE):
            block = array[begin : begin + _ROWS_AT_ONCE]
            with np.errstate(over="ignore"):
                piece = np.asarray(block, np.float32)
            finite = np.isfinite(piece)
            bad = ~finite.all(1)
            if bad.any() and not skip_bad:
                row = int(bad.argmax())
                place = int((~finite[row]).argmax())
                raise DataError(
                    f"{file.path}, row {begin + row}: number {place} is {block[row, place]}, not "
                    f"finite (both counted from 0); correct it or set data.on_bad_row=skip"
                )
            n_bad += int(bad.sum())
            target = vectors[at : at + len(piece)]
            target[:] = piece
            target[bad] = np.nan
            at += len(piece)
    return vectors, n_bad


def _load(source: Source) -> Any:
    try:
        with source.stream() as file:
            head = file.read(len(_MAGIC))
        if not head:
            raise EmptyFile(f"{source.path}: the file is empty")
        if head != _MAGIC:
            raise DataError(f"{source.path}: not an npy file; write it with numpy.save")
        if "://" in source.path or source.packing:
            with source.stream() as file:
                return np.load(io.BytesIO(file.read()), allow_pickle=False)
        return np.load(source.path, mmap_mode="r", allow_pickle=False)
    except DataError:
        raise
    except source.failures as error:
        raise DataError(
            f"{source.path}: not a readable npy file: {brief(error)}; write it with numpy.save"
        ) from None
