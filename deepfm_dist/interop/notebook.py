"""Converts a notebook's DeepFM: state dict and id indices -> our tables and over-arch."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.model.settings import ModelConfig

log = logging.getLogger(__name__)

_LINEAR = re.compile(r"mlp_layers\.(\d+)\.(weight|bias)")
EXPECTED = (
    "bias [1], fc.weight [N, 1], embedding.weight [N, D], and mlp_layers.<i>.weight [out, in] and "
    "mlp_layers.<i>.bias [out] of two or more linear layers, the last with one output"
)


@dataclass(frozen=True)
class NotebookWeights:
    """The weights of a notebook's model.

    Attributes:
        bias: ``[1]``.
        rows: ``[N, D + 1]`` factors and first-order weight of every id of every field, field by
            field.
        layers: weight ``[out, in]`` and bias ``[out]`` of each linear layer.
    """

    bias: Tensor
    rows: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "NotebookWeights":
        """Parses a state dict.

        Args:
            state: the state of a module with ``bias``, ``fc`` and ``embedding`` (``nn.Embedding``)
                and ``mlp_layers`` (``nn.Sequential`` of linear layers and modules without weights).

        Raises:
            DataError: a key is missing or unknown, a shape does not fit the others, or a weight is
                not a finite float.
        """
        numbers = sorted({int(m[1]) for key in state if (m := _LINEAR.fullmatch(key))})
        names = ["bias", "fc.weight", "embedding.weight"]
        names += [f"mlp_layers.{n}.{part}" for n in numbers for part in ("weight", "bias")]
        missing = [name for name in names if name not in state]
        unknown = [key for key in state if key not in names]
        if unknown or missing or len(numbers) < 2:
            problem = f"unknown: {', '.join(unknown)}" if unknown else ""
            problem += f"missing: {', '.join(missing)}" if missing and not unknown else ""
            raise DataError(f"{problem or 'too few linear layers'}; expected are {EXPECTED}")
        for name in names:
            if not state[name].is_floating_point():
                raise DataError(f"{name} holds {state[name].dtype}, not floats")
            if wrong := int((~state[name].isfinite()).sum()):
                raise DataError(f"{name}: {wrong:,} of its weights are NaN or infinite")
        weights = {name: state[name].detach().float() for name in names}
        n, dim = (*weights["embedding.weight"].shape, 0, 0)[:2]
        wanted: dict[str, tuple[int, ...]] = {
            "bias": (1,),
            "embedding.weight": (n, dim),
            "fc.weight": (n, 1),
        }
        width = weights[f"mlp_layers.{numbers[0]}.weight"].shape[-1]
        for number in numbers:
            out = 1 if number == numbers[-1] else len(weights[f"mlp_layers.{number}.bias"])
            wanted[f"mlp_layers.{number}.weight"] = (out, width)
            wanted[f"mlp_layers.{number}.bias"] = (out,)
            width = out
        for name, shape in wanted.items():
            if tuple(weights[name].shape) != shape:
                raise DataError(
                    f"{name} has shape {list(weights[name].shape)}, not {list(shape)}; expected "
                    f"are {EXPECTED}"
                )
        return cls(
            weights["bias"],
            torch.cat([weights["embedding.weight"], weights["fc.weight"]], 1),
            tuple(
                (weights[f"mlp_layers.{n}.weight"], weights[f"mlp_layers.{n}.bias"])
                for n in numbers
            ),
        )

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.rows.shape[1] - 1

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Hidden layers."""
        return tuple(len(bias) for _, bias in self.layers[:-1])

    def interaction_arch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """State of `deepfm_dist.model.deepfm.InteractionArch` with an `OverArch`.

        Args:
            places: for each of our fields, its index among the notebook's.
        """
        first, bias = self.layers[0]
        by_field = first.view(len(bias), len(places), self.embedding_dim)
        layers = [(by_field[:, list(places)].flatten(1), bias), *self.layers[1:]]
        names = [*(f"hidden.{i}" for i in range(len(layers) - 1)), "output"]
        return {"bias": self.bias} | {
            f"over_arch.{name}.{part}": tensor
            for name, layer in zip(names, layers, strict=True)
            for part, tensor in zip(("weight", "bias"), layer, strict=True)
        }


@dataclass(frozen=True)
class NotebookField:
    """How a notebook numbers the ids of a field.

    Attributes:
        places: ``[n]`` int32: for each of the notebook's indices, the row of our table; 0 if our
            vocabulary lacks the id.
        rows: number of rows of our table.
    """

    places: np.ndarray
    rows: int

    def table(self, weights: Tensor) -> Tensor:
        """``[n, columns]`` in the notebook's order -> ``[rows, columns]`` in ours.

        Rows missing in the notebook, including row 0, become 0 and contribute nothing.
        """
        table = weights.new_zeros(self.rows, weights.shape[1])
        known = torch.from_numpy(self.places > 0)
        table[torch.from_numpy(self.places).long()[known]] = weights[known]
        return table


