"""Reads the metrics that a run wrote, for tests that start whole commands."""

import json
from pathlib import Path
from typing import Any


def lines(home: Path) -> list[dict[str, Any]]:
    """Figures of the run, without those of the clock and of the ranks' number."""
    text = (home / "runs/sample/metrics.jsonl").read_text()
    actual = [json.loads(line) for line in text.splitlines()]
    left_out = ("seconds", "rows_per_s", "peak_memory_gib", "sent_bytes")
    return [{k: v for k, v in event.items() if k not in left_out} for event in actual]
