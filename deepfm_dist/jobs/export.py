"""Writes a run's model for code without TorchRec: its weights, or one scoring graph."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.remote import copy_path
from deepfm_dist.distributed.checkpoint import check_files
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.errors import DeepFMError
from deepfm_dist.interop.graph import (
    FILES,
    TOLERANCE,
    GraphFormat,
    Precision,
    ScoringGraph,
    check_tools,
    difference,
    random_context,
    write_graph,
)
from deepfm_dist.interop.safetensors import (
    FORMAT,
    copy_vocabularies,
    describe_fields,
    export_folder,
    read_config,
    write_config,
    write_entities,
    write_weights,
)
from deepfm_dist.runs.trained import LoadedModel, RunOnDisk, find_run, open_trained
from deepfm_dist.storage import is_remote

MAX_FILE_BYTES = 5_000_000_000
CHECKED_ROWS = 256
"""Number of rows for comparing an exported graph with the model."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """An exported model.

    Attributes:
        folder: the folder of its files.
        n_tensors: number of tensors, including the tables.
        n_tables: number of embedding tables.
    """

    folder: Path
    n_tensors: int
    n_tables: int


def export(run: RunOnDisk, folder: Path | None = None, max_file_bytes: int | None = None) -> Export:
    """Writes a finished run's model into a folder.

    Args:
        run: the run.
        folder: the target; an earlier export there is replaced; None: ``export`` of the run.
        max_file_bytes: maximum bytes of weights per file; None: `MAX_FILE_BYTES`.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    folder = folder or export_folder_of(run)
    max_file_bytes = max_file_bytes or MAX_FILE_BYTES
    check_files(run.checkpoint)
    model = run.config.model
    with export_folder(folder) as temporary:
        columns = model.embedding_dim + 1 if model.fm or model.deep else 1
        weights = write_weights(run.checkpoint, temporary, columns, max_file_bytes)
        _write_data(run, temporary)
    return Export(folder, len(weights), len(run.dataset.manifest.tables))


def _write_data(run: RunOnDisk, folder: Path, **more: Any) -> None:
    """Writes everything besides the weights: vocabularies, entities and ``config.json``."""
    if targets := run.dataset.manifest.targets:  # in the order of the logits
        more["targets"] = list(targets)
    copy_vocabularies(run.dataset, folder)
    write_entities(run.dataset.with_validation(), folder)  # like `predict`
    write_config(
        folder,
        run=run.config.run.name,
        **run.identity,
        model=run.config.model.model_dump(mode="json"),
        fields=describe_fields(run.dataset),
        **more,
    )


@dataclass(frozen=True)
class GraphExport:
    """An exported scoring graph.

    Attributes:
        file: the file of the graph.
        n_inputs: number of its inputs.
        tables_bytes: bytes of its tables.
        difference: largest `interop.graph.difference` of its logits from the model's, on
            `CHECKED_ROWS` random rows.
    """

    file: Path
    n_inputs: int
    tables_bytes: int
    difference: float


def export_graph(
    config: Config,
    overrides: Sequence[str],
    kind: GraphFormat,
    precision: Precision,
    folder: Path | None = None,
) -> GraphExport:
    """Writes a finished run's model as one scoring graph, and compares its logits with the model's.

    Args:
        config: the settings.
        overrides: the overrides of the command line.
        kind: onnx or aoti.
        precision: the precision of the tables.
        folder: the target; an earlier export there is replaced; None: ``export-<kind>`` of the run.

    Raises:
        CheckpointError: the checkpoint is damaged.
        DeepFMError: the graph's logits differ from the model's, or the model cannot be exported.
        EnvironmentProblem: a library or a compiler is missing.
    """
    check_tools(kind)
    run = find_run(config, overrides)
    check_files(run.checkpoint)
    folder = folder or run.config.output_dir / f"export-{kind}"
    with (
        export_folder(folder) as temporary,
        process_group("cpu", config.run.timeout_s, config.run.threads) as world,
    ):
        trained = open_trained(config, overrides, world)
        graph = _graph_of(trained, precision)
        batch = _batch_to_check(trained.dataset.with_validation())
        example = graph.example(batch)
        score = write_graph(graph, example, kind, temporary)
        with torch.no_grad():
            expected = deepfm_of(trained.sharded)(batch.sparse, batch.dense)
            with_these_tables = graph(*example)
            actual = score(example)
        off = difference(actual, with_these_tables)
        if not off <= TOLERANCE:  # also NaN
            raise DeepFMError(
                f"{FILES[kind]}: its logits differ from the model's by up to {off:.2g} of the "
                f"largest, more than {TOLERANCE:g}; try another --format, or --tables fp32"
            )
        inputs = [asdict(graph_input) for graph_input in graph.inputs]
        described = {"file": FILES[kind], "tables": precision, "inputs": inputs}
        _write_data(run, temporary, format=kind, graph=described | {"output": graph.output})
    return GraphExport(
        folder / FILES[kind], len(inputs), graph.tables_bytes, difference(actual, expected)
    )


def _graph_of(trained: LoadedModel, precision: Precision) -> ScoringGraph:
    """The scoring graph of a model in one process."""
    model, manifest = deepfm_of(trained.sharded), trained.dataset.manifest
    columns = model.embedding_arch.embedding_dim + 1
    tables: Mapping[str, torch.Tensor] = {
        table: shard[:, :columns].float().contiguous()
        for table, _, _, shard in local_shards(trained.sharded)
    }
    return ScoringGraph(tables, model.interaction_arch, manifest, precision).eval()


def _batch_to_check(dataset: PreparedDataset) -> Batch:
    """Rows of random users, items and context, including unknown ones."""
    manifest, rng = dataset.manifest, np.random.default_rng(dataset.manifest.seed)
    n = CHECKED_ROWS
    entities = {
        name: rng.integers(0, manifest.n_rows(name), n).astype(np.int32)
        for name in manifest.entities
    }
    for rows in entities.values():
        rows[:2] = 0, -1
    return Collator(dataset)(
        entities.get("user"), entities.get("item"), random_context(manifest, n, rng), np.arange(n)
    )


def up_to_date_export(run: RunOnDisk) -> Path:
    """The folder of the run's export; exports first unless one of this checkpoint exists.

    For a remote run it is in `RunConfig.cache_root`, like the copy of its dataset.
    """
    folder = export_folder_of(run)
    if is_remote(run.config.run_dir):
        folder = copy_path(run.config.run_dir, run.config.run.cache_root) / folder.name
    if not is_export_of(run, folder):
        log.info("%s: exporting step %s", folder, f"{run.state['step']:,}")
        export(run, folder)
    return folder


def export_folder_of(run: RunOnDisk) -> Path:
    """The default export folder of a run."""
    return run.config.output_dir / "export"


def is_export_of(run: RunOnDisk, folder: Path) -> bool:
    """Whether a folder holds an undamaged export of a run's checkpoint and data."""
    return ({"format": FORMAT} | run.identity).items() <= read_config(folder).items()
