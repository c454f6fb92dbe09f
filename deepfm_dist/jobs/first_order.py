"""Training that starts from a logistic regression: see `deepfm_dist.interop.logistic`."""

import logging
from collections.abc import Mapping

import torch

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed.sharding import DistributedModelParallel
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.interop.combine import put_columns
from deepfm_dist.interop.logistic import fit_first_order
from deepfm_dist.model.deepfm import VECTOR_FIRST_ORDER

log = logging.getLogger(__name__)
MIN_LIKELIHOOD_GAIN = 3.0
"""By how much a trained checkpoint has to raise the log-likelihood of the validation rows over that
of the start. A checkpoint that is no better does so less than once in 100 times."""


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


def margin(config: Config, manifest: Manifest) -> float | None:
    """By how much a trained checkpoint's figure has to beat the start's; None: it is not measured.

    For the log loss: `MIN_LIKELIHOOD_GAIN` over all validation rows; for other figures, any
    improvement is enough.
    """
    n = manifest.splits["valid"].rows
    if config.model.linear != "logistic" or config.monitor is None or not n:
        return None
    return MIN_LIKELIHOOD_GAIN / n if config.monitor == "log_loss" else 0.0


@torch.no_grad()
def put_first_order(
    dataset: PreparedDataset, sharded: DistributedModelParallel, world: World
) -> None:
    """Fits the first-order weights on rank 0 and writes them into the model. All ranks."""
    fitted = world.broadcast(world.run_on_rank0("logistic", lambda: fit_first_order(dataset)))
    assert fitted is not None
    above = deepfm_of(sharded).interaction_arch
    put_columns(sharded, above.embedding_dim, fitted.tables)
    above.bias.fill_(fitted.bias)
    if above.dense_first_order is not None:
        above.dense_first_order.copy_(fitted.numbers)
    for name, weights in fitted.vectors.items():
        above.get_parameter(f"{VECTOR_FIRST_ORDER}{name}").copy_(weights)
    if world.is_first:
        log.info(
            "first-order weights start from a logistic regression; standard deviations: %s",
            _shown(fitted.deviations),
        )


def _shown(deviations: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {deviation:.3g}" for name, deviation in deviations.items())
