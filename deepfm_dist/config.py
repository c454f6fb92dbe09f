"""All settings: sections with defaults, read from YAML, overridden on the command line."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import nearest, short
from deepfm_dist.section import Problem, Section, one_per_setting
from deepfm_dist.storage import (
    LocalPath,
    PathOrUrl,
    folder_of,
    is_remote,
    option_of,
    path_or_url,
    storage_errors_to_user,
)
from deepfm_dist.typed_yaml import DuplicateKeyError, Plain, kind_below, kinds_of, load, typed

PACKAGE = Path(__file__).parent
BUNDLE = PACKAGE / "_bundled" if (PACKAGE / "_bundled").is_dir() else PACKAGE.parent
"""Where ``configs/`` and ``data/sample/`` lie: in the wheel, or at the root of a clone."""


_Id = Annotated[str, Field(coerce_numbers_to_str=True)]
"""An id or a value, as files have it."""


class RunConfig(Section):
    """What the run is called and where it computes."""

    name: str = Field("default", min_length=1)
    """Name of the run's folder under ``runs_root``."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of everything drawn: splits, negatives, order, initial weights, dropout."""
    prepared_root: LocalPath = "prepared"
    """Folder of prepared datasets, on this machine."""
    runs_root: PathOrUrl = "runs"
    """Folder of runs: checkpoints, metrics, recommendations. Behind a URL (``s3://bucket/runs``) is
    what ``train`` and ``evaluate`` write; what other commands write is then in ``runs`` on this
    machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where torch and fbgemm both support it, else the CPU."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads per process. More than one may change the last digits of results."""
    deterministic: bool = False
    """On CUDA: only kernels whose result is the same bit for bit every time, which a resumed run
    needs to be that; slower. The CPU's always are."""
    timeout_s: float = Field(120, gt=0)
    """Seconds after which a rank that waits for a lost or hanging one gives up."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """What hears of metrics beside metrics.jsonl: tensorboard, or import paths
    ``package.module:function``; called with (event, values) on rank 0."""

    @property
    def process_group(self) -> tuple[str, float, int, bool]:
        """Device, time-out in seconds, threads and determinism: what `world` takes."""
        return self.device, self.timeout_s, self.threads, self.deterministic


class ModelConfig(Section):
    """The DeepFM."""

    embedding_dim: int = Field(16, ge=1)
    """Length D of each field's factor vector."""
    init_std: float = Field(0.01, ge=0)
    """Standard deviation of the tables' initial values."""
    first_order: bool = True
    """The linear part."""
    fm: bool = True
    """The pairwise part."""
    fm_pairs: Literal["all", "across"] = "all"
    """Its pairs of fields: all, as in the paper, or only those across: of a field of the item with
    one of the user or the context. The others rank nothing that the first order could not."""
    deep: bool = True
    """The over-arch. first_order alone is LR; with fm, an FM; deep alone, a DNN."""
    over_arch: str = "mlp"
    """mlp, or the import path ``package.module:Class`` of a module [B, in] -> [B]; it is called
    with in_features and over_arch_options."""
    over_arch_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of an over-arch given by import path."""
    over_arch_layer_sizes: tuple[int, ...] = (400, 400, 400)
    """Hidden layers of the MLP."""
    activation: Literal["relu", "gelu", "tanh", "sigmoid"] = "relu"
    """Activation of the MLP."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after each hidden layer."""
    batch_norm: bool = False
    """Batch norm (over the global batch) after each hidden linear layer, which then has no bias."""
    over_arch_init: Literal["uniform", "xavier_normal"] = "uniform"
    """Initial weights of the MLP: torch's default, uniform within 1 / sqrt(inputs), biases too; or
    normal with variance 2 / (inputs + outputs), biases 0."""

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if not (self.first_order or self.fm or self.deep):
            raise ValueError("first_order, fm and deep are all off: nothing is left to train")
        if any(size < 1 for size in self.over_arch_layer_sizes):
            raise ValueError(
                f"over_arch_layer_sizes must be positive: {self.over_arch_layer_sizes}"
            )
        if self.fm_pairs == "across" and not self.fm:
            raise ValueError("fm_pairs=across chooses pairs of the fm part, which is off")
        if self.over_arch == "mlp" and self.over_arch_options:
            raise ValueError("over_arch_options go with an over_arch given by import path")
        return self


