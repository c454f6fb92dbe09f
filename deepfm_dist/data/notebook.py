"""A notebook's files: its weights, and its indices of ids -> rows of our tables."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.model.notebook import NotebookWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotebookField:
    """How a notebook numbers the ids of a field.

    Attributes:
        places: ``[n]`` int32: for each of the notebook's indices, the row of our table; 0 where
            our vocabulary has no such id.
        rows: of our table.
    """

    places: np.ndarray
    rows: int

    def table(self, of_field: Tensor) -> Tensor:
        """``[n, columns]`` in the notebook's order -> ``[rows, columns]`` in ours.

        Rows that the notebook does not have, row 0 among them, become 0: they add nothing.
        """
        table = of_field.new_zeros(self.rows, of_field.shape[1])
        known = torch.from_numpy(self.places > 0)
        table[torch.from_numpy(self.places).long()[known]] = of_field[known]
        return table


def notebook_fields(
    dataset: PreparedDataset, id_files: Mapping[str, Path]
) -> dict[str, NotebookField]:
    """The indices that a notebook gives to ids, by field.

    Args:
        dataset: the prepared dataset.
        id_files: text files with one id a line, in the notebook's order, by field. The others'
            ids are the vocabulary's, sorted: numbers by value, texts by code point.

    Raises:
        ConfigError: the data has fields that such a notebook cannot have.
        DataError: a file of ids cannot be read, or repeats an id.
    """
    manifest = dataset.manifest
    fields = {}
    for feature in manifest.features:
        if feature.kind == "numeric":
            raise ConfigError(
                f"{feature.name} is numeric, and an offset table has no such field; leave it out "
                f"of data.features"
            )
        if feature.hash_rows is not None:
            raise ConfigError(
                f"{feature.name} is hashed, and every id of an offset table has a row of its own; "
                f"leave hash_rows out"
            )
        if feature.multi_valued:
            raise ConfigError(
                f"{feature.name} may have several values a row, and a field of an offset table has "
                f"one; set keep: first"
            )
        if len(manifest.tables[feature.table_name].features) > 1:
            raise ConfigError(
                f"{feature.name} shares the table {feature.table_name}, and those of an offset "
                f"table share no rows; leave data.features.table out"
            )
        vocabulary = dataset.vocabulary(feature.table_name)
        if feature.name in id_files:
            ids = _read_ids(id_files[feature.name])
        else:
            ids = vocabulary.ids.take(pa.array(np.argsort(id_order(vocabulary.ids))))
        places = vocabulary.lookup(ids)
        left_out = int((places == 0).sum())
        unset = len(vocabulary.ids) - (len(ids) - left_out)
        if left_out or unset:
            log.info(
                "%s: %s of the notebook's ids are not in our vocabulary: left out; %s of ours are "
                "not in the notebook: their rows are 0",
                feature.name,
                f"{left_out:,}",
                f"{unset:,}",
            )
        fields[feature.name] = NotebookField(places, vocabulary.rows)
    if strange := sorted(id_files.keys() - fields.keys()):
        raise ConfigError(f"--ids {strange[0]}=...: unknown field; available: {', '.join(fields)}")
    return fields


def read_weights(path: Path) -> NotebookWeights:
    """Reads a state dict that ``torch.save`` wrote; nothing but tensors is unpickled.

    Raises:
        DataError: it is no state dict, or one of another model.
    """
    try:
        # torch.load does not compare a file with the checksums that torch.save wrote into it.
        damaged = ZipFile(path).testzip() if is_zipfile(path) else None
        if damaged is not None:
            raise DataError(
                f"{path}: damaged: the checksum of {damaged} in it differs; write it again"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnpicklingError, RuntimeError, ValueError, EOFError, BadZipFile) as error:
        reason = str(error).strip().partition("\n")[0][:100]
        raise DataError(
            f"{path}: not a file of plain tensors ({reason}); write it by "
            f"torch.save(model.state_dict(), FILE)"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path}: no state dict; write torch.save(model.state_dict(), FILE)")
    try:
        return NotebookWeights.from_state(state)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read_ids(path: Path) -> pa.Array:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line in seen:
            raise DataError(
                f"{path}, line {number}: {line!r} stands in line {seen[line]} already; one id a "
                f"line, in the notebook's order"
            )
        seen[line] = number
    return pa.array(lines, pa.string())
