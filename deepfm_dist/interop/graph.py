"""The whole model as one scoring graph: ONNX for onnxruntime, or an AOTInductor package for C++.

The graph takes table rows and numbers, looks vectors up in its own tables, and returns logits.
Attributes and histories are passed once per user, for any number of rows (items).
"""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.jagged import Jagged, Values
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.schema import Feature
from deepfm_dist.errors import DeepFMError, EnvironmentProblem
from deepfm_dist.messages import brief
from deepfm_dist.model.deepfm import POWERS, InteractionArch

GraphFormat = Literal["onnx", "aoti"]
Precision = Literal["fp32", "fp16", "int8"]
FILES: Mapping[GraphFormat, str] = {"onnx": "model.onnx", "aoti": "model.pt2"}
NO_VALUE = -1
"""Table row of a missing value: a vector of zeros; also used for padding."""
TOLERANCE = 1e-5
"""Maximum `difference` between logits due to rounding."""
_EMBEDDED_BYTES = 1_500_000_000
"""Larger tables are stored in a file next to the ONNX file, whose format is limited to 2 GiB."""
BLOCK = 32
"""Number of factors that share a scale and an offset in int8 tables."""
_LEVELS = 255


@dataclass(frozen=True)
class GraphInput:
    """One input of the graph.

    Attributes:
        name: the name of the input; inputs of an AOTInductor package are given in order, without
            names.
        kind: ``user_of_row``: for each row, the index of its user; ``row``: a table row,
            0 for an unknown value and `NO_VALUE` for none; ``rows``: any number of them, padded
            with `NO_VALUE`; ``number``: the value of a numeric field, transformed; ``vector``: of a
            vector field, scaled.
        dtype: int64 or float32.
        shape: its dimensions; variable ones by name.
        field: name of the field; None for ``user_of_row``.
        n_rows: number of rows of the field's table, if it has one. Larger rows are errors.
    """

    name: str
    kind: Literal["user_of_row", "row", "rows", "number", "vector"]
    dtype: Literal["int64", "float32"]
    shape: tuple[str | int, ...]
    field: str | None = None
    n_rows: int | None = None


