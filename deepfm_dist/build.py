"""Configuration + manifest -> the model, sharded: the one place where both meet."""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel

from deepfm_dist.config import Config, ModelConfig, config_from
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import FORMAT, Manifest, TableSpec
from deepfm_dist.data.notebook import notebook_fields
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.optimizers import TableOptimizer
from deepfm_dist.distributed.sharding import Placement, init_tables, shard
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.model.deepfm import DeepFM, OverArch, Table, build_deepfm
from deepfm_dist.model.losses import DeepFMTrain
from deepfm_dist.model.notebook import NotebookWeights

log = logging.getLogger(__name__)
_OF_TRAINING = ("data", "model")  # sections whose settings a checkpoint knows


def build_model(config: ModelConfig, manifest: Manifest, world: World, seed: int) -> DeepFMTrain:
    """The unsharded model: tables on the meta device, the rest initialised from the seed.

    Raises:
        ConfigError: ``model.over_arch`` cannot be imported or built.
    """
    torch.manual_seed(seed)
    over_arch: Callable[[int], nn.Module] | None = None
    if config.deep and config.over_arch == "mlp":
        over_arch = partial(
            OverArch,
            layer_sizes=config.over_arch_layer_sizes,
            activation=config.activation,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
            all_reduce=world.differentiable_sum,
        )
    elif config.deep:
        over_arch = partial(_import_class(config.over_arch), **config.over_arch_options)
    tables = {name: Table(spec.rows, spec.features) for name, spec in manifest.tables.items()}
    try:
        model = build_deepfm(
            tables,
            [f.name for f in manifest.categorical],
            len(manifest.dense),
            config.embedding_dim,
            config.first_order,
            config.fm,
            over_arch,
            config.init_std,
            [f.name for f in manifest.categorical if f.multi_valued and f.pooling == "mean"],
            torch.device("meta"),
        )
    except TypeError as error:
        raise ConfigError(
            f"model.over_arch={config.over_arch}: cannot be built: {error}; it is called with "
            f"in_features and model.over_arch_options"
        ) from None
    return DeepFMTrain(model)


def _import_class(path: str) -> type[nn.Module]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.over_arch={path}: {error}; give mlp or package.module:Class"
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"model.over_arch={path}: not a torch.nn.Module class")
    return found


def placements_of(config: Config) -> dict[str, Placement]:
    """The explicit part of the plan."""
    return {name: Placement(plan.kind, plan.rank) for name, plan in config.sharding.tables.items()}


def imagined_manifest(config: Config, rows: Mapping[str, int]) -> Manifest:
    """What the manifest of data with so many rows would say, as far as the model asks.

    Args:
        config: names the fields.
        rows: rows by table; those of a prepared dataset, where there is one, fill the gaps.

    Raises:
        ConfigError: a table's rows are not known, or an unknown table is named.
    """
    readers: dict[str, list[str]] = {}
    for feature in config.data.features:
        if feature.kind == "categorical":
            readers.setdefault(feature.table_name, []).append(feature.name)
    known = dict(rows)
    if (config.prepared_dir / "manifest.json").is_file():
        tables = Manifest.read(config.prepared_dir).tables
        known = {name: spec.rows for name, spec in tables.items()} | known
    if strange := sorted(rows.keys() - readers.keys()):
        raise ConfigError(f"--rows {strange[0]}: no such table; there are: {', '.join(readers)}")
    if unknown := [name for name in readers if name not in known]:
        raise ConfigError(
            f"how many rows has the table {unknown[0]}? say --rows {unknown[0]}=N, or prepare the "
            f"data: python -m deepfm_dist.prepare"
        )
    return Manifest(
        format=FORMAT,
        fingerprint="",
        vocabulary_hash="",
        seed=config.run.seed,
        data=config.data,
        tables={n: TableSpec(rows=known[n], features=tuple(f)) for n, f in readers.items()},
        entities={},
        numeric={},
        splits={},
        dropped={},
        inputs={},
        versions={},
    )


def shard_for_training(
    config: Config, manifest: Manifest, world: World, tables: TableOptimizer
) -> DistributedModelParallel:
    """The model as the configuration places it, initialised, its plan logged. All ranks."""
    task = build_model(config.model, manifest, world, config.run.seed)
    arch = task.model.embedding_arch
    tables.attach(arch.ebc.parameters())
    sharded, plan = shard(
        task,
        world,
        placements_of(config),
        tables.kernel,
        config.sharding.kind,
        config.trainer.batch_size,
    )
    init_tables(sharded, arch.embedding_dim + 1, config.model.init_std, config.run.seed)
    if world.is_first:
        lines = pd.DataFrame([asdict(line) for line in plan]).assign(optimizer=tables.name)
        log.info("sharding plan on %d x %s", world.world_size, world.device.type)
        log.info("%s", lines.to_string(index=False))
        log.info("%s: %s kernel, %s", tables.name, tables.kernel.value, tables.reason)
    return sharded


def shard_for_inference(
    config: Config, manifest: Manifest, world: World
) -> DistributedModelParallel:
    """The model without optimizers, for scores that do not depend on the world size. All ranks.

    A table read by several values at once lies whole on one rank: cut by rows, the ranks'
    partial sums would be added in another order at every world size. Look-ups of single rows are
    exact under any plan.
    """
    task = build_model(config.model, manifest, world, config.run.seed)
    several = {f.table_name for f in manifest.categorical if f.multi_valued}
    placements = dict.fromkeys(several, Placement("table_wise"))
    kind = "row_wise" if config.sharding.kind == "row_wise" else "auto"
    sharded, _ = shard(task, world, placements, EmbeddingComputeKernel.DENSE, kind)
    sharded.eval()
    return sharded


