"""The training objectives."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.model.pairs import PairScorer, Side

NO_NEGATIVE = -1e30
"""Logit of a candidate that is not a negative; finite, so that a user may have no negatives."""


class LabelledRows(Protocol):
    """The input of a training step on rows, such as `deepfm_dist.data.batches.batch.Batch`."""

    sparse: Any
    dense: Tensor
    labels: Tensor
    weights: Tensor
    global_weight: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on another device."""
        ...


class UsersWithTargets(Protocol):
    """What a step on users consumes; see `deepfm_dist.data.batches.batch.UserBatch`."""

    sparse: Any
    dense: Tensor
    n_users: int
    n_shared: int
    n_candidates: int
    target_users: Tensor
    target_items: Tensor
    target_weights: Tensor
    known_users: Tensor
    known_items: Tensor
    log_expected: Tensor
    global_weight: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on another device."""
        ...


class CatalogueLoss(nn.Module):
    """The loss of users' targets compared with candidates.

    Args:
        kind: softmax or bpr.
        scorer: the scorer of pairs; its weights belong to the model, not to this module.
        gather: concatenates the ranks' tensors in rank order, differentiably; default: a single
            process.
    """

    def __init__(
        self,
        kind: Literal["softmax", "bpr"],
        scorer: PairScorer,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        super().__init__()
        self.kind, self.scorer, self.gather = kind, scorer, gather

    def forward(self, sums_HFW: Tensor, divisors_HF: Tensor, batch: UsersWithTargets) -> Tensor:
        """This rank's share of the loss, ``[]``, from looked-up sums and their divisors."""
        scorer, shared = self.scorer, batch.n_shared
        own = 0 if len(batch.target_items) else len(batch.target_users)
        users, items = scorer.sides(sums_HFW, divisors_HF, batch.dense, batch.n_users, shared + own)
        # A user's constant cancels in the loss. Rounding errors would remain of its gradient, and
        # Adam, which normalises, would follow them. (It is set to 0, not removed, since optimizers
        # need a state for every parameter.)
        constant = users.constant.detach() + 0 * users.constant
        users = replace(users, constant=constant)
        everyones = (self.gather(part[:shared])[: batch.n_candidates] for part in items.tensors)
        logits_UC = scorer.all_pairs(users, Side(*everyones))
        if own:
            logits_T = scorer.pairs(users[batch.target_users], items[shared:], batch.target_users)
        else:
            logits_T = logits_UC[batch.target_users, batch.target_items]
        targets = batch.target_users, batch.target_weights
        known = batch.known_users, batch.known_items
        if self.kind == "bpr":
            total = bpr_sum(logits_T, logits_UC, *targets, known)
        else:
            total = softmax_sum(logits_T, logits_UC, *targets, known, batch.log_expected)
        return total / batch.global_weight


