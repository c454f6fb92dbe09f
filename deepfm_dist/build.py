"""Builds the sharded model, its optimizer and its batches from configuration and manifest."""

import importlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.config import Config
from deepfm_dist.data.batches.device_batches import (
    DeviceBatches,
    device_bytes,
    reason_for_host,
)
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.batches.user_batches import Candidates, UserBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Values
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.optimizers import combined_optimizer, table_optimizer
from deepfm_dist.distributed.settings import ShardingConfig, TablePlan
from deepfm_dist.distributed.sharding import (
    DistributedModelParallel,
    init_tables,
    shard,
)
from deepfm_dist.distributed.world import World
from deepfm_dist.environment import available_bytes, memory_bytes
from deepfm_dist.errors import ConfigError, EnvironmentProblem
from deepfm_dist.log import Logger, TensorBoard
from deepfm_dist.messages import error_line, plural
from deepfm_dist.model.deepfm import DeepFM, Table, build_deepfm
from deepfm_dist.model.dropout import RowDropout
from deepfm_dist.model.losses import CatalogueLoss, DeepFMTrain
from deepfm_dist.model.norm import GlobalBatchNorm, batch_norms
from deepfm_dist.model.pairs import PairScorer
from deepfm_dist.model.settings import ModelConfig
from deepfm_dist.model.targets import Towers, first_layer_names, mlp_towers
from deepfm_dist.model.transfer import Transfer
from deepfm_dist.training.trainer import Batches

log = logging.getLogger(__name__)

FEW_ROWS = 8192
"""Training warns below this many rows per GPU and step: the host then takes longer to launch a step
than the GPU to compute it.
"""
ON_DEVICE_SHARE = 1 / 8
"""Share of a GPU's free memory that training data may take by default, in addition to tables and
activations.
"""
MOST_READING_THREADS = 4
"""Default number of threads; one prepares about 13 M rows/s of a small schema
(benchmarks/reading.py).
"""


def build_model(
    config: ModelConfig,
    manifest: Manifest,
    world: World,
    seed: int,
    half: bool = False,
    target_weights: Sequence[float] = (),
) -> DeepFMTrain:
    """The unsharded model: tables on the meta device, the rest initialised from the seed.

    Args:
        config: its settings.
        manifest: the manifest of the data.
        world: the ranks.
        seed: the seed of the initial weights.
        half: whether tables are in float16.
        target_weights: weights of several targets in the loss; default: equal.

    Raises:
        ConfigError: ``model.over_arch`` cannot be built, or the weights exceed the memory.
    """
    _check_memory(config, manifest, world, half)
    torch.manual_seed(seed)
    over_arch: Callable[[int], nn.Module] | None = None
    n_targets = max(1, len(manifest.targets))
    if config.deep and config.over_arch == "mlp":
        over_arch = partial(
            mlp_towers,
            layer_sizes=config.over_arch_layer_sizes,
            n_targets=n_targets,
            n_shared=config.shared_layers,
            activation=config.activation,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
            init=config.over_arch_init,
        )
    elif config.deep:
        over_arch = partial(_custom_over_arch, config, n_targets=n_targets)
    tables = {name: Table(spec.rows, spec.features) for name, spec in manifest.tables.items()}
    model = build_deepfm(
        tables,
        [f.name for f in manifest.categorical],
        len(manifest.dense),
        config.embedding_dim,
        first_order=config.first_order,
        fm=config.fm,
        over_arch=over_arch,
        init_std=config.init_std,
        pooling={f.name: f.pooling for f in manifest.categorical if f.multi_valued},
        device=torch.device("meta"),
        half=half,
        is_item_field=manifest.is_item_field if config.fm_pairs == "across" else None,
        vectors=manifest.vectors,
        n_targets=n_targets,
    )
    for norm in batch_norms(model.interaction_arch):
        norm.gather = world.differentiable_gather
    if config.init_at_mean:
        model.interaction_arch.start_at(manifest.log_odds)
    return DeepFMTrain(model, target_weights or [1.0] * len(manifest.targets))