class LearningRateConfig(Section):
    """A learning rate over the steps: linear warm-up, then decay."""

    lr: float = Field(gt=0)
    """Learning rate after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises to lr."""
    decay: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    """Shape of what follows."""
    decay_steps: int | None = Field(None, ge=1)
    """Steps from the end of warm-up to the end of decay; needed unless decay is constant."""
    final_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of decay."""
    power: float = Field(2.0, gt=0)
    """Exponent of polynomial decay."""

    @model_validator(mode="after")
    def _decay_has_a_length(self) -> Self:
        if self.decay != "constant" and self.decay_steps is None:
            raise ValueError(f"decay={self.decay} needs decay_steps")
        if self.decay == "constant" and (self.decay_steps is not None or self.final_lr):
            raise ValueError("decay_steps and final_lr need a decay: linear, cosine or polynomial")
        if self.decay != "polynomial" and self.power != 2.0:
            raise ValueError(f"power={self.power:g} is an exponent of decay=polynomial")
        return self


class TableOptimizerConfig(LearningRateConfig):
    """Optimizer of the embedding tables."""

    name: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "lazy_adam"] = "rowwise_adagrad"
    """adam moves every row at every step; lazy_adam (CUDA only) the looked-up ones."""
    lr: float = Field(0.05, gt=0)
    """Learning rate after warm-up."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root in the denominator (not for sgd)."""
    l2: float = Field(0.0, ge=0)
    """Adds l2 * row to a row's gradient: under adam every row's at every step (l2 / 2 * |table|^2
    in the loss); under rowwise_adagrad, on CUDA only, the looked-up rows'. Refused elsewhere."""
    max_gradient: float | None = Field(None, gt=0)
    """Bound of each element of a row's gradient, summed over the row's look-ups; needs adam."""


class DenseOptimizerConfig(LearningRateConfig):
    """Optimizer of everything but the tables."""

    name: Literal["adam", "adagrad", "sgd"] = "adam"
    """torch.optim's class."""
    lr: float = Field(0.001, gt=0)
    """Learning rate after warm-up."""
    l2: float = Field(0.0, ge=0)
    """Adds l2 * weight to the gradient."""
    max_norm: float | None = Field(None, gt=0)
    """Bound of the norm of their gradient, the tables' left out."""


class OptimizerConfig(Section):
    """Who updates what."""

    tables: TableOptimizerConfig = TableOptimizerConfig()
    """The embedding tables."""
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    """Bias, over-arch, numeric fields."""
    max_norm: float | None = Field(None, gt=0)
    """Bound of the norm of the whole gradient, that of the tables and of L2 included; needs adam on
    the tables (fused ones are updated before the norm is known)."""

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
    """Where one table lies."""

    kind: Literal["auto", "table_wise", "row_wise"] = "auto"
    """Whole on one rank, or cut by rows over all; auto: as the planner says."""
    rank: int | None = Field(None, ge=0)
    """For table_wise: the rank that holds it; default: dealt by the planner's order."""
    cached: float | None = Field(None, gt=0, lt=1)
    """Keep the table in the machine's memory, and this share of its rows in a GPU's, where those of
    the next batches are fetched before they are needed. Default: all in the GPU's; CUDA only."""

    @model_validator(mode="after")
    def _rank_has_a_table(self) -> Self:
        if self.rank is not None and self.kind != "table_wise":
            raise ValueError(f"rank={self.rank} needs kind=table_wise")
        return self


class ShardingConfig(Section):
    """How the tables are cut over the ranks."""

    kind: Literal["auto", "table_wise", "row_wise"] = "auto"
    """auto asks TorchRec's planner to choose between the other two for each table."""
    tables: dict[str, TablePlan] = Field(default_factory=dict)
    """An explicit plan for single tables; the rest follows ``kind``."""
    communication: Literal["fp32", "fp16", "bf16"] = "fp32"
    """In which embeddings and their gradients travel between ranks."""


