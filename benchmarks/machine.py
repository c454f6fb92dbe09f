"""Describes the machine for benchmarks."""

import platform
import re
from pathlib import Path


def cpu_model() -> str:
    """The processor's name, if the system provides it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