class DeepFMTrain(nn.Module):
    """The model with its loss, in the form that TorchRec's pipelines expect.

    Args:
        model: the DeepFM.
        target_weights: relative weights of several targets in the loss; empty for one target.

    Attributes:
        catalogue_loss: the loss on batches of users; None: cross-entropy on batches of rows.
    """

    target_weights_T: Tensor | None

    def __init__(self, model: DeepFM, target_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.model = model
        weights = torch.tensor(target_weights) if target_weights else None
        shares = None if weights is None else weights / weights.sum()
        self.register_buffer("target_weights_T", shares, persistent=False)
        self.catalogue_loss: CatalogueLoss | None = None

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Scores a batch, in training a `UsersWithTargets` where that is the loss.

        Returns:
            This rank's share of the loss, ``[]``, and logits ``[b]`` or ``[b, T]`` of rows or None
            for users. Over the ranks, shares add up to the weighted mean of the global batch, and
            over several targets to the weighted mean of theirs.
        """
        if self.training and self.catalogue_loss is not None:
            arch = self.model.embedding_arch
            sums_HFW, divisors_HF = arch.sums(batch.sparse), arch.divisors(batch.sparse)
            return self.catalogue_loss(sums_HFW, divisors_HF, batch), None
        logits = self.model(batch.sparse, batch.dense, batch.weights)
        # TorchRec's pipeline traces this: control flow cannot depend on tensors or their shapes.
        if self.target_weights_T is None:
            loss = weighted_bce_sum(logits, batch.labels, batch.weights) / batch.global_weight
        else:
            sums_T = known_bce_sums(logits, batch.labels, batch.weights)
            loss = (sums_T / batch.global_weight) @ self.target_weights_T
        return loss, logits.detach()


def softmax_sum(
    logits_T: Tensor,
    logits_UC: Tensor,
    user_T: Tensor,
    weights_T: Tensor,
    known: tuple[Tensor, Tensor],
    log_expected_C: Tensor,
) -> Tensor:
    """Sum of the targets' cross-entropies against the candidates that are not the user's own.

    Args:
        logits_T: ``[T]`` of the targets.
        logits_UC: ``[U, C]`` of the candidates.
        user_T: ``[T]`` the targets' users.
        weights_T: ``[T]``.
        known: ``[M]`` users and ``[M]`` candidates that are not negatives for them.
        log_expected_C: ``[C]`` log of the number of times a candidate was expected to be drawn;
            with it ``sum_c exp(z_c) / expected_c`` has the mean ``sum_i exp(z_i)`` over the items.

    Returns:
        ``[]``: ``sum_t w_t (log(exp(z_t) + sum_c exp(z_c) / expected_c) - z_t)``.

    Source: Bengio, Senecal, "Adaptive importance sampling to accelerate training of a neural
    probabilistic language model", 2008; Yi et al., "Sampling-bias-corrected neural modeling for
    large corpus item recommendations", 2019 (logQ).
    """
    negative = (logits_UC - log_expected_C).index_put(known, logits_UC.new_full((), NO_NEGATIVE))
    return (weights_T * softplus(torch.logsumexp(negative, 1)[user_T] - logits_T)).sum()


def bpr_sum(
    logits_T: Tensor,
    logits_UC: Tensor,
    user_T: Tensor,
    weights_T: Tensor,
    known: tuple[Tensor, Tensor],
) -> Tensor:
    """Sum of the targets' mean losses over the candidates that are not the user's own.

    Args:
        logits_T: ``[T]`` of the targets.
        logits_UC: ``[U, C]`` of the candidates.
        user_T: ``[T]`` the targets' users.
        weights_T: ``[T]``.
        known: see `softmax_sum`.

    Returns:
        ``[]``: ``sum_t w_t mean_c log(1 + exp(z_c - z_t))``; 0 for a target without a negative.

    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", 2009.
    """
    negative = torch.ones_like(logits_UC).index_put(known, logits_UC.new_zeros(()))
    share = negative / negative.sum(1, keepdim=True).clamp(min=1)
    pair_losses = softplus(logits_UC[user_T] - logits_T[:, None])
    return (weights_T[:, None] * share[user_T] * pair_losses).sum()


@torch.fx.wrap  # TorchRec's pipeline traces the code around the lookup
def weighted_bce_sum(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rows' binary cross-entropies.

    Args:
        logits: ``[B]``.
        labels: ``[B]`` in [0, 1].
        weights: ``[B]``.

    Returns:
        ``[]``: ``sum_i w_i (log(1 + exp(z_i)) - y_i z_i)``.
    """
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels, weights, reduction="sum"
    )


def known_bce_sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`weighted_bce_sum` of each target over the rows with a known label.

    Args:
        logits: ``[B, T]``.
        labels: ``[B, T]`` in [0, 1]; -1 if unknown.
        weights: ``[B]``.

    Returns:
        ``[T]``.
    """
    is_known = labels >= 0
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels.where(is_known, 0.0), weights[:, None] * is_known, reduction="none"
    )
    return losses.sum(0)
