"""Starts training from a logistic regression, and blends the two at the end.

See `deepfm_dist.interop.logistic` for the start and `deepfm_dist.interop.shares` for the shares.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed.checkpoint import complete_steps, find_checkpoint, load
from deepfm_dist.distributed.sharding import DistributedModelParallel, local_shards
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.interop.combine import put_columns
from deepfm_dist.interop.logistic import Weights, fit_first_order
from deepfm_dist.interop.shares import log_loss, mean_shares
from deepfm_dist.jobs.widen import shard_to_widen
from deepfm_dist.model.deepfm import VECTOR_FACTORS, VECTOR_FIRST_ORDER
from deepfm_dist.model.over_arch import OverArch
from deepfm_dist.recipe import Choice
from deepfm_dist.training.evaluation import RowEvaluator, ScoredRows

log = logging.getLogger(__name__)
SMALLEST_SHARE = 1e-4
"""Minimum share of the pairs: factors of 0 would not move in further training."""


def check(config: Config, manifest: Manifest) -> None:
    """Refuses ``model.linear=logistic`` for data that it does not support.

    Raises:
        ConfigError: there are no labels, or no first-order weights, or the users' histories hold
            the rows' own items.
    """
    if config.model.linear != "logistic":
        return
    against = None
    if config.data.task != "ctr" or config.trainer.loss != "bce":
        against = "for rows with labels (data.task=ctr, trainer.loss=bce)"
    elif manifest.targets:
        against = f"it fits one label, and there are {len(manifest.targets)}"
    elif not config.model.first_order:
        against = "it gives first-order weights, and model.first_order is off"
    elif manifest.has_history:
        against = "not for fields of the users' histories, which hold each row's own item"
    if against:
        raise ConfigError(f"model.linear=logistic: {against}; set model.linear=none")


def is_blended(config: Config, manifest: Manifest) -> bool:
    """Whether a finished training loop is blended with its start; see `blend`.

    Not if another figure than the log loss is monitored; nor with a custom over-arch, whose input
    cannot be rescaled; nor if the start was not saved.
    """
    return (
        can_be_cross_fitted(config)
        and config.monitor == "log_loss"
        and manifest.splits["valid"].rows > 0
        and 0 in complete_steps(config.run_dir)
    )


def can_be_cross_fitted(config: Config) -> bool:
    """Whether a finished run can end with a `cross_fit`.

    Not with an over-arch of the user's own, whose input cannot be rescaled.
    """
    return config.model.linear == "logistic" and (
        not config.model.deep or config.model.over_arch == "mlp"
    )


@torch.no_grad()
def put_first_order(
    dataset: PreparedDataset, sharded: DistributedModelParallel, world: World
) -> Choice:
    """Fits the first-order weights on rank 0 and writes them into the model. All ranks.

    Returns:
        The choice of the start, with figures.
    """
    fitted = world.broadcast(world.run_on_rank0("logistic", lambda: fit_first_order(dataset)))
    assert fitted is not None
    put_weights(fitted.weights, sharded)
    choice = Choice(
        "model.linear",
        "logistic",
        f"first-order weights start at {fitted.share:.2f} of a logistic regression, whose "
        f"cross-validated log loss is {fitted.log_loss:.4f}, a constant's "
        f"{fitted.constant_log_loss:.4f}",
    )
    if world.is_first:
        deviations = ", ".join(f"{name} {value:.3g}" for name, value in fitted.deviations.items())
        log.info("%s; standard deviations: %s", choice.reason, deviations)
    return choice


@torch.no_grad()
def put_weights(weights: Weights, sharded: DistributedModelParallel) -> None:
    """Makes a regression the first-order weights of a model. All ranks."""
    above = deepfm_of(sharded).interaction_arch
    put_columns(sharded, above.embedding_dim, weights.tables)
    above.bias.fill_(weights.bias)
    if above.dense_first_order is not None:
        above.dense_first_order.copy_(weights.numbers)
    for name, of_field in weights.vectors.items():
        above.get_parameter(f"{VECTOR_FIRST_ORDER}{name}").copy_(of_field)


@dataclass(frozen=True)
class Blend:
    """The result of `blend`.

    Attributes:
        model: the blended model.
        optimizer: its optimizer.
        log_loss: of the validation rows.
        text: the shares in words, with figures.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    log_loss: float
    text: str