class GraphTable(nn.Module):
    """A table inside the graph; look-ups are float32.

    int8 keeps an unsigned byte per factor, and a float32 scale and offset for every `BLOCK` of a
    row's factors: ``factor = scale * byte + offset``. Trained factors and those of a closed form,
    which lie next to them, differ by orders of magnitude: with one scale per row, 5 % of the ten
    best items changed; with blocks, 0.7 %. First-order weights stay in float32.

    Args:
        weights: ``[rows, D + 1]`` float32: factors, first-order weight.
        precision: the precision of the stored weights.
    """

    weights: Tensor
    bytes: Tensor
    scales_offsets: Tensor
    first_order: Tensor

    def __init__(self, weights: Tensor, precision: Precision) -> None:
        super().__init__()
        self.is_quantized = precision == "int8" and weights.shape[1] > 1
        if not self.is_quantized:
            self.register_buffer("weights", weights.half() if precision == "fp16" else weights)
            return
        self.dim = weights.shape[1] - 1
        blocks = weights[:, :-1].split(BLOCK, 1)
        low = torch.stack([block.amin(1) for block in blocks], 1)
        high = torch.stack([block.amax(1) for block in blocks], 1)
        scales = ((high - low) / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("scales_offsets", torch.stack([scales, low], 1))
        stored = [
            ((block - low[:, [b]]) / scales[:, [b]]).round().to(torch.uint8)
            for b, block in enumerate(blocks)
        ]
        width = len(blocks) * BLOCK
        self.register_buffer("bytes", functional.pad(torch.cat(stored, 1), (0, width - self.dim)))
        self.register_buffer("first_order", weights[:, -1:].contiguous())

    def forward(self, rows: Tensor) -> Tensor:
        """``[...]`` int64 rows -> ``[..., D + 1]`` float32."""
        if not self.is_quantized:
            return self.weights[rows].float()
        scales, offsets = self.scales_offsets[rows].unbind(-2)
        levels = self.bytes[rows].unflatten(-1, (-1, BLOCK)).float()
        factors = (levels * scales[..., None] + offsets[..., None]).flatten(-2)
        return torch.cat([factors[..., : self.dim], self.first_order[rows]], -1)


class ScoringGraph(nn.Module):
    """Maps table rows and numbers to logits.

    Args:
        tables: ``[rows, D + 1]`` float32 by name.
        above: everything above the tables, in eval mode.
        manifest: the manifest of the data.
        precision: the precision of the tables inside the graph.

    Attributes:
        inputs: the inputs of `forward`, in order.
        output: name of the result.
    """

    def __init__(
        self,
        tables: Mapping[str, Tensor],
        above: InteractionArch,
        manifest: Manifest,
        precision: Precision,
    ) -> None:
        super().__init__()
        self._categorical, self._dense = manifest.categorical, manifest.dense
        self._vectors = manifest.vectors
        self._fields = (*self._categorical, *self._dense, *manifest.vector_fields)
        self.tables = nn.ModuleList(GraphTable(table, precision) for table in tables.values())
        self._place_of_table = {name: place for place, name in enumerate(tables)}
        self.above = above
        self.inputs = _inputs(manifest)
        self.output = _unused("logits", [i.name for i in self.inputs])

    @property
    def tables_bytes(self) -> int:
        """Bytes of the tables as stored."""
        return sum(buffer.nbytes for buffer in self.tables.buffers())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Scores rows; the inputs are those of `inputs`.

        Returns:
            ``[rows]`` logits, or ``[rows, targets]`` for several targets.
        """
        user_of_row = inputs[0] if self.inputs[0].kind == "user_of_row" else None
        n_tables, columns = len(self._categorical), []
        for field, value in zip(self._fields, inputs[-len(self._fields) :], strict=True):
            column = self._pooled(field, value) if field in self._categorical else value
            if field.entity == "user":
                assert user_of_row is not None
                column = column[user_of_row]
            columns.append(column)
        rows_BFW = torch.stack(columns[:n_tables], 1)
        numbers = [x[:, None] if x.dim() == 1 else x for x in columns[n_tables:]]
        dense_BN = torch.cat(numbers, 1) if numbers else rows_BFW.new_zeros(rows_BFW.shape[0], 0)
        logits: Tensor = self.above(rows_BFW, dense_BN)
        return logits

    def _pooled(self, field: Feature, rows: Tensor) -> Tensor:
        """``[n]`` or ``[n, L]`` rows of the field's table -> ``[n, D + 1]``."""
        is_value = rows >= 0
        vectors = self.tables[self._place_of_table[field.table_name]](rows.clamp(min=0))
        vectors = vectors * is_value[..., None]
        if not field.multi_valued:
            return vectors
        counts = is_value.sum(1).clamp(min=1).float()
        return vectors.sum(1) / (counts ** POWERS[field.pooling])[:, None]

    def example(self, batch: Batch) -> tuple[Tensor, ...]:
        """The inputs for the rows of a batch, each with a different user."""
        n = batch.dense.shape[0]
        bags = batch.sparse.to_dict()
        inputs = [torch.arange(n)] if self.inputs[0].kind == "user_of_row" else []
        for field in self._categorical:
            bag = bags[field.name]
            height = max(2, int(bag.lengths().max())) if field.multi_valued else 1
            rows = torch.full((n, height), NO_VALUE)
            place = torch.arange(height) < bag.lengths()[:, None]
            rows[place] = bag.values().long()
            inputs.append(rows if field.multi_valued else rows[:, 0].contiguous())
        n_numbers = len(self._dense)
        vectors = batch.dense[:, n_numbers:].split([*self._vectors.values()], 1)
        return (*inputs, *batch.dense[:, :n_numbers].T.contiguous(), *(v.clone() for v in vectors))


def _inputs(manifest: Manifest) -> tuple[GraphInput, ...]:
    fields = (*manifest.categorical, *manifest.dense, *manifest.vector_fields)
    inputs = []
    if any(field.entity == "user" for field in fields):
        name = _unused("user_of_row", [field.name for field in fields])
        inputs.append(GraphInput(name, "user_of_row", "int64", ("rows",)))
    for field in fields:
        n = "users" if field.entity == "user" else "rows"
        if not field.in_table:
            number = GraphInput(field.name, "number", "float32", (n,), field.name)
            if field.dim is not None:
                number = replace(number, kind="vector", shape=(n, field.dim))
            inputs.append(number)
            continue
        n_rows = manifest.tables[field.table_name].rows
        table_row = GraphInput(field.name, "row", "int64", (n,), field.name, n_rows)
        if field.multi_valued:
            table_row = replace(table_row, kind="rows", shape=(n, f"values of {field.name}"))
        inputs.append(table_row)
    return tuple(inputs)


def _unused(name: str, others: Sequence[str]) -> str:
    while name in others:
        name += "_"
    return name


def random_context(manifest: Manifest, n: int, rng: np.random.Generator) -> dict[str, Values]:
    """Random values of the context fields of ``n`` rows; every table row is equally likely."""
    context: dict[str, Values] = {}
    for field in (f for f in manifest.features if f.entity == "context"):
        if not field.in_table:
            context[field.name] = rng.standard_normal(n).astype(np.float32)
            continue
        n_table = manifest.tables[field.table_name].rows
        lengths = rng.integers(0, 4, n) if field.multi_valued else np.ones(n, np.int64)
        values = rng.integers(0, n_table, lengths.sum()).astype(np.int32)
        context[field.name] = values
        if field.multi_valued:
            context[field.name] = Jagged(np.concatenate([[0], lengths.cumsum()]), values)
    return context


def write_graph(
    graph: ScoringGraph, example: Sequence[Tensor], kind: GraphFormat, folder: Path
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Compiles the graph and writes it.

    Args:
        graph: the graph, in eval mode.
        example: inputs for at least two rows.
        kind: the kind of graph.
        folder: the folder of the file, which is named in `FILES`.

    Returns:
        The graph as the runtime computes it, from the file.

    Raises:
        DeepFMError: a custom over-arch cannot be exported.
        EnvironmentProblem: a library or the compiler is missing.
    """
    path, model = folder / FILES[kind], _trace(graph, example)
    return _write_onnx(graph, model, path) if kind == "onnx" else _write_package(model, path)


def check_tools(kind: GraphFormat) -> None:
    """Checks that a format's tools are installed, before any work.

    Raises:
        EnvironmentProblem: a library or the compiler is missing.
    """
    if kind == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ModuleNotFoundError as error:
            raise EnvironmentProblem(
                f"--format onnx needs {error.name}, which is not installed; "
                f"pip install onnx onnxruntime onnxscript"
            ) from None
    elif not shutil.which(compiler := os.environ.get("CXX", "g++")):
        raise EnvironmentProblem(
            f"--format aoti needs a C++ compiler, and {compiler} is not found; install it or name "
            f"another one in CXX"
        )


def _trace(graph: ScoringGraph, example: Sequence[Tensor]) -> ExportedProgram:
    names = dict.fromkeys(n for i in graph.inputs for n in i.shape if isinstance(n, str))
    sizes = {name: Dim(f"d{place}") for place, name in enumerate(names)}
    shapes = tuple(
        {at: sizes[n] for at, n in enumerate(i.shape) if isinstance(n, str)} for i in graph.inputs
    )
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(graph, tuple(example), dynamic_shapes=(shapes,))
    except Exception as error:
        raise DeepFMError(
            f"the model cannot be exported as a graph: {brief(str(error))}; use "
            f"--format safetensors, or an over-arch that torch.export can trace"
        ) from error


def _write_onnx(
    graph: ScoringGraph, model: ExportedProgram, path: Path
) -> Callable[[Sequence[Tensor]], Tensor]:
    import onnxruntime

    names = [i.name for i in graph.inputs]
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model,
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=[graph.output],
        )
        assert program is not None
        program.save(path, external_data=graph.tables_bytes > _EMBEDDED_BYTES)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def score(inputs: Sequence[Tensor]) -> Tensor:
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run([graph.output], feed)[0])

    return score


def _write_package(model: ExportedProgram, path: Path) -> Callable[[Sequence[Tensor]], Tensor]:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    with torch.no_grad(), _quiet():
        aoti_compile_and_package(model, package_path=str(path))
        loaded: Any = aoti_load_package(str(path))
    return lambda inputs: loaded(*inputs)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference between logits, relative to the larger of 1 and the largest logit.

    Rounding errors grow with the terms of the sum; a closed form has large terms that may cancel.
    """
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides exporters' warnings about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
