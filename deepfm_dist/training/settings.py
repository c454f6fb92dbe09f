"""The sections `trainer`, `tune` and `nightly`."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from deepfm_dist.data.schema import check_names
from deepfm_dist.section import Section


class TrainerConfig(Section):
    """The training loop."""

    chosen = frozenset(
        (
            "loss",
            "batch_size",
            "candidates",
            "epochs",
            "validate_every_epochs",
            "patience",
            "hold_out",
            "refit_best",
        )
    )

    loss: Literal["bce", "bpr", "softmax"] = "bce"
    """bce: cross-entropy of single rows, positives and their negatives. bpr, softmax: a batch is of
    users, and each user's targets are compared with candidate items. auto: softmax where the rows
    are positives and nothing is set that belongs to single rows; else bce."""
    target_weights: dict[str, float] = Field(default_factory=dict)
    """With several targets (``data.interactions.labels``): the weight of each in the loss, which is
    the targets' weighted mean, and in figures without a target's name, such as ``log_loss``:
    ``{click: 1, buy: 2}``. Default: 1 for each."""
    batch_size: int = Field(8192, ge=1)
    """Rows (of bpr and softmax: users) per step over all ranks."""
    batch_size_per_rank: int | None = Field(None, ge=1)
    """Rows per step and rank; overrides batch_size, which becomes this times the number of ranks.
    That global size is recorded, and a run resumes only with the same one."""
    candidates: int | None = Field(None, ge=1)
    """For bpr and softmax: number of items sampled in each step, by
    `data.negatives.popularity_power`; softmax corrects for the sampling (logQ). Default: the whole
    catalogue."""
    targets_per_user: int = Field(16, ge=1)
    """With candidates: maximum number of a user's targets in a step."""
    epochs: int = Field(10, ge=1)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, even if epochs are left."""
    reading_threads: int | None = Field(None, ge=0, le=1024)
    """Threads per process that prepare the next batches during training; the batches are the same.
    Default: one for each core that the processes of the machine leave idle, at most 4; 0: none."""
    accumulate_steps: int = Field(1, ge=1)
    """Number of micro-batches per step, to save memory; needs adam on the tables (fused ones are
    updated by every micro-batch). Batch norm sees each micro-batch alone."""
    max_skipped: int = Field(10, ge=0)
    """Steps with a NaN or infinite loss are skipped; more than this many in a row end the run."""
    log_every_steps: int = Field(50, ge=1)
    """Steps between two logs of training metrics."""
    validate_every_epochs: int = Field(1, ge=0)
    """Epochs between two validations; 0: never."""
    monitor: str | None = "auto"
    """Validation figure (log_loss, auc, ndcg@10, ...) whose best checkpoint is kept and used. auto:
    log_loss; for bpr and softmax ndcg@K at the largest K of ``evaluate.k``. null: none, and the
    last checkpoint is used."""
    patience: int | None = Field(None, ge=1)
    """Number of validations without improvement after which training stops."""
    hold_out: float = Field(0.0, ge=0, lt=1)
    """Without validation rows: share of each user's training items that the training loop holds
    out, for early stopping and to choose the closed form; `refit_best` then trains on all items.
    Only for `loss: softmax` and `bpr`. auto: 0.1 without validation rows, if users have two items
    or more on average; otherwise 0."""
    refit_best: bool = False
    """Whether the model is trained once more when training is over, on training and validation
    rows, for as many epochs as the best checkpoint took. From a fitted start
    (``model.linear=logistic``) these are a DeepFM and an FM without each fifth of the rows; one
    model of their mean is used. ``recommend``, ``serve`` and evaluation of the test use it; with
    ``evaluate.validation_known=false`` and on validation rows it is not used. For losses of users,
    and for a fitted start. auto: true there, if the figure that is monitored is one of rankings or
    the log loss."""
    plateau_factor: float = Field(1.0, gt=0, le=1)
    """Factor applied to the learning rates after each validation without improvement."""
    min_delta: float = Field(0.0, ge=0)
    """Minimum change of the monitored metric that counts as an improvement."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the over-arch's matrix products in training; tf32 on CUDA only. fp16 is not
    available: it needs loss scaling, which tables updated in the backward pass do not support."""
    table_precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the tables in training (fp16: not with adam)."""
    compile: Literal["auto"] | bool = "auto"
    """Compile everything above the tables with torch.compile. auto: on CUDA with a C compiler, for
    ``loss=bce`` and an over-arch of ours; the log says so, and the first step takes a minute. true
    on a CPU needs a C++ compiler."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to record with torch's profiler; the trace goes to the run's folder."""

    def check_targets(self, labels: Sequence[str]) -> None:
        """Refuses weights of unknown targets; raises ValueError."""
        check_names("trainer.target_weights", self.target_weights, labels)

    def weights_of(self, targets: Sequence[str]) -> list[float]:
        """``target_weights`` of several targets, in order."""
        return [self.target_weights.get(target, 1.0) for target in targets]

    @field_validator("target_weights")
    @classmethod
    def _weights_are_positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for target, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"the weight of {target} must be above 0 (got {weight:g}); leave the target "
                    f"out of data.interactions.labels"
                )
        return weights

    def on_ranks(self, world_size: int) -> Self:
        """The same settings with the global batch size set and batch_size_per_rank resolved."""
        if self.batch_size_per_rank is None:
            return self
        size = self.batch_size_per_rank * world_size
        return self.model_copy(update={"batch_size": size, "batch_size_per_rank": None})

    @field_validator("monitor")
    @classmethod
    def _none_is_null(cls, monitor: str | None) -> str | None:
        return None if monitor in ("none", "None") else monitor

    @model_validator(mode="after")
    def _has_monitored_figure(self) -> Self:
        if self.monitor is None and self.needs_monitor:
            raise ValueError(f"{self.needs_monitor} needs a monitored figure; set monitor=auto")
        drawn = self.candidates is not None or self.is_auto("candidates")
        if self.loss == "bpr" and not drawn:
            raise ValueError("loss=bpr compares pairs of items: say how many candidates to draw")
        if self.loss == "bce" and self.candidates is not None and not self.is_auto("loss"):
            raise ValueError("candidates go with loss=bpr or softmax; bce has data.negatives")
        bce = self.loss == "bce" and not self.is_auto("loss")
        if (bce or not drawn) and self.targets_per_user != 16:
            raise ValueError("targets_per_user needs candidates; without them all targets count")
        if self.loss != "bce" and self.compile is True:
            raise ValueError(
                f"loss={self.loss}: compile is for the forward pass of rows; leave it out"
            )
        if self.loss != "bce" and self.accumulate_steps > 1:
            raise ValueError(
                f"loss={self.loss}: accumulate_steps are for rows; use a smaller batch_size"
            )
        if self.needs_monitor and self.validate_every_epochs == 0:
            raise ValueError(f"{self.needs_monitor} needs validations; set validate_every_epochs=1")
        return self

    @property
    def needs_monitor(self) -> str | None:
        """The first setting that requires a monitored figure; None if there is none."""
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

    def last_step(self, steps_per_epoch: int) -> int:
        """The last step, unless training ends earlier."""
        steps = self.epochs * steps_per_epoch
        return min(steps, self.max_steps or steps)

    def for_steps(self, steps: int, steps_per_epoch: int) -> Self:
        """The same settings for a training of a fixed number of steps, without validations."""
        settings = {
            "max_steps": steps,
            "epochs": math.ceil(steps / steps_per_epoch),
            "monitor": None,
            "patience": None,
            "plateau_factor": 1.0,
            "min_delta": 0.0,
        }
        return self.model_copy(update=settings)


