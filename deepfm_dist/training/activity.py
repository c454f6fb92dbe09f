"""Corrects `NegativeRate` for what a model has not yet learned about how active users are.

A converged model predicts as many positives among a user's training rows as there are. After few
steps the weights of users with few rows are still near the average, so the model's odds are too
high for the least active users. `fit_to_activity` shifts the odds by activity until they add up.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.distributed.inference import dealt_blocks, probabilities
from deepfm_dist.distributed.world import World

FloatArray = npt.NDArray[np.float64]
BLOCK_ROWS = 8192
MOST_BLOCKS, MOST_EPOCHS = 16, 4
"""Bounds of the training rows that are scored: blocks, and draws of negatives."""
MOST_KNOTS, POSITIVES_PER_KNOT = 8, 400
"""Number of groups of users by activity, and minimum positives per group (5 % standard error)."""
PRECISION = 10.0
"""1 / variance of the normal prior on each shift."""
_DIGITS = 3
"""Decimals of a shift: the last bits of scores may depend on the number of ranks."""


@torch.no_grad()
def fit_to_activity(
    rate: NegativeRate,
    dataset: PreparedDataset,
    score: Callable[[Batch], Tensor],
    world: World,
    seed: int,
) -> NegativeRate:
    """Shifts the log-odds so that predicted positives match actual ones at every level of activity.

    With the log rate x of a row's user, the scores z and labels y of training rows, positives and
    newly drawn negatives, it fits ``y ~ sigmoid(z + shift(x))``, piecewise linear in x, by
    maximum likelihood, with the rows' weights. All ranks.

    Args:
        rate: at which negatives are drawn.
        dataset: the dataset of the training rows.
        score: a batch's logits, in eval mode; collective where the model is sharded.
        world: the ranks.
        seed: the seed of the rows' order and of the negatives.
    """
    batches = TrainingBatches(dataset, BLOCK_ROWS, 0, 1, seed)
    n_blocks = min(MOST_BLOCKS, MOST_EPOCHS * batches.steps_per_epoch)
    pieces = []
    for block in dealt_blocks(n_blocks, world, "score training rows"):
        users, batch = batches.with_users(block + 1)
        assert users is not None
        logits = world.to_host(score(batch.to(world.device))).numpy()
        real = batch.weights.numpy() > 0
        if block < n_blocks:
            columns = users, logits, batch.labels.numpy(), batch.weights.numpy()
            pieces.append(tuple(column[real] for column in columns))
    gathered = world.gather_object(pieces)
    fitted = None
    if gathered is not None:
        rows = zip(*(piece for from_rank in gathered for piece in from_rank), strict=True)
        users, logits, labels, weights = map(np.concatenate, rows)
        fitted = _fit(rate.log_of_user[users], logits, labels, weights / weights.mean())
    fitted = world.broadcast(fitted)
    assert fitted is not None
    return rate.shifted(*fitted)


def _fit(
    log_rates: FloatArray,
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32],
) -> tuple[FloatArray, FloatArray]:
    """``[n]`` ascending log rates and the shift at each; arguments ``[rows]``, mean weight 1."""
    knots = _knots(log_rates, labels)
    identity = np.eye(len(knots))
    basis = np.stack([np.interp(log_rates, knots, column) for column in identity], 1)
    shifts = np.zeros(len(knots))
    for _ in range(20):
        predicted = probabilities(logits + basis @ shifts)
        gradient = basis.T @ (weights * (labels - predicted)) - PRECISION * shifts
        curvature = (basis * (weights * predicted * (1 - predicted))[:, None]).T @ basis
        step = np.linalg.solve(curvature + PRECISION * identity, gradient)
        shifts += np.clip(step, -1, 1)
        if np.abs(step).max() < 10.0 ** -(_DIGITS + 1):
            break
    return knots, shifts.round(_DIGITS)


def _knots(log_rates: FloatArray, labels: npt.NDArray[np.float32]) -> FloatArray:
    """Mean log rates of groups of users with enough positives, ascending and distinct."""
    values, place = np.unique(log_rates, return_inverse=True)
    positives = np.bincount(place, labels)
    # Users have P positives each: positives / P is the number of users, up to a factor.
    users = positives / np.exp(values - values[0])
    so_far = np.cumsum(users) / max(users.sum(), 1e-12)
    knots, begin, cut = [], 0, 0.0
    for end in range(1, len(values) + 1):
        is_last = end == len(values)
        enough = positives[begin:end].sum() >= POSITIVES_PER_KNOT
        rest = positives[end:].sum() >= POSITIVES_PER_KNOT
        if is_last or (enough and rest and so_far[end - 1] >= cut + 1 / MOST_KNOTS):
            weights = np.maximum(positives[begin:end], 1e-12)
            knots.append(float(np.average(values[begin:end], weights=weights)))
            begin, cut = end, float(so_far[end - 1])
    return np.array(knots)
