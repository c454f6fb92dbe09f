"""The sections `run`, `optimizer`, `sharding` and `checkpoint`."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from deepfm_dist.section import Section
from deepfm_dist.storage import FolderName, LocalPath, PathOrUrl, WritablePathOrUrl


class RunConfig(Section):
    """The run's name, folders, seed and device."""

    name: FolderName = "default"
    """Name of the run's folder under ``runs_root``."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Random seed of splits, negatives, row order, initial weights and dropout."""
    prepared_root: WritablePathOrUrl = "prepared"
    """Folder of prepared datasets. With a URL (``s3://bucket/prepared``), each machine that uses a
    dataset keeps a copy of it under ``cache_root``."""
    cache_root: LocalPath = "prepared"
    """Local folder for copies of prepared datasets if ``prepared_root`` is a URL, and for what a
    service exports of a run if ``runs_root`` is one."""
    runs_root: WritablePathOrUrl = "runs"
    """Folder of runs: checkpoints, metrics, recommendations. With a URL (``s3://bucket/runs``),
    ``train`` and ``evaluate`` write there; the other commands then write to ``runs`` on this
    machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if torch and fbgemm both support it, otherwise the CPU."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads per process. More than one may change the last digits of results."""
    deterministic: bool = False
    """On CUDA: use only deterministic kernels, so that a resumed run is identical bit for bit;
    slower. CPU kernels are always deterministic."""
    timeout_s: float = Field(120, gt=0)
    """Seconds after which a rank that waits for a lost or hanging one gives up."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where figures of training go in addition to metrics.jsonl: tensorboard, or import paths
    ``package.module:function``; called with (event, values) on rank 0. evaluate and recommend write
    to metrics.jsonl only."""

    @property
    def process_group(self) -> tuple[str, float, int, bool]:
        """Arguments of `deepfm_dist.distributed.process_group.process_group`."""
        return self.device, self.timeout_s, self.threads, self.deterministic


class LearningRateConfig(Section):
    """A learning rate over the steps: linear warm-up, then decay."""

    chosen = frozenset(("lr", "decay_steps"))

    lr: float = Field(gt=0)
    """Learning rate after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises to lr."""
    decay: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    """Shape of the decay after warm-up."""
    decay_steps: int | None = Field(None, ge=1)
    """Steps from the end of warm-up to the end of decay; auto: to the end of training."""
    final_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of decay."""
    power: float = Field(2.0, gt=0)
    """Exponent of polynomial decay."""

    @model_validator(mode="after")
    def _decay_has_a_length(self) -> Self:
        is_planned = self.decay_steps is not None or self.is_auto("decay_steps")
        if self.decay != "constant" and not is_planned:
            raise ValueError(
                f"decay={self.decay} needs decay_steps; set a number, or auto for all epochs"
            )
        if self.decay == "constant" and (self.decay_steps is not None or self.final_lr):
            raise ValueError("decay_steps and final_lr need a decay: linear, cosine or polynomial")
        if self.decay != "polynomial" and self.power != 2.0:
            raise ValueError(f"power={self.power:g} is an exponent of decay=polynomial")
        return self

    def at(self, step: int) -> float:
        """The rate of a step, counted from 1; after the decay it stays at ``final_lr``."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        left = 1 - min((step - self.warmup_steps) / (self.decay_steps or 1), 1.0)
        match self.decay:
            case "constant":
                return self.lr
            case "linear":
                shape = left
            case "cosine":
                shape = 0.5 * (1 - math.cos(math.pi * left))
            case "polynomial":
                shape = left**self.power
        final = self.final_lr / self.lr
        return self.lr * (final + (1 - final) * shape)


class TableOptimizerConfig(LearningRateConfig):
    """Optimizer of the embedding tables."""

    chosen = frozenset(("name", "lr", "l2", "decay", "decay_steps"))

    name: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "lazy_adam"] = "rowwise_adagrad"
    """adam updates every row at every step; lazy_adam (CUDA only) only looked-up rows."""
    lr: float = Field(0.05, gt=0)
    """Learning rate after warm-up."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator (not for sgd)."""
    l2: float = Field(0.0, ge=0)
    """Adds l2 * row to a row's gradient: with adam, for every row at every step (l2 / 2 *
    norm(table)^2 in the loss); with rowwise_adagrad, on CUDA only, for looked-up rows. Refused
    otherwise."""
    max_gradient: float | None = Field(None, gt=0)
    """Maximum absolute value of each element of a row's gradient, summed over its lookups; needs
    adam."""


class DenseOptimizerConfig(LearningRateConfig):
    """Optimizer of everything but the tables."""

    name: Literal["adam", "adagrad", "sgd"] = "adam"
    """Class in torch.optim."""
    lr: float = Field(0.001, gt=0)
    """Learning rate after warm-up."""
    l2: float = Field(0.0, ge=0)
    """Adds l2 * weight to the gradient."""
    max_norm: float | None = Field(None, gt=0)
    """Maximum norm of the gradient of all parameters except the tables."""