class SpanConfig(Section):
    """A range of numbers; integers if both bounds are."""

    low: int | float
    """Lower bound."""
    high: int | float
    """Upper bound, inclusive."""
    log: bool = False
    """Sample on a logarithmic scale."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"low must be below high, and above 0 with log (got {self.low:g}, {self.high:g})"
            )
        return self


class NightlyConfig(Section):
    """When a night's model replaces the one in use, and how many nights to keep."""

    metric: str | None = None
    """Metric on the day's held-out rows that decides. Default: NDCG at the largest ``evaluate.k``,
    or ``log_loss`` if rows have labels."""
    tolerance: float = Field(0.01, ge=0)
    """How much worse the new model may be, as a share of the metric of the model in use."""
    keep_days: int = Field(7, ge=1)
    """Number of nights whose runs and datasets are kept. The model in use and its predecessor are
    kept in any case."""


class TuneConfig(Section):
    """A search for the settings with the best ``trainer.monitor``."""

    space: dict[str, SpanConfig | tuple[Any, ...]] = Field(default_factory=dict)
    """Search space: settings of model, optimizer and trainer by their dotted name, each with bounds
    (`{low: 0.001, high: 0.1, log: true}`) or a list of values."""
    trials: int = Field(20, ge=1)
    """Total number of trials, including those of earlier, unfinished searches."""
    prune: bool = True
    """End a trial early if it is worse than the median of earlier trials at the same epoch."""

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
