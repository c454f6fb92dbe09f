"""Fits first-order weights by logistic regression with one prior per field.

With few labelled rows, training takes too few steps for first-order weights to converge. A logistic
regression converges in seconds, and its regularisation needs no tuning: the variance of each
field's weights is estimated from the training rows. A field without influence then gets weights
near 0, and so does an item id that adds nothing to its attributes. With few positives, such
estimates may be off; cross-validation decides how much of the regression to use instead of a
constant.

Source: MacKay, "Bayesian Interpolation", 1992, for the estimate; Breslow and Clayton, "Approximate
Inference in Generalized Linear Mixed Models", 1993, for its use where labels are binary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.interop.shares import log_loss, mean_shares
from deepfm_dist.model.deepfm import POWERS

Float64Array = npt.NDArray[np.float64]
PRECISIONS = (0.01, 1e6)
"""Bounds of a prior's precision: weights of 10 in either direction; none."""
_START = 10.0
_OF_BIAS = 1e-6
_ROUNDS, _UNCHANGED = 40, 0.05
"""Maximum number of Newton steps, and the relative change of all precisions at convergence."""
_SOLVER_STEPS, _SOLVED = 50, 1e-6
"""Maximum number of conjugate gradient steps in each, and the relative residual at convergence."""
_SMALLEST_STEP = 1e-4
FOLDS = 5
"""Number of folds of a cross-validation."""


@dataclass(frozen=True)
class VectorInputs:
    """The columns of a ``[B, W]`` matrix that are the vectors of the rows' users or items.

    Attributes:
        first: column of the first number.
        which: ``[B]`` int: row of ``vectors`` for each row.
        vectors: ``[n, dim]`` float64.
    """

    first: int
    which: npt.NDArray[np.integer]
    vectors: Float64Array

    @property
    def columns(self) -> slice:
        """Columns of the matrix."""
        return slice(self.first, self.first + self.vectors.shape[1])