class TrainerConfig(Section):
    """The loop."""

    loss: Literal["bce", "bpr", "softmax"] = "bce"
    """bce: cross-entropy of single rows, positives and their negatives. bpr, softmax: a batch is of
    users, and each user's targets are compared with candidate items."""
    batch_size: int = Field(8192, ge=1)
    """Rows (of bpr and softmax: users) per step over all ranks."""
    candidates: int | None = Field(None, ge=1)
    """For bpr and softmax: items drawn in each step, by ``data.negatives.popularity_power``, for
    which the softmax is corrected (logQ). Default: the whole catalogue."""
    targets_per_user: int = Field(16, ge=1)
    """With candidates: a user's targets in a step, at most."""
    epochs: int = Field(10, ge=1)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, whatever the epochs say."""
    reading_threads: int | None = Field(None, ge=0, le=1024)
    """Threads of a process that make the next batches while one trains; the batches are the same.
    Default: one for each core that the processes of the machine leave idle, at most 4; 0: none."""
    accumulate_steps: int = Field(1, ge=1)
    """Parts of a batch that are computed one after the other, to save memory; needs adam on the
    tables (fused ones are updated by every part). Batch norm sees each part alone."""
    max_skipped: int = Field(10, ge=0)
    """A step whose loss is NaN or infinite is skipped; more than so many in a row end the run."""
    log_every_steps: int = Field(50, ge=1)
    """Steps between two lines of training figures."""
    validate_every_epochs: int = Field(1, ge=0)
    """Epochs between two validations; 0: never."""
    monitor: str | None = "auto"
    """Validation figure (log_loss, auc, ndcg@10, ...) whose best checkpoint is kept and used. auto:
    log_loss; for bpr and softmax ndcg@K at the largest K of ``evaluate.k``. null: none, and the
    last checkpoint is used."""
    patience: int | None = Field(None, ge=1)
    """Validations without a better monitored figure after which training stops."""
    plateau_factor: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rates after each validation without a better figure."""
    min_delta: float = Field(0.0, ge=0)
    """By how much a figure has to be better than the best to count as better."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the over-arch's matrix products while training; tf32 on CUDA only. There is no fp16: it
    needs a scaled loss, which tables updated in the backward pass would take for the loss."""
    table_precision: Literal["fp32", "fp16"] = "fp32"
    """In which tables are kept while training (fp16: not with adam)."""
    compile: bool = False
    """Compile everything above the tables with torch.compile (on CPU it needs a C++ compiler)."""
    profile_steps: tuple[int, int] | None = None
    """First and last step whose trace torch's profiler writes to the run's folder."""

    @field_validator("monitor")
    @classmethod
    def _none_is_null(cls, monitor: str | None) -> str | None:
        return None if monitor in ("none", "None") else monitor

    @model_validator(mode="after")
    def _something_is_watched(self) -> Self:
        if self.monitor is None and self.needs_monitor:
            raise ValueError(f"{self.needs_monitor} needs a monitored figure; set monitor=auto")
        if self.loss == "bpr" and self.candidates is None:
            raise ValueError("loss=bpr compares pairs of items: say how many candidates to draw")
        if self.loss == "bce" and self.candidates is not None:
            raise ValueError("candidates go with loss=bpr or softmax; bce has data.negatives")
        if self.candidates is None and self.targets_per_user != 16:
            raise ValueError("targets_per_user needs candidates; without them all targets count")
        if self.needs_monitor and self.validate_every_epochs == 0:
            raise ValueError(f"{self.needs_monitor} needs validations; set validate_every_epochs=1")
        return self

    @property
    def needs_monitor(self) -> str | None:
        """The first setting that has no meaning without a monitored figure; None: there is none."""
        if self.monitor not in (None, "auto"):
            return f"monitor={self.monitor}"
        for name in ("patience", "plateau_factor", "min_delta"):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                return f"{name}={value:g}"
        return None

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> Self:
        first, last = self.profile_steps or (1, 1)
        if not 1 <= first <= last:
            raise ValueError(
                f"profile_steps=[{first}, {last}]: give the first, from 1, and the last"
            )
        return self


