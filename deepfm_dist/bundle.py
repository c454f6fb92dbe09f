"""The bundled configurations and sample data: in the wheel, or next to the package in a clone."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
BUNDLE = _PACKAGE / "_bundled" if (_PACKAGE / "_bundled").is_dir() else _PACKAGE.parent
"""The folder of ``configs/`` and ``data/sample/``."""


def bundled_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in (BUNDLE / "configs").glob("*.yaml"))