class OptimizerConfig(Section):
    """The optimizers."""

    tables: TableOptimizerConfig = TableOptimizerConfig()
    """The embedding tables."""
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    """Bias, over-arch, numeric fields."""
    max_norm: float | None = Field(None, gt=0)
    """Maximum norm of the whole gradient, including tables and L2; needs adam on the tables (fused
    ones are updated before the norm is known)."""

    @model_validator(mode="after")
    def _norm_is_known(self) -> Self:
        if self.max_norm is not None and self.tables.name != "adam":
            raise ValueError(
                f"max_norm={self.max_norm:g}: {self.tables.name} updates tables in the backward "
                f"pass, before the norm of all gradients is known; use optimizer.tables.name=adam, "
                f"or bound the rest by optimizer.dense.max_norm"
            )
        return self


class TablePlan(Section):
    """The placement of one table."""

    kind: Literal["auto", "table_wise", "row_wise", "table_row_wise", "replicated"] = "auto"
    """Whole on one rank, split by rows over all ranks or over those of one machine (CUDA only), or
    a copy on every rank; auto: a copy if the table has no more rows than a rank looks up in a step,
    otherwise as the planner decides."""
    rank: int | None = Field(None, ge=0)
    """For table_wise: the rank that holds the table; for table_row_wise: any rank of the machine
    that does. Default: chosen by the planner."""
    cached: float | None = Field(None, gt=0, lt=1)
    """Keep the table in host memory and cache this share of its rows on the GPU; rows of the next
    batches are fetched in advance. Default: everything on the GPU. CUDA only."""

    @model_validator(mode="after")
    def _rank_has_a_table(self) -> Self:
        if self.rank is not None and self.kind not in ("table_wise", "table_row_wise"):
            raise ValueError(f"rank={self.rank} needs kind=table_wise or table_row_wise")
        if self.cached is not None and self.kind == "replicated":
            raise ValueError(f"cached={self.cached:g}: a replicated table is small; leave it out")
        return self


class ShardingConfig(Section):
    """How the tables are divided among the ranks."""

    kind: Literal["auto", "table_wise", "row_wise", "table_row_wise"] = "auto"
    """auto replicates tables with no more rows than a rank looks up in a step, and lets TorchRec's
    planner choose between the other kinds for the rest; table_row_wise, which keeps the sums of
    rows within a machine, only on CUDA and several machines."""
    group_size: int | None = Field(None, ge=2)
    """2D parallelism (TorchRec's DMPCollection): ranks of a group that shares one copy of the
    tables; it must divide the number of ranks. The groups' copies and optimizer states are averaged
    after each step, so losses depend on the number of groups. Default: one group of all ranks. CUDA
    only."""
    tables: dict[str, TablePlan] = Field(default_factory=dict)
    """Explicit placement of single tables; the others follow ``kind``."""
    communication: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of embeddings and their gradients when sent between ranks."""

    @property
    def float_bytes(self) -> int:
        """Bytes per float of an embedding when sent between ranks."""
        return 4 if self.communication == "fp32" else 2


class CheckpointConfig(Section):
    """When checkpoints are saved, and which one is read."""

    every_epochs: int = Field(0, ge=0)
    """Epochs between two checkpoints; the last step is always saved."""
    every_steps: int = Field(0, ge=0)
    """Steps between two checkpoints."""
    keep_last: int = Field(2, ge=1)
    """Number of most recent checkpoints to keep; the best one by ``trainer.monitor`` is kept as
    well."""
    resume: Literal["auto", "always", "never"] = "auto"
    """auto continues an unfinished run, leaves a finished one as it is, and refuses other settings
    and data under the same run.name; never moves the existing run to ``NAME.1`` (``NAME.2``, ...)
    and starts over; always means the same as auto. Restarted by a launcher, a run of the same
    settings and data continues from its latest checkpoint and ignores this setting and ``use``.
    """
    start_from: PathOrUrl | None = None
    """Folder of another run, or of one of its checkpoints: training starts from its weights and
    optimizer state, field by field: new fields are initialised, and fields may be left out. The ids
    of a field must be the same, or those that this run's ids extend (data.vocabulary_from): new
    rows are initialised.
    """
    start_weights_only: bool = False
    """Whether ``start_from`` takes only the weights, with a fresh optimizer state; for another
    optimizer or another task."""
    use: Literal["auto", "latest", "best", "selected", "refit"] | int = "auto"
    """The checkpoint to read: a step; latest; best by ``trainer.monitor``; selected, the best one
    with the closed-form part, or weighed against the fitted start (``model.linear``); refit,
    trained on validation rows too (``trainer.refit_best``). auto: the latest to continue training;
    otherwise refit, selected, the best one, or the latest, whichever is there first. Training that
    continues from an earlier one moves later ones aside, as ``resume`` says."""

    @model_validator(mode="after")
    def _weights_come_from_somewhere(self) -> Self:
        if self.start_weights_only and self.start_from is None:
            raise ValueError("start_weights_only needs start_from, the folder of a run")
        return self
