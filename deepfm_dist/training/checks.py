"""What can be wrong with a prepared dataset before a model is trained or measured on it."""

import logging

from deepfm_dist.data.manifest import Manifest
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural

log = logging.getLogger(__name__)
LARGE = 1000.0
"""Magnitude from which numbers that enter the model unscaled are warned about."""
_OF_BOTH_LABELS = ("auc", "user_auc", "ne")


def warn_of_labels(manifest: Manifest) -> None:
    """Warns of splits in which all labels are the same. Rank 0."""
    for split, spec in manifest.splits.items():
        label = _only_label(manifest, split)
        if label is None:
            continue
        if split == "train":
            log.warning(
                "all labels of %s are %d: the model can only learn to predict %d; check "
                "data.interactions.label and data.split",
                plural(spec.rows, "training row"),
                label,
                label,
            )
        else:
            log.warning(
                "all labels of %s are %d: auc, user_auc and ne are undefined (nan); hold out rows "
                "of both labels (data.split)",
                plural(spec.rows, f"{'validation' if split == 'valid' else split} row"),
                label,
            )


def check_monitor(monitor: str | None, manifest: Manifest) -> None:
    """Refuses a monitored figure that needs both labels where validation rows have one.

    Raises:
        ConfigError: it would be NaN at every validation.
    """
    label = _only_label(manifest, "valid")
    if label is not None and monitor in _OF_BOTH_LABELS:
        raise ConfigError(
            f"trainer.monitor={monitor}: all {manifest.splits['valid'].rows:,} validation labels "
            f"are {label}, so {monitor} is undefined; set trainer.monitor=log_loss, or hold out "
            f"rows of both labels (data.split)"
        )


def warn_of_numbers(manifest: Manifest) -> None:
    """Warns of numeric fields that enter the model unscaled and are large. Rank 0."""
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


def _only_label(manifest: Manifest, split: str) -> int | None:
    """The label that all rows of a split have; None: both occur, or there are no labelled rows."""
    spec = manifest.splits[split]
    if spec.rows == 0 or (split == "train" and manifest.sampled):
        return None
    return {0: 0, spec.rows: 1}.get(spec.positives)