@dataclass(frozen=True)
class Inputs:
    """A ``[B, W]`` matrix: rows by first-order weights.

    Stored as non-zero elements, except for vectors, which are shared by all rows of a user or item.

    Attributes:
        rows: ``[N]`` int64.
        columns: ``[N]`` int64.
        values: ``[N]`` float64.
        groups: ``[W]`` int64: weights with one prior; the last one is the bias.
        n_rows: B.
        vectors: further columns.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    values: Float64Array
    groups: npt.NDArray[np.int64]
    n_rows: int
    vectors: tuple[VectorInputs, ...] = ()

    def logits(self, weights_W: Float64Array) -> Float64Array:
        """``[B]`` sums of the weights of each row."""
        terms = self.values * weights_W[self.columns]
        total = np.bincount(self.rows, terms, self.n_rows).astype(np.float64, copy=False)
        for block in self.vectors:
            total += (block.vectors @ weights_W[block.columns])[block.which]
        return total

    def sums(self, amounts_B: Float64Array, squared: bool = False) -> Float64Array:
        """``[W]`` sums over the rows of ``amounts_B`` times each input, or times its square."""
        values = self.values**2 if squared else self.values
        terms = values * amounts_B[self.rows]
        totals = np.bincount(self.columns, terms, len(self.groups)).astype(np.float64, copy=False)
        for block in self.vectors:
            by_vector = np.bincount(block.which, amounts_B, len(block.vectors))
            vectors = block.vectors**2 if squared else block.vectors
            totals[block.columns] += by_vector @ vectors
        return totals


@dataclass(frozen=True)
class Weights:
    """First-order weights.

    Attributes:
        tables: ``[rows, 1]`` float32 by table.
        numbers: ``[n_dense]`` float32.
        vectors: ``[dim]`` float32 by vector field.
        bias: log-odds of a row whose other terms are 0.
    """

    tables: Mapping[str, Tensor]
    numbers: Tensor
    vectors: Mapping[str, Tensor]
    bias: float


@dataclass(frozen=True)
class FirstOrder:
    """A regression fitted to the training rows.

    Attributes:
        weights: the weights.
        share: the share of the regression in the log-odds; the rest is a constant.
        log_loss: cross-validated on the training rows, of the full regression.
        constant_log_loss: the same for the constant.
        deviations: standard deviation of the weights of each table, of the numeric fields and of
            each vector field, before they are multiplied by ``share``.
    """

    weights: Weights
    share: float
    log_loss: float
    constant_log_loss: float
    deviations: Mapping[str, float]


@dataclass(frozen=True)
class CrossFit:
    """Regressions of which each does not know the rows of one fold.

    Attributes:
        weights: the weights of the regression without fold k.
        constants: ``[K]`` log-odds of a positive in the rows that each knows.
        held_out: ``[B]`` log-odds of each row by the regression that does not know it.
    """

    weights: Sequence[Weights]
    constants: Float64Array
    held_out: Float64Array


def fit_first_order(dataset: PreparedDataset) -> FirstOrder:
    """Fits the first-order weights to the training rows, which must fit into memory.

    Tables that several fields share have one weight per row, and one prior.
    """
    columns = _Columns(dataset)
    inputs, labels, row_weights = columns.of(dataset.rows("train"))
    weights, precisions = fit(inputs, labels, row_weights)
    held_out, constants = cross_validate(inputs, labels, row_weights, weights, precisions)
    weights, share = _with_constant(weights, held_out, constants, labels, row_weights)
    return FirstOrder(
        columns.weights(weights),
        share=share,
        log_loss=log_loss(held_out, labels, row_weights),
        constant_log_loss=log_loss(constants, labels, row_weights),
        deviations=columns.deviations(precisions),
    )


def fit_folds(dataset: PreparedDataset, rows: Rows, fold_of: npt.NDArray[np.integer]) -> CrossFit:
    """Fits the first-order weights once for each fold, to the rows of the others.

    The priors are estimated from all rows.

    Args:
        dataset: the data.
        rows: with labels.
        fold_of: ``[B]`` the fold of each, from 0 on.
    """
    columns = _Columns(dataset)
    inputs, labels, row_weights = columns.of(rows)
    weights, precisions = fit(inputs, labels, row_weights)
    fitted, constants = cross_fit(inputs, labels, row_weights, weights, precisions, fold_of)
    held_out = _out_of_fold(inputs, fitted, fold_of)
    return CrossFit([columns.weights(each) for each in fitted], constants, held_out)


def folds(n_rows: int) -> npt.NDArray[np.int64]:
    """``[n_rows]`` from 0 to ``FOLDS`` - 1: which fold each row belongs to, the same every time."""
    return np.random.default_rng(0).permutation(n_rows) % FOLDS


class _Columns:
    """Which columns of `Inputs` are the weights of which table, numeric or vector field.

    Args:
        dataset: the data.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        manifest = dataset.manifest
        self._dataset, self._names = dataset, [*manifest.tables]
        self._vectors, self._n_dense = manifest.vectors, len(manifest.dense)
        self._offsets = np.r_[0, np.cumsum([manifest.tables[name].rows for name in self._names])]
        n_rows = np.diff(self._offsets)
        self._sizes = [*n_rows, self._n_dense, *self._vectors.values(), 1]

    def of(self, rows: Rows) -> tuple[Inputs, Float64Array, Float64Array]:
        """The matrix of some rows, their labels and their weights, ``[B]`` each."""
        dataset, offsets, n, n_dense = self._dataset, self._offsets, rows.n, self._n_dense
        assert rows.labels is not None
        batch = Collator(dataset)(rows.users, rows.items, rows.context, np.arange(n))
        first_of = dict(zip(self._names, offsets, strict=False))
        places, columns, values = [], [], []
        for one in dataset.manifest.categorical:
            bags = batch.sparse[one.name]
            lengths = bags.lengths().numpy()
            power = POWERS[one.pooling] if one.multi_valued else 0.0
            places.append(np.repeat(np.arange(n), lengths))
            columns.append(first_of[one.table_name] + bags.values().numpy().astype(np.int64))
            values.append(np.repeat(np.maximum(lengths, 1) ** -power, lengths))
        places.append(np.repeat(np.arange(n), n_dense + 1))
        bias = sum(self._sizes) - 1
        columns.append(np.tile(np.r_[offsets[-1] + np.arange(n_dense), bias], n))
        numbers = np.c_[batch.dense[:, :n_dense].numpy().astype(np.float64), np.ones(n)]
        values.append(numbers.ravel())
        inputs = Inputs(
            rows=np.concatenate(places),
            columns=np.concatenate(columns),
            values=np.concatenate(values),
            groups=np.repeat(np.arange(len(self._sizes)), self._sizes),
            n_rows=n,
            vectors=_vector_inputs(dataset, rows, int(offsets[-1]) + n_dense),
        )
        row_weights = np.ones(n) if rows.weights is None else rows.weights.astype(np.float64)
        return inputs, rows.labels.astype(np.float64), row_weights

    def weights(self, weights_W: Float64Array) -> Weights:
        """By table and field."""
        pieces = np.split(weights_W.astype(np.float32), np.cumsum(self._sizes)[:-1])
        tensors = [torch.from_numpy(piece) for piece in pieces]
        n_tables = len(self._names)
        return Weights(
            {name: t[:, None] for name, t in zip(self._names, tensors, strict=False)},
            tensors[n_tables],
            dict(zip(self._vectors, tensors[n_tables + 1 : -1], strict=True)),
            bias=float(weights_W[-1]),
        )

    def deviations(self, precisions_G: Float64Array) -> dict[str, float]:
        """Standard deviations of the priors, by table and field; without the bias."""
        names = [*self._names, "numbers", *self._vectors]
        deviations = zip(names, precisions_G.tolist(), strict=False)
        return {k: p**-0.5 for k, p in deviations if k != "numbers" or self._n_dense}