class CheckpointConfig(Section):
    """What is saved, and what is read again."""

    every_epochs: int = Field(0, ge=0)
    """Epochs between two checkpoints; there is always one of the last step."""
    every_steps: int = Field(0, ge=0)
    """Steps between two checkpoints."""
    keep_last: int = Field(2, ge=1)
    """How many are kept, the newest ones; the best one by ``trainer.monitor`` is kept as well."""
    resume: Literal["auto", "always", "never"] = "auto"
    """auto continues an unfinished run, leaves a finished one as it is, and refuses other settings
    and data under the same run.name; never moves the run that is there to ``NAME.1`` (``NAME.2``,
    ...) and begins again; always means the same as auto. Restarted by a launcher, a run of the same
    settings and data continues from its latest checkpoint, whatever is set here and in ``use``."""
    start_from: PathOrUrl | None = None
    """Folder of another run, or of one of its checkpoints: training begins with its weights and
    optimizer state, field by field: new fields start afresh, and others may be left out. The ids of
    a field must be the same, or what this run's grew from (data.vocabulary_from): new rows start
    afresh."""
    start_weights_only: bool = False
    """Whether ``start_from`` takes weights alone, and the optimizer starts afresh: for another
    optimizer, or another task."""
    use: Literal["auto", "latest", "best"] | int = "auto"
    """The checkpoint to read: a step; latest; best by ``trainer.monitor``; auto: the latest to
    continue training, otherwise the best one, or the latest if no figure was monitored. Training
    that continues from an earlier one moves later ones aside, as ``resume`` says."""

    @model_validator(mode="after")
    def _weights_come_from_somewhere(self) -> Self:
        if self.start_weights_only and self.start_from is None:
            raise ValueError("start_weights_only needs start_from, the folder of a run")
        return self


class IalsConfig(Section):
    """Weighted matrix factorisation."""

    factors: int = Field(128, ge=1)
    """Length of a user's and an item's vector."""
    l2: float = Field(0.1, ge=0)
    """Weight of their squared norms."""
    alpha: float = Field(1.0, gt=0)
    """Weight of a positive; everything else has 1."""
    iterations: int = Field(15, ge=1)
    """Passes over users and items."""


class EvaluateConfig(Section):
    """The figures on held-out rows; all but ``split`` is of rankings (``data.task=implicit``)."""

    split: Literal["valid", "test"] = "test"
    """Which rows."""
    k: tuple[int, ...] = (10,)
    """Cut-offs of the ranking metrics."""
    mask_seen: bool | None = None
    """Whether what users have met in earlier splits, liked or not, is left out of their rankings,
    and out of what counts as relevant. Default: true, but false where
    ``data.interactions.repeated`` is ``all``."""
    baselines: tuple[Literal["popularity", "item_knn", "ease", "ials"], ...] = ("popularity",)
    """Rankings to compare the model's with, fitted on the same training positives. ials needs the
    library ``implicit``. ease takes 12 bytes of memory per pair of items; without room for all
    items it is fitted on the most popular ones, and its name in the table says on how many."""
    item_knn_neighbours: int = Field(100, ge=1)
    """Items that an item votes for."""
    ease_l2: float = Field(500.0, gt=0)
    """Weight of the squared norm of EASE's matrix."""
    ials: IalsConfig = IalsConfig()
    """Settings of iALS."""
    reference: str | None = None
    """A parquet file (``user, item, score``) under ``data.root`` whose ranking is shown beside the
    model's: the sample's generator writes its true log-odds there."""

    @model_validator(mode="after")
    def _cutoffs_are_positive(self) -> Self:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k needs positive cut-offs (got {list(self.k)})")
        return self