def weight_transfer(trained: DataConfig, manifest: Manifest, model: ModelConfig) -> Transfer:
    """Maps a trained model's weights to a model with other fields.

    Args:
        trained: data settings of the trained model.
        manifest: the manifest of the new model's data.
        model: settings of both.

    Raises:
        ConfigError: the fields differ and the over-arch is custom, so that it is not known which
            weights belong to which field.
    """
    names = {f.name for f in trained.features}
    shared = [f for f in manifest.categorical if f.name in names]
    before, after = (
        (
            [f.name for f in fields if f.in_table],
            [f.name for f in fields if f.kind == "numeric" and not f.in_table],
            [f.name for f in fields if f.kind == "vector"],
        )
        for fields in (trained.features, manifest.features)
    )
    first_layers: list[str] = []
    if model.deep and model.over_arch == "mlp":
        first_layer = "hidden.0" if model.over_arch_layer_sizes else "output"
        first_layers = first_layer_names(first_layer, len(manifest.targets), model.shared_layers)
    transfer = Transfer.between({f.table_name for f in shared}, before, after, first_layers)
    if transfer.moves and model.deep and not first_layers:
        raise ConfigError(
            f"model.over_arch={model.over_arch}: which of its weights belong to which field is not "
            f"known; to start from a trained one, give data.features its fields in its order: "
            f"{', '.join(f.name for f in trained.features)}"
        )
    return transfer


def _check_memory(config: ModelConfig, manifest: Manifest, world: World, half: bool) -> None:
    """Checks the size of the weights before anything is allocated.

    Raises:
        ConfigError: the weights exceed this machine's memory.
    """
    dim, memory = config.embedding_dim, memory_bytes()
    fields = len(manifest.is_item_field)
    rows = sum(spec.rows for spec in manifest.tables.values())
    on_machine = world.local_world_size / world.world_size
    tables = round(rows * (dim + 1) * (2 if half else 4) * on_machine)
    if world.device.type == "cpu" and tables > memory:  # the planner knows the GPUs' memory
        raise ConfigError(
            f"model.embedding_dim={dim:,}: {rows:,} rows of tables take {_gigabytes(tables)} of "
            f"this machine's {_gigabytes(memory)}; use a smaller one, or more machines"
        )
    layers = (fields * dim, *config.over_arch_layer_sizes, 1)
    deep = 4 * world.local_world_size * sum(a * b for a, b in pairwise(layers))
    deep *= max(1, len(manifest.targets))
    if config.deep and config.over_arch == "mlp" and deep > memory:
        raise ConfigError(
            f"model.over_arch_layer_sizes={list(config.over_arch_layer_sizes)} on {fields} fields "
            f"of model.embedding_dim={dim:,}: the weights take {_gigabytes(deep)} of this "
            f"machine's {_gigabytes(memory)}; use smaller layers or a smaller embedding_dim"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def model_to_train(config: Config, manifest: Manifest, world: World) -> DeepFMTrain:
    """The unsharded model, with tables in their training precision."""
    half = config.trainer.table_precision == "fp16"
    weights = config.trainer.weights_of(manifest.targets)
    return build_model(config.model, manifest, world, config.run.seed, half, weights)


def _custom_over_arch(config: ModelConfig, in_features: int, n_targets: int) -> nn.Module:
    """The over-arch given by import path, or one per target."""
    if n_targets == 1:
        return _imported_over_arch(config, in_features)
    return Towers([_imported_over_arch(config, in_features) for _ in range(n_targets)])


def _imported_over_arch(config: ModelConfig, in_features: int) -> nn.Module:
    """Builds an over-arch given by import path and tries it; its exceptions are user errors."""
    where = f"model.over_arch={config.over_arch}"
    kind = _import(config.over_arch, where, "mlp or package.module:Class")
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"{where}: not a torch.nn.Module class; give mlp or package.module:Class")
    try:
        over_arch = kind(in_features, **config.over_arch_options).eval()
        norms = batch_norms(over_arch)
        for norm in norms:  # which checks that it gets a row for each row of the batch
            norm.row_weights_B = torch.ones(2)
        with torch.no_grad():
            out = over_arch(torch.zeros(2, in_features))
        for norm in norms:
            norm.row_weights_B = None
    except Exception as error:
        raise ConfigError(
            f"{where}: cannot be built: {error_line(error)}; it is called with in_features "
            f"and model.over_arch_options, then with [B, in_features]"
        ) from None
    if not isinstance(out, Tensor) or out.shape != (2,):
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(f"{where}: gives {shape} for 2 rows; expected [2], a logit for each row")
    return over_arch.train()


