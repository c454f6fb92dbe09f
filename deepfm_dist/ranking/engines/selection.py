"""Chooses the engine: a kernel on CPU or CUDA, or torch for models that neither supports."""

import logging
from importlib.util import find_spec

import torch
from torch import nn

from deepfm_dist import vector_code
from deepfm_dist.errors import ConfigError
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.engines.numba import NumbaEngine
from deepfm_dist.ranking.engines.torch import TorchEngine
from deepfm_dist.ranking.types import Engine, Precision

log = logging.getLogger(__name__)


def engine_for(
    scorer: CatalogueScorer, device: torch.device, precision: Precision = "fp32"
) -> Engine:
    """The kernel of the device where it can be used, else torch; says which, and why.

    Args:
        scorer: the scorer of the model.
        device: where it is.
        precision: the precision of the over-arch's products on CUDA.

    Raises:
        ConfigError: a precision below ``fp32`` without a kernel that supports it.
    """
    layers = scorer.layers
    reason = None
    if layers is None:
        reason = "the over-arch cannot be split into a user's and an item's part"
    elif layers and not isinstance(scorer.activation, nn.ReLU):
        reason = f"the activation is {type(scorer.activation).__name__}, not ReLU"
    elif device.type == "cpu" and not vector_code.HAS_FMA:
        reason = "this processor has no fused multiply-add"
    elif device.type != "cpu" and find_spec("triton") is None:
        reason = "triton is not installed"
    elif device.type != "cpu":
        from deepfm_dist.ranking.engines import triton

        sizes = [weight.shape[1] for weight, _ in layers]
        reason = triton.unsupported_reason(sizes, precision)
    if precision != "fp32" and (device.type == "cpu" or reason is not None):
        raise ConfigError(
            f"recommend.precision={precision}: "
            f"{'a CPU' if device.type == 'cpu' else 'torch'} computes in fp32 here"
            f"{'' if reason is None else f' ({reason})'}; leave it out"
        )
    engine: Engine
    if reason is not None or layers is None:
        engine = TorchEngine(scorer)
        log.info("catalogue: torch, since %s", reason)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        engine = NumbaEngine(layers, threads)
        log.debug("catalogue: %s, %d thread%s", engine.name, threads, "s" * (threads > 1))
    else:
        engine = triton.TritonEngine(layers, precision, device)
        log.debug("catalogue: %s", engine.name)
    return engine
