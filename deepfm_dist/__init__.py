"""deepfm_dist: distributed DeepFM training and whole-catalogue recommendation on TorchRec."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepfm_dist.api import Model, fit

__version__ = "0.1.0"
__all__ = ["Model", "fit"]


def __getattr__(name: str) -> Any:
    """Imports the Python API, and with it torch, when it is asked for."""
    if name in __all__:
        from deepfm_dist import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