class RecommendConfig(Section):
    """Every user's top-K items."""

    k: int = Field(10, ge=1)
    """Items per user."""
    mask: tuple[Literal["train", "valid", "test"], ...] | None = None
    """What a user has met in these splits, liked or not, is not recommended; ``[]`` allows all.
    Default: all three, but none where ``data.interactions.repeated`` is ``all``."""
    context: dict[str, _Id] = Field(default_factory=dict)
    """Values of the context fields to recommend for, as files have them."""
    users: LocalPath | tuple[_Id, ...] | None = None
    """Only these: a list of ids, or a file with a column ``user`` (csv, tsv, parquet)."""
    histories: LocalPath | None = None
    """Recommend for the users of this file instead, whom the model knows by these items alone: rows
    of ``user`` and ``item`` (csv, tsv, parquet). For models with a history field."""
    allow_items: LocalPath | tuple[_Id, ...] | None = None
    """Only these: a list of ids, or a file with a column ``item``."""
    block_items: LocalPath | tuple[_Id, ...] | None = None
    """None of these: a list of ids, or a file with a column ``item``."""
    candidates: int | None = Field(None, ge=1)
    """Score in full only this many items of each user, the best without the over-arch; it is
    measured on a sample of users what that misses and saves. Default: all items."""
    index: str | None = None
    """Kind of faiss index that finds the candidates, as its factory has it: ``IVF1024,Flat``,
    ``HNSW32``; what it misses is measured too. Default: all items are looked at."""
    probes: int = Field(16, ge=1)
    """Lists of an ``IVF`` index that are looked through for a user."""
    memory_bytes: int = Field(1 << 30, ge=1)
    """Limit in bytes of what a rank keeps of the items: of a larger catalogue a share each, and of
    one that exceeds that too a block at a time. An index comes on top."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the over-arch's products on CUDA: ``tf32`` rounds what is multiplied to 11 bits, ``bf16``
    to 8; a CPU computes in fp32."""
    matrix: Literal["int8", "fp16", "fp32"] | None = None
    """Also write score_matrix.parquet, all items' scores as a list for each user: logits as fp16 or
    fp32, or probabilities in units of 1/127 as int8; its metadata's ``item_ids`` is their order."""

    @model_validator(mode="after")
    def _users_of_one_kind(self) -> Self:
        if self.histories is not None and self.users is not None:
            raise ValueError("histories names its users itself: leave users out")
        if self.histories is not None and self.mask is not None:
            raise ValueError(
                f"mask={list(self.mask)} is of users who were there in training: leave it out, or "
                f"histories"
            )
        return self

    @model_validator(mode="after")
    def _enough_candidates(self) -> Self:
        if self.candidates is not None and self.candidates < self.k:
            raise ValueError(f"candidates={self.candidates} cannot give k={self.k} items")
        if self.index is not None and self.candidates is None:
            raise ValueError(f"index={self.index} finds candidates: set candidates=500, say")
        if self.index is None and self.probes != type(self).model_fields["probes"].default:
            raise ValueError(f"probes={self.probes} are of an index: set index=IVF1024,Flat, say")
        return self


class SimilarConfig(Section):
    """Every item's most similar items."""

    k: int = Field(10, ge=1)
    """Items per item."""
    metric: Literal["cosine", "inner_product"] = "cosine"
    """Of two items' sums of factor vectors."""