@dataclass(frozen=True)
class Finished:
    """What a run has left on disk.

    Attributes:
        config: the settings in force: the run's own for data and model, the command's otherwise.
        dataset: the prepared dataset it was trained on.
        checkpoint: the latest complete one.
        state: what its marker says.
    """

    config: Config
    dataset: PreparedDataset
    checkpoint: Path
    state: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A run's model, ready for inference.

    Attributes:
        config: the settings in force: the run's own for data and model, the command's otherwise.
        dataset: the prepared dataset it was trained on.
        sharded: the task, in eval mode.
    """

    config: Config
    dataset: PreparedDataset
    sharded: DistributedModelParallel


def open_trained(config: Config, overrides: Sequence[str], world: World) -> Trained:
    """Loads a run's latest checkpoint. All ranks.

    Args:
        config: the command's configuration: where the run and the prepared data are.
        overrides: of the command line.
        world: the ranks.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of other data.
        ConfigError: an override asks for other data or another model than were trained.
    """
    found = find_finished(config, overrides)
    sharded = shard_for_inference(found.config, found.dataset.manifest, world)
    checkpoint.load_model(found.checkpoint, sharded)
    log.info("%s, step %s", found.checkpoint, f"{found.state['step']:,}")
    return Trained(found.config, found.dataset, sharded)


def find_finished(config: Config, overrides: Sequence[str]) -> Finished:
    """Finds a run's latest checkpoint and its dataset.

    A checkpoint knows its data and model, and these settings are taken from it.

    Args:
        config: the command's configuration: where the run and the prepared data are.
        overrides: of the command line.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of other data.
        ConfigError: an override asks for other data or another model than were trained.
    """
    path = checkpoint.latest_checkpoint(config.run_dir)
    state = checkpoint.read_state(path)
    merged = config.model_dump(mode="json")
    for name in (name for override in overrides for name in _settings_of(override)):
        if name.partition(".")[0] in _OF_TRAINING and name not in ("data.root", "data.name"):
            wanted, trained = _at(merged, name), _at(state["config"], name)
            if wanted != trained:
                raise ConfigError(
                    f"{name}={wanted}: {path} was trained with {trained}; train with the new "
                    f"value first, or leave the override out"
                )
    for section in _OF_TRAINING:
        kept = {k: merged["data"][k] for k in ("root", "name")} if section == "data" else {}
        merged[section] = state["config"][section] | kept
    config = config_from(merged, origin=str(path))
    dataset = PreparedDataset(config.prepared_dir)
    checkpoint.check_vocabulary(path, state, dataset.manifest.vocabulary_hash)
    return Finished(config, dataset, path, state)


def from_notebook(
    config: Config,
    dataset: PreparedDataset,
    weights: NotebookWeights,
    id_files: Mapping[str, Path],
    fields: str | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A notebook's weights as ours.

    Args:
        config: of the run that is made of them.
        dataset: the prepared dataset.
        weights: the notebook's.
        id_files: files with the notebook's ids of single fields.
        fields: names in the notebook's order, between commas; None: as in ``data.features``.

    Returns:
        Values ``[rows, D + 1]`` by table, and the state of the interaction arch.

    Raises:
        ConfigError: the configuration is of another model, or of data no notebook can have.
        DataError: the fields' ids do not add up to the rows of the offset table.
    """
    model = config.model
    wanted: dict[str, Any] = {
        "embedding_dim": weights.embedding_dim,
        "over_arch_layer_sizes": weights.layer_sizes,
        "over_arch": "mlp",
        "activation": "relu",
        "batch_norm": False,
        "first_order": True,
        "fm": True,
        "deep": True,
    }
    differ = {k: v for k, v in wanted.items() if getattr(model, k) != v}
    if differ:
        overrides = (
            f"model.{k}={str(list(v) if isinstance(v, tuple) else v).replace(' ', '')}"
            for k, v in differ.items()
        )
        raise ConfigError(f"the notebook's model is another; set {' '.join(overrides)}")
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
        told = ", ".join(f"{name} {n:,}" for name, n in sizes.items())
        raise DataError(
            f"embedding.weight has {len(weights.rows):,} rows, the fields' ids are "
            f"{sum(sizes.values()):,} ({told}); give the notebook's ids by --ids FIELD=FILE where "
            f"they are not those of the training rows"
        )
    of_field = dict(zip(order, weights.rows.split(list(sizes.values())), strict=True))
    tables = {
        feature.table_name: ours[feature.name].table(of_field[feature.name])
        for feature in dataset.manifest.categorical
    }
    return tables, weights.interaction_arch([order.index(name) for name in ours])


def _settings_of(override: str) -> list[str]:
    """Names of the settings that ``section.field=value`` or ``section={field: value}`` sets."""
    name, _, text = override.partition("=")
    value = None if "." in name else yaml.safe_load(text)
    return [f"{name}.{field}" for field in value] if isinstance(value, dict) else [name]


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def deepfm_of(sharded: DistributedModelParallel) -> DeepFM:
    """The DeepFM inside the wrappers."""
    module: nn.Module = sharded.module
    while not isinstance(module, DeepFMTrain):
        inner = module.module
        assert isinstance(inner, nn.Module)
        module = inner
    return module.model