def blend(config: Config, dataset: PreparedDataset, world: World, best_step: int) -> Blend:
    """The start plus a share of each part that training added. All ranks.

    The parts are the FM, with the change of the first-order weights, and the over-arch; the shares
    are posterior means given the validation rows (`deepfm_dist.interop.shares`).

    Args:
        config: the settings.
        dataset: the data.
        world: the ranks.
        best_step: step of the best checkpoint of the training loop.
    """
    model, optimizer = shard_to_widen(config, dataset.manifest, world)
    model.eval()
    over_arch = deepfm_of(model).interaction_arch.over_arch
    rows = RowEvaluator(dataset, "valid")
    load(find_checkpoint(config.run_dir, 0), world, model)
    start_weights = [weights.clone() for weights in first_order_weights(model)]
    scored = [rows.scored_rows(model, world)]
    if best_step:
        load(find_checkpoint(config.run_dir, best_step), world, model)
        if isinstance(over_arch, OverArch):
            with without_output(over_arch):
                scored.append(rows.scored_rows(model, world))
        scored.append(rows.scored_rows(model, world))
    choose = partial(_shares, scored, dataset.manifest.log_odds[0])
    result = world.broadcast(world.run_on_rank0("shares", choose))
    assert result is not None
    shares, loss, text = result
    if best_step:
        _apply(model, start_weights, shares)
    return Blend(model, optimizer, loss, text)


def _shares(scored: Sequence[ScoredRows | None], log_odds: float) -> tuple[list[float], float, str]:
    """The share of each part, the log loss, and a sentence about them. Rank 0.

    Args:
        scored: the same rows scored by the start, by the start plus the FM, and by the trained
            model.
        log_odds: log-odds of the constant to compare with.
    """
    rows = [each for each in scored if each is not None]
    labels, weights = rows[0].labels, rows[0].weights
    logits = np.stack([each.logits for each in rows])
    additions = [*np.diff(logits, axis=0)]
    shares = mean_shares(logits[0], additions, labels, weights)
    blended = logits[0] + sum(s * part for s, part in zip(shares, additions, strict=True))
    constant = np.full(len(labels), log_odds)
    names = ("what the factors and first-order weights learned", "the over-arch")
    parts = zip(shares, names, strict=False)
    added = " and ".join(f"{share:.2f} of {part}" for share, part in parts)
    losses = [log_loss(each, labels, weights) for each in (blended, *logits[[0, -1]], constant)]
    text = (
        f"training adds {added or 'nothing'}: validation log loss {losses[0]:.4f}; of the start "
        f"{losses[1]:.4f}, with all of it {losses[2]:.4f}, of a constant {losses[3]:.4f}"
    )
    return shares, losses[0], text


@torch.no_grad()
def _apply(
    model: DistributedModelParallel, start_weights: Sequence[Tensor], shares: Sequence[float]
) -> None:
    """Scales the trained model back towards the start.

    The pairs are scaled via their factors, and the over-arch's input is rescaled in return. The
    start's pairs, of untrained factors, are ignored.

    Args:
        model: the trained one.
        start_weights: the result of `_first_order_weights`.
        shares: the shares of the FM and, with an over-arch, of its output.
    """
    arch = deepfm_of(model).interaction_arch
    for weights, start in zip(first_order_weights(model), start_weights, strict=True):
        weights.copy_(start + shares[0] * (weights - start))
    scale = 1.0 if arch.fm is None else max(shares[0], SMALLEST_SHARE) ** 0.5
    for *_, shard in local_shards(model):
        shard[:, : arch.embedding_dim] *= scale
    for name, parameter in arch.named_parameters():
        if name.startswith(("dense_factors", VECTOR_FACTORS)):
            parameter.mul_(scale)
    if isinstance(arch.over_arch, OverArch):
        first, output = arch.over_arch.layers[0], arch.over_arch.layers[-1]
        first.weight.div_(scale)
        output.weight.mul_(shares[1])
        output.bias.mul_(shares[1])


@contextmanager
def without_output(over_arch: OverArch) -> Iterator[None]:
    """Disables the over-arch inside the context."""
    output = over_arch.layers[-1]
    weights = [output.weight.data, output.bias.data]
    kept = [each.clone() for each in weights]
    for each in weights:
        each.zero_()
    yield
    for each, values in zip(weights, kept, strict=True):
        each.copy_(values)


def first_order_weights(model: DistributedModelParallel) -> list[Tensor]:
    """Views of this rank's first-order weights and bias, in the same order at every call."""
    arch = deepfm_of(model).interaction_arch
    weights = [shard.detach()[:, arch.embedding_dim] for *_, shard in local_shards(model)]
    names = ("bias", "dense_first_order", VECTOR_FIRST_ORDER)
    return [*weights, *(p.data for name, p in arch.named_parameters() if name.startswith(names))]