class SpanConfig(Section):
    """Numbers between two bounds; whole ones where both bounds are."""

    low: int | float
    """The lower bound."""
    high: int | float
    """The upper bound; it may be reached."""
    log: bool = False
    """Spread them evenly over orders of magnitude."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"low must be below high, and above 0 with log (got {self.low:g}, {self.high:g})"
            )
        return self


class TuneConfig(Section):
    """A search for the settings with the best ``trainer.monitor``."""

    space: dict[str, SpanConfig | tuple[Any, ...]] = Field(default_factory=dict)
    """What to vary: settings of model, optimizer and trainer by their dotted name, each with bounds
    (``{low: 0.001, high: 0.1, log: true}``) or a list of values."""
    trials: int = Field(20, ge=1)
    """Settings to try, those of earlier, unfinished searches included."""
    prune: bool = True
    """End a trial early that is worse than the median of the earlier ones at the same epoch."""

    @model_validator(mode="after")
    def _can_be_varied(self) -> Self:
        for name, values in self.space.items():
            if name.partition(".")[0] not in ("model", "optimizer", "trainer"):
                raise ValueError(
                    f"space: {name} is the same for all trials; vary model, optimizer and trainer"
                )
            if values == ():
                raise ValueError(f"space: {name} has no values to choose from")
        return self


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recommend: RecommendConfig = RecommendConfig()
    similar: SimilarConfig = SimilarConfig()
    tune: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _table_optimizer_can(self) -> Self:
        if self.trainer.table_precision == "fp16" and self.optimizer.tables.name == "adam":
            raise ValueError(
                "trainer.table_precision=fp16: adam on the tables computes in their precision, "
                "which is too little for its sums; use rowwise_adagrad"
            )
        if self.trainer.loss != "bce":
            self._check_loss_of_users()
        if self.trainer.accumulate_steps > 1 and self.optimizer.tables.name != "adam":
            raise ValueError(
                f"trainer.accumulate_steps={self.trainer.accumulate_steps}: "
                f"{self.optimizer.tables.name} updates tables in the backward pass of each part; "
                f"use optimizer.tables.name=adam"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_not_ranked(self) -> Self:
        if self.data.task == "ctr":
            for name, value in self.evaluate:
                if name != "split" and value != EvaluateConfig.model_fields[name].default:
                    told = self.evaluate.model_dump(mode="json")[name]
                    raise ValueError(
                        f"evaluate.{name}={told}: a setting of rankings, which are measured where "
                        f"rows are positives, not where they have labels (data.task=ctr); leave it "
                        f"out"
                    )
        return self

    def _check_loss_of_users(self) -> None:
        told = f"trainer.loss={self.trainer.loss}"
        if self.model.deep and self.model.over_arch != "mlp":
            raise ValueError(
                f"{told}: model.over_arch={self.model.over_arch} cannot be split into a user's and "
                f"an item's part; use mlp, or model.deep=false"
            )
        if self.model.deep and self.model.batch_norm:
            raise ValueError(f"{told}: has no rows for batch norm; set model.batch_norm=false")
        if self.trainer.compile:
            raise ValueError(
                f"{told}: trainer.compile is for the forward pass of rows; leave it out"
            )
        if self.trainer.accumulate_steps > 1:
            raise ValueError(f"{told}: accumulate_steps are for rows; use a smaller batch_size")

    @property
    def monitor(self) -> str | None:
        """The validation figure that decides which checkpoint is best; None: none does."""
        if self.trainer.monitor != "auto":
            return self.trainer.monitor
        if self.trainer.validate_every_epochs == 0:
            return None
        return "log_loss" if self.trainer.loss == "bce" else f"ndcg@{max(self.evaluate.k)}"

    @property
    def prepared_dir(self) -> Path:
        """Folder of the prepared dataset."""
        return Path(self.run.prepared_root) / (self.data.name or self.run.name)

    @property
    def run_dir(self) -> Path:
        """Folder of the run; one behind a URL has `Path`'s methods, too.

        Raises:
            ConfigError: a library for such URLs is not installed.
        """
        return folder_of(self.run.runs_root) / self.run.name

    @property
    def output_dir(self) -> Path:
        """Folder of what commands after training write: a local one, even if the run's is not."""
        if is_remote(self.run_dir):
            return Path(RunConfig().runs_root) / self.run.name
        return self.run_dir

    @property
    def data_root(self) -> Path:
        """Folder of the input files, variables filled in.

        Raises:
            ConfigError: a variable of ``data.root`` is not set.
        """
        path = Path(self._expanded_root())
        bundled = BUNDLE / path
        return bundled if not path.is_dir() and bundled.is_dir() else path

    @property
    def input_root(self) -> Path | str:
        """What the preparation reads from: `data_root`, or its URL (``s3://bucket/logs``)."""
        text = self._expanded_root()
        return text if "://" in text else self.data_root

    def _expanded_root(self) -> str:
        text = os.path.expandvars(os.path.expanduser(self.data.root))
        if "$" in text:
            raise ConfigError(
                f"data.root={self.data.root}: the variable is not set; export it, or pass "
                f"data.root=FOLDER"
            )
        return option_of("data.root", text, path_or_url)

    @property
    def data_seed(self) -> int:
        """Seed of the prepared dataset."""
        return self.run.seed if self.data.seed is None else self.data.seed

    def called(self, name: str) -> Self:
        """The settings of the run of a name."""
        return self.model_copy(update={"run": self.run.model_copy(update={"name": name})})

    def renamed(self, name: str) -> Self:
        """The settings of another run on the same prepared data."""
        data = self.data.model_copy(update={"name": self.data.name or self.run.name})
        return self.called(name).model_copy(update={"data": data})

    def with_columns(self, embedding_dim: int) -> Self:
        """The settings of the model with so many columns of factors."""
        model = self.model.model_copy(update={"embedding_dim": embedding_dim})
        return self.model_copy(update={"model": model})

    def to_yaml(self) -> str:
        """The resolved configuration, as YAML that loads back to it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: a YAML file or its URL, or the name of a bundled one (``sample``); default: the
            sample.
        overrides: ``section.field=value`` each; the value is YAML, or text as it stands where the
            setting is text.

    Raises:
        ConfigError: the file is missing or no YAML, or a field is unknown or has a bad value.
    """
    file = _find(path or "sample")
    try:
        with storage_errors_to_user(file):
            tree = load(file.read_text(encoding="utf-8")) or {}
    except DuplicateKeyError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected sections (run, data, model, ...), got {tree!r}")
    for override in overrides:
        _set(tree, *parse_override(override), repr(override))
    return config_from(typed(tree, Config), origin=str(file))