def _warn_of_modules_by_rank(path: str, over_arch: nn.Module) -> None:
    """Warns of torch's batch norm and dropout in an over-arch of the user's own. Rank 0."""
    for kind, why, instead in (
        (_BatchNorm, "normalizes over one rank's rows, padding included", GlobalBatchNorm),
        (_DropoutNd, "draws other masks for each number of ranks", RowDropout),
    ):
        modules = [module for module in over_arch.modules() if isinstance(module, kind)]
        for name in sorted({type(module).__name__ for module in modules}):
            log.warning(
                "model.over_arch=%s: torch.nn.%s %s, so results depend on the number of ranks; "
                "use %s.%s",
                *(path, name, why, instead.__module__, instead.__name__),
            )


def _import(path: str, where: str, form: str) -> Any:
    """Imports ``package.module:name``."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(f"{where}: {error_line(error)}; give {form}") from None


def shard_for_training(
    config: Config, manifest: Manifest, world: World, is_logged: bool = True
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shards and initialises the model; returns it with its optimizer. All ranks.

    Args:
        config: the settings.
        manifest: of the data.
        world: the ranks.
        is_logged: whether to log the plan; a run logs that of its training loop.
    """
    is_logged = is_logged and world.is_first
    tables = table_optimizer(config.optimizer, world.device)
    tables = replace(tables, half=config.trainer.table_precision == "fp16")
    task = model_to_train(config, manifest, world)
    task.catalogue_loss = _catalogue_loss(config.trainer.loss, task, manifest, world)
    arch, above = task.model.embedding_arch, task.model.interaction_arch
    if world.is_first and config.model.over_arch != "mlp" and above.over_arch is not None:
        _warn_of_modules_by_rank(config.model.over_arch, above.over_arch)
    above.in_bfloat16 = config.trainer.precision == "bf16"
    in_tf32 = config.trainer.precision == "tf32"
    if in_tf32 and world.device.type != "cuda":
        raise ConfigError("trainer.precision=tf32: not available on a CPU; use fp32")
    torch.set_float32_matmul_precision("high" if in_tf32 else "highest")
    tables.attach(arch.ebc.parameters())
    sharded, plan = shard(
        task,
        world,
        config.sharding,
        tables,
        config.trainer.batch_size,
        some_unused=config.model.deep and config.model.over_arch != "mlp",
        single_valued=manifest.single_valued,
    )
    if _is_compiled(config, world.device, log if is_logged else None):
        above.compile()
    if task.catalogue_loss is not None:
        # They cancel in a ranking loss. Only rounding errors remain of their gradient; these depend
        # on the number of ranks, and Adam, which normalises gradients, would follow them.
        for constant in deepfm_of(sharded).interaction_arch.constants:
            constant.register_hook(torch.zeros_like)
    init_tables(
        sharded,
        arch.embedding_dim + 1,
        config.model.init_std,
        config.run.seed,
        threads=1 + world.spare_threads,
    )
    if is_logged:
        lines = pd.DataFrame([asdict(line) for line in plan]).assign(optimizer=tables.name)
        log.info("sharding plan on %d x %s", world.world_size, world.device.type)
        log.info("%s", lines.to_string(index=False))
        log.info("%s: %s kernel, %s", tables.name, tables.kernel.value, tables.reason)
    return sharded, combined_optimizer(sharded, tables, config.optimizer)


