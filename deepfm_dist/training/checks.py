"""Warnings and errors about a prepared dataset, before a model is trained or measured on it."""

import logging
from itertools import product

from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed.settings import LearningRateConfig
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural
from deepfm_dist.training.metrics import split_target

log = logging.getLogger(__name__)
LARGE = 1000.0
"""Unscaled numbers of this magnitude or more trigger a warning."""
_OF_BOTH_LABELS = ("auc", "user_auc", "ne")


def warn_of_data(manifest: Manifest) -> None:
    """All warnings about data to train on. Rank 0."""
    warn_of_numbers(manifest)
    warn_of_labels(manifest)
    warn_of_users(manifest)


def warn_of_labels(manifest: Manifest) -> None:
    """Warns about splits in which all labels are the same. Rank 0."""
    for split, target in product(manifest.splits, manifest.targets or [None]):
        label = _only_label(manifest, split, target)
        if label is None:
            continue
        rows = _rows_with(manifest, split, target)
        target_figure = "" if target is None else f"{target} "
        if split == "train":
            log.warning(
                "all %slabels of %s are %d: the model can only learn to predict %d; check "
                "data.interactions.label%s and data.split",
                target_figure,
                plural(rows, "training row"),
                label,
                label,
                "s" if target else "",
            )
        else:
            log.warning(
                "all %slabels of %s are %d: auc, user_auc%s ne are undefined (nan); hold out "
                "rows of both labels (data.split)",
                target_figure,
                plural(rows, f"{'validation' if split == 'valid' else split} row"),
                label,
                " and" if label else ", calibration and",
            )
    _warn_of_missing_labels(manifest)


def _warn_of_missing_labels(manifest: Manifest) -> None:
    """Warns if no held-out row has one of several labels."""
    for split, target in product(manifest.splits, manifest.targets):
        rows = manifest.splits[split].rows
        if rows and not _rows_with(manifest, split, target):
            log.warning(
                "%s is empty in all %s: its figures are undefined (nan), and so are those of the "
                "targets together; hold out rows that have it (data.split)",
                target,
                plural(rows, f"{'validation' if split == 'valid' else split} row"),
            )


def warn_of_users(manifest: Manifest) -> None:
    """Warns if a model that ranks knows nothing about users. Rank 0."""
    if manifest.data.task == "implicit" and all(f.entity == "item" for f in manifest.features):
        log.warning(
            "data.features: all fields are of the item, so all users get the same ranking; add "
            "{name: user, entity: user}"
        )


def check_monitor(monitor: str | None, manifest: Manifest) -> None:
    """Refuses a monitored figure that needs both labels if all validation rows have the same one.

    Raises:
        ConfigError: it would be NaN at every validation.
    """
    target, figure = split_target(monitor or "")
    for one in [target] if target or not manifest.targets else manifest.targets:
        label = _only_label(manifest, "valid", one)
        if label is not None and figure in _OF_BOTH_LABELS:
            shown = f"{_rows_with(manifest, 'valid', one):,}" + (f" {one}" if one else "")
            raise ConfigError(
                f"trainer.monitor={monitor}: all {shown} validation labels are {label}, so "
                f"{monitor} is undefined; set trainer.monitor=log_loss, or hold out rows of both "
                f"labels (data.split)"
            )


def warn_of_numbers(manifest: Manifest) -> None:
    """Warns about large numeric fields that enter the model unscaled. Rank 0."""
    for field in manifest.dense:
        spec = manifest.numeric[field.name]
        if field.transform == "none" and max(abs(spec.mean), spec.std) >= LARGE:
            log.warning(
                "data.features: the numbers of %s are large (mean %.4g, standard deviation %.4g) "
                "and not scaled, which makes training unstable; give the field transform: standard "
                "or transform: log",
                field.name,
                spec.mean,
                spec.std,
            )


def warn_of_rate_0(part: str, rate: LearningRateConfig, last_step: int) -> None:
    """Warns about a learning rate that is 0 before training ends. Rank 0.

    Such as that of a run that is continued by its own settings for more epochs.

    Args:
        part: tables or dense.
        rate: its learning rate.
        last_step: the last step that is planned.
    """
    end = rate.warmup_steps + (rate.decay_steps or last_step)
    if end < last_step and not rate.at(last_step):
        log.warning(
            "optimizer.%s: the learning rate is 0 from step %s on, and the last step is %s; set "
            "optimizer.%s.decay_steps=%d",
            part,
            f"{end:,}",
            f"{last_step:,}",
            part,
            last_step - rate.warmup_steps,
        )


def _only_label(manifest: Manifest, split: str, target: str | None = None) -> int | None:
    """The only label in a split; None if both occur or no row has a label.

    Args:
        manifest: the manifest of the data.
        split: train, valid or test.
        target: one of several.
    """
    spec, rows = manifest.splits[split], _rows_with(manifest, split, target)
    if rows == 0 or (split == "train" and manifest.sampled):
        return None
    return {0: 0, rows: 1}.get(spec.positives if target is None else spec.labels[target].positives)


def _rows_with(manifest: Manifest, split: str, target: str | None) -> int:
    """Rows of a split that have a label."""
    spec = manifest.splits[split]
    return spec.rows if target is None else spec.labels[target].rows
