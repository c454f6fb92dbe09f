"""Estimates whether a model fits a cluster, without the cluster."""

import logging
from collections.abc import Mapping

from deepfm_dist.build import model_to_train
from deepfm_dist.config import Config, resolve
from deepfm_dist.data.manifest import FORMAT, Manifest, TableSpec
from deepfm_dist.distributed import planning
from deepfm_dist.distributed.optimizers import table_optimizer
from deepfm_dist.distributed.planning import Job, Plan, hypothetical_world
from deepfm_dist.distributed.sharding import check_placements
from deepfm_dist.errors import ConfigError

log = logging.getLogger(__name__)


def plan(
    config: Config,
    rows: Mapping[str, int],
    world_size: int,
    local_world_size: int,
    hbm_bytes: int,
) -> Plan:
    """Estimates the memory per GPU and the network traffic of training.

    Args:
        config: the settings.
        rows: rows by table, see `hypothetical_manifest`.
        world_size: number of GPUs.
        local_world_size: GPUs per machine.
        hbm_bytes: memory per GPU.

    Raises:
        ConfigError: a table's rows are unknown, or a setting does not apply to GPUs.
    """
    config = _with_choices(config)
    world = hypothetical_world(world_size, local_world_size)
    optimizer = table_optimizer(config.optimizer, world.device)
    check_placements(config.sharding, optimizer.kernel, world.device)
    manifest = hypothetical_manifest(config, rows)
    # Initial values do not matter here, and the labels that a start at the mean needs are unknown.
    model = config.model.model_copy(update={"init_at_mean": False})
    task = model_to_train(config.model_copy(update={"model": model}), manifest, world)
    optimizer.attach(task.model.embedding_arch.ebc.parameters())
    batch_size = config.trainer.on_ranks(world.world_size).batch_size
    # A batch of users and items has rows without the fields of one of the two.
    single_valued = manifest.single_valued if config.trainer.loss == "bce" else frozenset()
    job = Job(
        task,
        world,
        optimizer,
        config.sharding,
        batch_size,
        hbm_bytes=hbm_bytes,
        single_valued=single_valued,
    )
    return planning.plan(job)


def _with_choices(config: Config) -> Config:
    """The settings that training would choose from the data, or the defaults before preparation."""
    manifest = Manifest.find(config.prepared_dir)
    if (
        manifest is not None
        and config.data.settled_by(manifest.data).features == manifest.data.features
    ):
        return resolve(config, manifest)[0]
    if config.model.is_auto("embedding_dim"):
        log.warning(
            "%s: not prepared yet: settings that the data decide have their defaults, such as "
            "model.embedding_dim=%d, trainer.batch_size=%d and optimizer.tables.name=%s",
            config.prepared_dir,
            config.model.embedding_dim,
            config.trainer.batch_size,
            config.optimizer.tables.name,
        )
    return config


def hypothetical_manifest(config: Config, rows: Mapping[str, int]) -> Manifest:
    """A manifest of data with the given rows, complete enough for building the model.

    Args:
        config: defines the fields.
        rows: rows by table. Missing ones are taken from the prepared dataset, if there is one, or
            from settings of hashed tables and buckets.

    Raises:
        ConfigError: a table's rows or the length of vectors are unknown, or there is no such table.
    """
    readers: dict[str, list[str]] = {}
    known: dict[str, int] = {}
    for feature in config.data.features:
        if feature.in_table:
            readers.setdefault(feature.table_name, []).append(feature.name)
        if feature.transform == "bucket":
            known[feature.table_name] = 1 + feature.buckets
        elif feature.hash_rows is not None:
            known[feature.table_name] = 1 + feature.hash_rows
    data = config.data
    if (manifest := Manifest.find(config.prepared_dir)) is not None:
        known |= {name: spec.rows for name, spec in manifest.tables.items()}
        data = data.settled_by(manifest.data)
    known |= rows
    if strange := sorted(rows.keys() - readers.keys()):
        raise ConfigError(f"--rows {strange[0]}: unknown table; available: {', '.join(readers)}")
    if unknown := [name for name in readers if name not in known]:
        raise ConfigError(
            f"rows of the table {unknown[0]} are not known: set --rows {unknown[0]}=N, or prepare "
            f"the data: python -m deepfm_dist.prepare"
        )
    if open_ones := [f.name for f in data.features if f.kind == "vector" and f.dim is None]:
        raise ConfigError(
            f"the length of the vectors of {open_ones[0]} is not known: set dim for this field in "
            f"data.features, or prepare the data: python -m deepfm_dist.prepare"
        )
    return Manifest(
        format=FORMAT,
        fingerprint="",
        vocabulary_hash="",
        seed=config.run.seed,
        data=data,
        tables={n: TableSpec(rows=known[n], features=tuple(f)) for n, f in readers.items()},
        entities={},
        numeric={},
        splits={},
        files=0,
        lanes=0,
        groups=0,
        dropped={},
        inputs={},
        versions={},
    )