def _catalogue_loss(
    kind: Literal["bce", "bpr", "softmax"], task: DeepFMTrain, manifest: Manifest, world: World
) -> CatalogueLoss | None:
    if kind == "bce":
        return None
    arch = task.model.interaction_arch
    scorer = PairScorer(arch, manifest.is_item_field, len(manifest.categorical))
    return CatalogueLoss(kind, scorer, world.differentiable_gather)


def training_batches(
    config: Config,
    dataset: PreparedDataset,
    world: World,
    rows: Mapping[str, Values] | None = None,
    is_logged: bool = True,
) -> Batches:
    """The training batches that the loss requires.

    Args:
        config: the settings.
        dataset: the data.
        world: the ranks.
        rows: the rows of ``trainer.loss=bce``: columns of the rows to train on; default: the
            training rows.
        is_logged: whether to log how batches are made.

    Raises:
        ConfigError: the data does not fit the loss, or a rank would get no rows.
        DataError: a user has fewer unseen items than configured negatives.
    """
    trainer = config.trainer
    threads = trainer.reading_threads
    if threads is None:
        threads = min(world.spare_threads, MOST_READING_THREADS)
    slice_of_rank: dict[str, Any] = {
        "batch_size": trainer.batch_size,
        "rank": world.rank,
        "world_size": world.world_size,
        "seed": config.run.seed,
        "threads": threads,
        "id_dropout": config.data.id_dropout,
    }
    batches: Batches
    if trainer.loss == "bce":
        batches = TrainingBatches(dataset, **slice_of_rank, rows=rows)
        if _is_on_device(config, dataset, batches, world, is_logged):
            batches = DeviceBatches(batches, world.device)
    else:
        candidates = Candidates(
            trainer.candidates,
            config.data.negatives.popularity_power,
            trainer.targets_per_user,
        )
        batches = UserBatches(dataset, candidates=candidates, **slice_of_rank)
    if world.device.type == "cuda" and not isinstance(batches, DeviceBatches):
        # Pinned in the threads that make them: a copy from pageable memory would block the host.
        make = batches.batch
        batches.batch = lambda step: make(step).pin_memory()  # type: ignore[method-assign]
    if world.is_first and is_logged:
        _log_batches(config, batches, world)
    return batches