def config_from(tree: Mapping[str, Any], origin: str = "config") -> Config:
    """Checks a tree of settings and fills in the defaults.

    Raises:
        ConfigError: names each bad field, its value, and for an unknown field the nearest one.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(p) for p in one_per_setting(error.errors(), Config)]
    if len(problems) == 1:
        raise ConfigError(f"{origin}: {problems[0]}")
    lines = "".join(f"\n  {problem}" for problem in problems)
    raise ConfigError(f"{origin}: {len(problems)} problems{lines}")


def with_settings(config: Config, settings: Mapping[str, Any], origin: str = "config") -> Config:
    """The configuration with some settings changed.

    Args:
        config: stays as it is.
        settings: values by dotted name.
        origin: of the settings, for messages.

    Raises:
        ConfigError: one is unknown or has a bad value.
    """
    tree = config.model_dump(mode="json")
    for name, value in settings.items():
        _set(tree, name, value, origin)
    return config_from(tree, origin)


def settings_of(override: str) -> list[str]:
    """Names of the settings that ``section.field=value`` or ``section={field: value}`` sets."""
    name = override.partition("=")[0]
    value = None if "." in name else parse_override(override)[1]
    return [f"{name}.{field}" for field in value] if isinstance(value, dict) else [name]


def _find(path: str) -> Path:
    bundled = BUNDLE / "configs"
    for candidate in (folder_of(path), bundled / path, bundled / f"{path}.yaml", BUNDLE / path):
        with storage_errors_to_user(candidate):
            if candidate.is_file():
                return candidate
    names = sorted(p.stem for p in bundled.glob("*.yaml"))
    near = nearest(Path(path).stem, names)
    hint = f"; did you mean {near}?" if near else f"; bundled are: {', '.join(names)}"
    raise ConfigError(f"--config {path}: no such file{hint}")


def parse_override(override: str) -> tuple[str, Any]:
    """``section.field=value`` -> dotted name and value, as `typed_yaml.load` gives values.

    Raises:
        ConfigError: it is no such thing.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r}: overrides look like section.field=value")
    kinds: list[Any] = [Config]
    for part in name.split("."):
        kinds = kinds_of(kind_below(kinds, part))
    if set(kinds) <= {str, type(None)} and text.strip()[:1] not in ("'", '"'):
        return name, Plain(text.strip())
    try:
        return name, load(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{override!r}: {error}") from None
    except yaml.YAMLError as error:
        if str in kinds and text[:1] not in ("[", "{", "'", '"'):
            return name, Plain(text)  # such as %d/%m/%Y, which YAML wants in quotes
        raise ConfigError(f"{override!r}: the value is not YAML: {_one_line(error)}") from None


def _set(tree: dict[str, Any], name: str, value: Any, origin: str) -> None:
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
        below = node.setdefault(parent, {})
        if below is None:
            below = node[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{origin}: {parent} is not a section")
        node = below
    node[last] = value


def _describe(problem: Problem) -> str:
    loc = problem["loc"]
    where = ".".join(str(part) for part in loc) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown field; {_what_is_meant(loc, problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    message = re.sub(r"\btuple\b", "list", message)  # in the words of YAML
    message = re.sub(r"valid dictionary( or instance of \w+)?$", "section of fields", message)
    if problem["type"] in ("missing", "value_error"):
        return f"{where}: {message}"
    return f"{where}: {message} (got {short(problem['input'], 200)})"


def _what_is_meant(loc: tuple[_Id, ...], value: Any) -> str:
    """A hint for an unknown field: YAML's ``{a:1}``, a misspelling, a field of another section."""
    name, fields = str(loc[-1]), _fields_at(loc[:-1])
    key, colon, text = name.partition(":")
    if colon and value is None and key in fields:
        return f"YAML needs a space after the colon: write {key}: {text}"
    if near := nearest(name, fields):
        return f"did you mean {'.'.join([*map(str, loc[:-1]), near])}?"
    elsewhere = [
        f"{section}.{name}" for section in Config.model_fields if name in _fields_at([section])
    ]
    if len(loc) == 1 and elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"available: {', '.join(fields)}"


def _fields_at(loc: Sequence[str | int]) -> list[str]:
    kind: Any = Config
    for part in loc:
        if isinstance(part, int):
            continue
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return []
        if part not in kind.model_fields:
            continue
        kind = _section_of(kind.model_fields[part].annotation)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Section) else []


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text}; put the value in quotes" if "cannot start any token" in text else text
