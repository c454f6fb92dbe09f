"""The state of the training loop, which checkpoints hold."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepfm_dist.distributed.pipeline import Step
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.messages import plural
from deepfm_dist.training.settings import TrainerConfig

log = logging.getLogger(__name__)
HIGHER_IS_BETTER = ("auc", "user_auc", "accuracy")
LOWER_IS_BETTER = ("log_loss", "ne")
"""Row figures that can be monitored. All ranking figures can; higher is better for them."""


def is_lower_better(figure: str) -> bool:
    """Whether a lower figure is better; its name may begin with a target's."""
    return figure.rpartition(".")[2] in LOWER_IS_BETTER


WARN_AFTER = 2
"""Validations in a row without improvement that are unlikely to be noise."""


class NonFiniteLoss(DeepFMError):
    """The loss of several steps in a row, or of a validation, was NaN or infinite.

    Such steps change no weight.
    """


@dataclass
class LoopState:
    """What the loop has to remember: everything else is a function of the step.

    Attributes:
        step: optimizer steps taken or skipped.
        skipped: total number of skipped steps.
        skipped_in_a_row: number of skipped steps since the last good one.
        logged_step: step of the last line of training figures.
        saved_step: step of the last checkpoint.
        best: best value of the monitored figure.
        best_step: step it was measured at.
        monitor: name of the monitored figure.
        validations_since_best: validations since.
        lr_scale: factor on the learning rates, lowered at plateaus.
        lifetime: sums of `TrainingFigures`.
        before_end: best, best_step, validations_since_best and lr_scale before a validation that
            ran only because training ended; they are restored when training is resumed.
        earlier_steps: steps of earlier runs whose weights and optimizer state this run started
            from.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    logged_step: int = 0
    saved_step: int | None = None
    best: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    lr_scale: float = 1.0
    lifetime: list[float] = field(default_factory=list)
    monitor: str | None = None
    before_end: list[Any] | None = None
    earlier_steps: int = 0

    def resume(self, monitor: str | None) -> None:
        """Prepares the state of a run that ended or stopped for further training.

        Args:
            monitor: the validation figure that decides which checkpoint is best; or None.
        """
        if self.before_end is not None:
            self.best, self.best_step, self.validations_since_best, self.lr_scale = self.before_end
            self.before_end = None
        if monitor != self.monitor:
            self.best, self.best_step, self.validations_since_best = None, None, 0
            self.monitor = monitor

    def count(self, outcome: Step, max_skipped: int) -> None:
        """Counts a step.

        Raises:
            NonFiniteLoss: too many in a row were skipped.
        """
        self.step += 1
        self.skipped_in_a_row = 0 if outcome.is_finite else self.skipped_in_a_row + 1
        self.skipped += not outcome.is_finite
        if not outcome.is_finite:
            log.warning("step %d skipped: its loss is %s", self.step, outcome.loss)
        if self.skipped_in_a_row > max_skipped:
            raise self.not_finite(
                f"the loss is {outcome.loss}, as before; {plural(max_skipped, 'step')} in a row "
                f"skipped"
            )

    def not_finite(self, what: str) -> NonFiniteLoss:
        """The error to raise; it names the last checkpoint."""
        saved = "none" if self.saved_step is None else f"that of step {self.saved_step}"
        return NonFiniteLoss(
            f"step {self.step}: {what}; the last checkpoint is {saved}; lower the learning rates "
            f"(optimizer.tables.lr, optimizer.dense.lr) or look for extreme values in numeric "
            f"fields"
        )

    def is_over(self, patience: int | None, last: int) -> bool:
        """Whether the training loop is over.

        Args:
            patience: validations without a better figure that end the run.
            last: the last step.
        """
        out_of_patience = patience is not None and self.validations_since_best >= patience
        return self.step >= last or out_of_patience

    @property
    def best_state(self) -> list[Any]:
        """The part of the state that `update_best` changes."""
        return [self.best, self.best_step, self.validations_since_best, self.lr_scale]

    def check_monitored(
        self, figures: Mapping[str, float], is_required: bool, is_first: bool
    ) -> None:
        """Refuses a monitored figure that is undefined on the validation rows.

        Args:
            figures: the figures of this validation.
            is_required: whether a setting asks for it; if not, a warning is logged at the first
                validation.
            is_first: whether this is rank 0.

        Raises:
            ConfigError: it is NaN, and will stay NaN.
        """
        if self.monitor is None or self.best is not None:
            return
        text = (
            f"{figures[self.monitor]} on the validation rows, so that no checkpoint can be the best"
        )
        if is_required:
            raise ConfigError(
                f"trainer.monitor={self.monitor}: it is {text}; set trainer.monitor=log_loss"
            )
        if is_first and self.validations_since_best == 1:
            log.warning("%s is %s; the last one is used", self.monitor, text)

    def warn_if_worsening(self, figures: Mapping[str, float], per_epoch: int) -> None:
        """Warns at the second validation in a row without a better monitored figure. Rank 0.

        Args:
            figures: the figures of this validation.
            per_epoch: steps per epoch.
        """
        if self.monitor is None or self.best is None or self.validations_since_best != WARN_AFTER:
            return
        if self.best_step == 0:  # after a fitted start, improvement may take longer to show
            return
        log.warning(
            "validation %s has not improved since epoch %.4g: %.4f now, %.4f at step %s; more "
            "epochs may not help; see docs/training.md#overfitting",
            self.monitor,
            self.best_step_in_epochs(per_epoch),
            figures[self.monitor],
            self.best,
            f"{self.best_step:,}",
        )

    def summarize(self, figures: Mapping[str, float], per_epoch: int, patience: int | None) -> None:
        """Logs which checkpoint of a finished run is the best one. Rank 0.

        Args:
            figures: the figures of the last validation.
            per_epoch: steps per epoch.
            patience: validations without a better figure that end the run.
        """
        if self.monitor is None or self.best is None or self.best_step is None:
            return
        expected = patience is not None or self.validations_since_best < WARN_AFTER
        if self.best_step == 0:
            log.info(
                "no checkpoint is better on the validation rows than the fitted start: %s %.4f at "
                "the start, %.4f at the last step, %s; step 0 is used",
                self.monitor,
                self.best,
                figures[self.monitor],
                f"{self.step:,}",
            )
        elif self.best_step != self.step:
            log.log(
                logging.INFO if expected else logging.WARNING,
                "validation %s was best at step %s (epoch %.4g): %.4f; at the last step, %s, it is "
                "%.4f; the checkpoint of step %s is used; to use the last one, set "
                "checkpoint.use=latest",
                self.monitor,
                f"{self.best_step:,}",
                self.best_step_in_epochs(per_epoch),
                self.best,
                f"{self.step:,}",
                figures[self.monitor],
                f"{self.best_step:,}",
            )
        if (entropy := self._best_ne(figures)) >= 1:
            log.warning(
                "validation NE of the checkpoint of step %s is %.4f: always predicting the mean "
                "label has a lower log loss; lower the learning rates (optimizer.tables.lr, "
                "optimizer.dense.lr), or check labels and fields",
                f"{self.best_step:,}",
                entropy,
            )

    def best_step_in_epochs(self, per_epoch: int) -> float:
        """Epochs from the start to the best step."""
        assert self.best_step is not None
        return self.best_step / per_epoch

    def _best_ne(self, figures: Mapping[str, float]) -> float:
        """NE at the best step; NaN if it cannot be derived from the last validation's metrics."""
        assert self.best is not None
        if self.monitor == "ne":
            return self.best
        if self.monitor == "log_loss" and figures["log_loss"] > 0:  # both over the same entropy
            return figures["ne"] * (self.best / figures["log_loss"])
        is_of_rows = self.best_step == self.step and "@" not in (self.monitor or "")
        return figures["ne"] if is_of_rows else math.nan

    def update_best(self, figures: Mapping[str, float], trainer: TrainerConfig) -> None:
        """Compares the monitored figure with the best one so far; NaN and infinity never improve.

        Args:
            figures: the figures of this validation.
            trainer: defines what counts as an improvement and what happens without one.
        """
        if self.monitor is None:
            return
        value = figures[self.monitor]
        sign = -1 if is_lower_better(self.monitor) else 1
        gain = sign * (value - self.best) if self.best is not None else math.inf
        if math.isfinite(value) and gain > trainer.min_delta:
            self.best, self.best_step, self.validations_since_best = value, self.step, 0
        else:
            self.validations_since_best += 1
            self.lr_scale *= trainer.plateau_factor