def _log_batches(config: Config, batches: Batches, world: World) -> None:
    """Says how batches are made, and warns of few rows for a GPU. Rank 0."""
    per_rank = -(-config.trainer.batch_size // world.world_size)
    if world.device.type == "cuda" and config.trainer.loss == "bce" and per_rank < FEW_ROWS:
        log.warning(
            "trainer.batch_size=%d is the global batch size: %s per GPU in a step, "
            "too few to keep it busy; set trainer.batch_size_per_rank=65536 (learning rates "
            "may have to change with it)",
            config.trainer.batch_size,
            plural(per_rank, "row"),
        )
    how = "each made when its step begins"
    if batches.threads:
        how = f"made ahead, {batches.threads} at a time"
    if isinstance(batches, DeviceBatches):
        how = f"made on {world.device.type}, where the data are"
    log.info("batches of %d, %d per rank: %s", batches.batch_size, per_rank, how)


def _is_on_device(
    config: Config,
    dataset: PreparedDataset,
    batches: TrainingBatches,
    world: World,
    is_logged: bool,
) -> bool:
    """Resolves ``data.on_device``, the same for all ranks. All ranks.

    Raises:
        ConfigError: it is set to true and impossible.
    """
    wanted, device = config.data.on_device, world.device.type
    if wanted is False or (wanted == "auto" and device != "cuda"):
        return False
    reason = reason_for_host(dataset, config.trainer.loss, config.trainer.accumulate_steps)
    if reason is None:
        free = torch.cuda.mem_get_info(world.device)[0] if device == "cuda" else available_bytes()
        needed = device_bytes(batches)
        limit = free if wanted is True else free * ON_DEVICE_SHARE
        # The GPUs may differ: if one lacks the memory, all leave batches to the host.
        if any(world.all_gather_object(needed > limit)):
            reason = f"batches of {_gigabytes(needed)} of data, with {_gigabytes(free)} free,"
    if reason is not None and wanted is True:
        raise ConfigError(
            f"data.on_device=true: {reason} can only be made by the host; set data.on_device=auto"
        )
    if reason is not None and world.is_first and is_logged:
        log.info("data.on_device=auto: the host makes batches: %s", reason)
    return reason is None


def loggers(config: Config, world: World, from_step: int) -> list[Logger]:
    """Metric loggers in addition to metrics.jsonl, on rank 0.

    Args:
        config: the settings.
        world: the ranks.
        from_step: the step that training continues after.

    Raises:
        ConfigError: an import path of ``run.loggers`` cannot be imported.
    """
    if not world.is_first:
        return []
    return [
        TensorBoard(config.run_dir / "tensorboard", from_step)
        if name == "tensorboard"
        else _import(name, f"run.loggers={name}", "tensorboard or package.module:function")
        for name in config.run.loggers
    ]


def shard_for_inference(
    config: Config, manifest: Manifest, world: World
) -> DistributedModelParallel:
    """Shards the model for inference, so that scores do not depend on the world size. All ranks.

    Tables of multi-valued fields are placed on one rank: with rows sharded, the order in which
    partial sums are added would depend on the world size. Look-ups of single rows are exact under
    any plan.
    """
    torch.set_float32_matmul_precision("highest")  # an earlier run here may have changed it
    task = build_model(config.model, manifest, world, config.run.seed)
    several = {f.table_name for f in manifest.categorical if f.multi_valued}
    sharding = ShardingConfig(
        kind="row_wise" if config.sharding.kind == "row_wise" else "auto",
        tables=dict.fromkeys(several, TablePlan(kind="table_wise")),
    )
    sharded, _ = shard(task, world, sharding, single_valued=manifest.single_valued)
    sharded.eval()
    return sharded


def _is_compiled(config: Config, device: torch.device, log: logging.Logger | None) -> bool:
    """Whether to compile the part above the tables: fewer kernels for the host to launch.

    Logs what ``auto`` chose on CUDA.

    Raises:
        EnvironmentProblem: the compiler that torch.compile needs is missing.
    """
    wanted, on_cuda = config.trainer.compile, device.type == "cuda"
    if on_cuda:  # Triton compiles its kernel launchers with it
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX", "g++")]
    has_compiler = any(map(shutil.which, names))
    if wanted is True and not has_compiler:
        variable, language = ("CC", "C") if on_cuda else ("CXX", "C++")
        raise EnvironmentProblem(
            f"trainer.compile=true: torch.compile needs a {language} compiler on {device.type}, "
            f"and {' or '.join(names)} is not found; install it or name another one in "
            f"{variable}, or set trainer.compile=false"
        )
    if wanted == "auto":
        ours = config.trainer.loss == "bce" and config.model.over_arch == "mlp"
        chosen = on_cuda and has_compiler and ours
        if on_cuda and log is not None:
            reason = "" if has_compiler else f", for lack of a C compiler ({' or '.join(names)})"
            log.info("trainer.compile: auto is %s%s", "on" if chosen else "off", reason)
        return chosen
    return wanted


def deepfm_of(sharded: DistributedModelParallel) -> DeepFM:
    """Unwraps the DeepFM."""
    task = sharded.module  # TorchRec removes DDP's wrapper, too
    assert isinstance(task, DeepFMTrain)
    return task.model