def _vector_inputs(dataset: PreparedDataset, train: Rows, first: int) -> tuple[VectorInputs, ...]:
    """The vector fields of some rows, from column ``first`` on."""
    blocks = []
    for feature in dataset.manifest.vector_fields:
        vectors = dataset.entity_fields[feature.name]
        which = train.users if feature.entity == "user" else train.items
        assert isinstance(vectors, np.ndarray) and which is not None
        known, places = np.unique(which, return_inverse=True)
        blocks.append(VectorInputs(first, places, vectors[known].astype(np.float64)))
        first += vectors.shape[1]
    return tuple(blocks)


def fit(
    inputs: Inputs, labels: Float64Array, row_weights: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Fits a logistic regression and the precisions of its priors.

    A group's precision is the geometric mean of its own estimate and that of all groups
    together: estimates from few rows or rare labels can be off by large factors.

    Args:
        inputs: the inputs of the rows.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``.

    Returns:
        ``[W]`` weights and ``[G]`` precisions; if all labels are equal, only the bias.
    """
    n_groups = int(inputs.groups[-1]) + 1
    weights = np.zeros(len(inputs.groups))
    weights[-1] = _log_odds(labels, row_weights)
    if not 0 < row_weights @ labels < row_weights.sum():
        return weights, np.full(n_groups, PRECISIONS[1])
    own_groups, one_group = inputs.groups, (inputs.groups == n_groups - 1).astype(np.int64)
    estimates = []
    for groups in (one_group, own_groups):
        start = np.full(len(groups), _START)
        start[-1] = _OF_BIAS
        weights, precisions = _newton(inputs, labels, row_weights, weights, start, groups)
        estimates.append(precisions)
    precisions = np.sqrt(estimates[0] * estimates[1])
    weights, _ = _newton(inputs, labels, row_weights, weights, precisions, None)
    first = np.searchsorted(own_groups, np.arange(n_groups))  # groups are sorted
    return weights, precisions[np.minimum(first, len(precisions) - 1)]


def cross_validate(
    inputs: Inputs,
    labels: Float64Array,
    row_weights: Float64Array,
    weights: Float64Array,
    precisions: Float64Array,
) -> tuple[Float64Array, Float64Array]:
    """Out-of-fold log-odds of each row by the regression and by a constant.

    Args:
        inputs: the inputs of the rows.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``.
        weights: ``[W]`` of the regression on all rows, from which each fit starts.
        precisions: ``[G]`` of its priors, which are fixed.

    Returns:
        ``[B]`` by the regression and ``[B]`` by the constant.
    """
    fold_of = folds(inputs.n_rows)
    fitted, constants = cross_fit(inputs, labels, row_weights, weights, precisions, fold_of)
    return _out_of_fold(inputs, fitted, fold_of), constants[fold_of]


def cross_fit(
    inputs: Inputs,
    labels: Float64Array,
    row_weights: Float64Array,
    weights: Float64Array,
    precisions: Float64Array,
    fold_of: npt.NDArray[np.integer],
) -> tuple[Float64Array, Float64Array]:
    """A regression and a constant for each fold, fitted to the rows of the other folds.

    Args:
        inputs: the inputs of the rows.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``.
        weights: ``[W]`` of the regression on all rows, from which each fit starts.
        precisions: ``[G]`` of its priors, which stay.
        fold_of: ``[B]`` the fold of each row, from 0 on.

    Returns:
        ``[K, W]`` weights and ``[K]`` constants; where the labels of the others are all the same,
        the weights are the constant.
    """
    fitted, constants = [], []
    for fold in range(int(fold_of.max()) + 1):
        others = row_weights * (fold_of != fold)
        constants.append(_log_odds(labels, others))
        of_fold = np.zeros(len(weights))
        of_fold[-1] = constants[-1]
        if 0 < others @ labels < others.sum():
            of_fold, _ = _newton(inputs, labels, others, weights, precisions[inputs.groups], None)
        fitted.append(of_fold)
    return np.array(fitted), np.array(constants)


def _out_of_fold(
    inputs: Inputs, fitted: Float64Array, fold_of: npt.NDArray[np.integer]
) -> Float64Array:
    """``[B]`` log-odds of each row by the weights, of ``[K, W]``, that do not know it."""
    held_out = np.zeros(inputs.n_rows)
    for fold, weights in enumerate(fitted):
        held_out[fold_of == fold] = inputs.logits(weights)[fold_of == fold]
    return held_out


def _with_constant(
    weights: Float64Array,
    held_out: Float64Array,
    constants: Float64Array,
    labels: Float64Array,
    row_weights: Float64Array,
) -> tuple[Float64Array, float]:
    """Mixes a regression with a constant, by the share that the rows support.

    Args:
        weights: ``[W]`` of the regression.
        held_out: from `cross_validate`.
        constants: from `cross_validate`.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``.

    Returns:
        ``[W]`` weights of the mixture, and the share.
    """
    [share] = mean_shares(constants, [held_out - constants], labels, row_weights)
    both = share * weights
    both[-1] += (1 - share) * _log_odds(labels, row_weights)
    return both, share


def _log_odds(labels: Float64Array, row_weights: Float64Array) -> float:
    """Log-odds of a positive, with half a row of each label added."""
    positive, total = float(row_weights @ labels), float(row_weights.sum())
    return math.log((positive + 0.5) / (total - positive + 0.5))


def _newton(
    inputs: Inputs,
    labels: Float64Array,
    row_weights: Float64Array,
    weights: Float64Array,
    precisions: Float64Array,
    groups: npt.NDArray[np.int64] | None,
) -> tuple[Float64Array, Float64Array]:
    """Maximises the posterior; with groups, also estimates their precisions.

    Returns:
        ``[W]`` weights and ``[W]`` precisions.
    """
    logits = inputs.logits(weights)
    for _ in range(_ROUNDS):
        predicted = _sigmoid(logits)
        curvature = row_weights * predicted * (1 - predicted)
        gradient = inputs.sums(row_weights * (labels - predicted)) - precisions * weights
        diagonal = inputs.sums(curvature, squared=True) + precisions
        step = _solve(inputs, curvature, precisions, gradient, diagonal)
        if float(step @ gradient) < 1e-8 * inputs.n_rows and groups is None:
            break
        change, size = inputs.logits(step), 1.0
        before = _objective(logits, labels, row_weights, weights, precisions)
        while size > _SMALLEST_STEP and before < _objective(
            logits + size * change, labels, row_weights, weights + size * step, precisions
        ):
            size /= 2
        weights, logits = weights + size * step, logits + size * change
        if groups is not None:
            # How well the rows determine each weight, from 0 to 1, divided by the weights' squares.
            known = np.bincount(groups, 1 - precisions / diagonal)
            squares = np.maximum(np.bincount(groups, weights**2), 1e-12)
            estimated = np.clip(known / squares, *PRECISIONS)[groups]
            estimated[-1] = _OF_BIAS
            moved = float(np.abs(np.log(estimated / precisions)).max())
            precisions = estimated
            if moved < _UNCHANGED:
                break
    return weights, precisions


def _solve(
    inputs: Inputs,
    curvature: Float64Array,
    precisions: Float64Array,
    gradient: Float64Array,
    diagonal: Float64Array,
) -> Float64Array:
    """``[W]`` the Newton step, by conjugate gradients scaled by the Hessian's ``diagonal``."""
    step, residual = np.zeros_like(gradient), gradient.copy()
    scaled = residual / diagonal
    direction, left = scaled.copy(), float(residual @ scaled)
    enough = _SOLVED * left
    for _ in range(_SOLVER_STEPS):
        if left <= enough or not left:
            break
        product = inputs.sums(curvature * inputs.logits(direction)) + precisions * direction
        size = left / float(direction @ product)
        step += size * direction
        residual -= size * product
        scaled = residual / diagonal
        left, before = float(residual @ scaled), left
        direction = scaled + left / before * direction
    return step


def _objective(
    logits: Float64Array,
    labels: Float64Array,
    row_weights: Float64Array,
    weights: Float64Array,
    precisions: Float64Array,
) -> float:
    losses = np.logaddexp(0, logits) - labels * logits
    return float(row_weights @ losses + 0.5 * precisions @ weights**2)


def _sigmoid(logits: Float64Array) -> Float64Array:
    return 1 / (1 + np.exp(-np.clip(logits, -40, 40)))
