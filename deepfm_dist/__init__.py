"""deepfm_dist: distributed DeepFM training and whole-catalogue recommendation on TorchRec."""

from typing import TYPE_CHECKING, Any

from deepfm_dist.version import __version__

if TYPE_CHECKING:
    from deepfm_dist.api import Model, fit

__all__ = ["Model", "__version__", "fit"]


def __getattr__(name: str) -> Any:
    """Imports the Python API, and with it torch, on first use."""
    if name in ("Model", "fit"):
        from deepfm_dist import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
