"""What a run left behind, for tests that start whole commands."""

import json
from pathlib import Path
from typing import Any


def lines(home: Path) -> list[dict[str, Any]]:
    """Figures of the run, without those of the clock."""
    text = (home / "runs/sample/metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    clock = ("seconds", "rows_per_s", "peak_memory_gib")
    return [{k: v for k, v in event.items() if k not in clock} for event in found]