def notebook_fields(
    dataset: PreparedDataset, id_files: Mapping[str, Path]
) -> dict[str, NotebookField]:
    """The notebook's indices of ids, by field.

    Args:
        dataset: the prepared dataset.
        id_files: text files with one id per line, in the notebook's order, by field. Ids of other
            fields are those of the vocabulary, sorted: numbers by value, text by code point.

    Raises:
        ConfigError: the data has fields that a notebook cannot have.
        DataError: a file of ids cannot be read, or repeats an id.
    """
    manifest = dataset.manifest
    fields = {}
    for feature in manifest.features:
        if feature.kind != "categorical":
            kind = "numeric" if feature.kind == "numeric" else "a vector"
            raise ConfigError(
                f"{feature.name} is {kind}, and an offset table has no such field; leave it out "
                f"of data.features"
            )
        if feature.hash_rows is not None:
            raise ConfigError(
                f"{feature.name} is hashed, and every id of an offset table has its own row; "
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
    """Reads a state dict written by ``torch.save``; unpickles nothing but tensors.

    Raises:
        DataError: it is not the state dict of such a model.
    """
    try:
        # torch.load does not verify the checksums that torch.save wrote.
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
        raise DataError(f"{path}: not a state dict; write torch.save(model.state_dict(), FILE)")
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
                f"{path}, line {number}: {line!r} is in line {seen[line]} already; give one id "
                f"per line, in the notebook's order"
            )
        seen[line] = number
    return pa.array(lines, pa.string())


def from_notebook(
    model: ModelConfig,
    dataset: PreparedDataset,
    weights: NotebookWeights,
    id_files: Mapping[str, Path],
    fields: str | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Converts a notebook's weights to ours.

    Args:
        model: settings of the new run.
        dataset: the prepared dataset.
        weights: the notebook's.
        id_files: files with the notebook's ids of single fields.
        fields: names in the notebook's order, comma-separated; None: as in ``data.features``.

    Returns:
        Values ``[rows, D + 1]`` by table, and the state of the interaction arch.

    Raises:
        ConfigError: the configuration differs from the notebook's model, or its data is
            unsupported.
        DataError: the number of ids differs from the rows of the offset table.
    """
    _check_model(model, weights)
    ours = notebook_fields(dataset, id_files)
    order = fields.split(",") if fields else list(ours)
    if sorted(order) != sorted(ours):
        raise ConfigError(f"--fields {fields}: must name each of {', '.join(ours)} once")
    sizes = {name: len(ours[name].places) for name in order}
    width = weights.layers[0][0].shape[1]
    if width != len(order) * weights.embedding_dim:
        raise ConfigError(
            f"mlp_layers.0 takes {width} numbers, {width / weights.embedding_dim:g} fields of "
            f"{weights.embedding_dim}; data.features has {len(order)}: {', '.join(order)}"
        )
    if sum(sizes.values()) != len(weights.rows):
        counts = ", ".join(f"{name} {n:,}" for name, n in sizes.items())
        raise DataError(
            f"embedding.weight has {len(weights.rows):,} rows, the fields' ids are "
            f"{sum(sizes.values()):,} ({counts}); give the notebook's ids by --ids FIELD=FILE "
            f"where they are not those of the training rows"
        )
    field_weights = dict(zip(order, weights.rows.split(list(sizes.values())), strict=True))
    tables = {
        feature.table_name: ours[feature.name].table(field_weights[feature.name])
        for feature in dataset.manifest.categorical
    }
    return tables, weights.interaction_arch([order.index(name) for name in ours])


def _check_model(model: ModelConfig, weights: NotebookWeights) -> None:
    """Refuses settings that differ from the notebook's model.

    Raises:
        ConfigError: names the settings to change.
    """
    wanted: dict[str, Any] = {
        "embedding_dim": weights.embedding_dim,
        "over_arch_layer_sizes": weights.layer_sizes,
        "over_arch": "mlp",
        "activation": "relu",
        "batch_norm": False,
        "first_order": True,
        "fm": True,
        "fm_pairs": "all",
        "deep": True,
    }
    differ = {k: v for k, v in wanted.items() if getattr(model, k) != v}
    if differ:
        overrides = (
            f"model.{k}={str(list(v) if isinstance(v, tuple) else v).replace(' ', '')}"
            for k, v in differ.items()
        )
        raise ConfigError(f"model settings differ from the notebook's; set {' '.join(overrides)}")
