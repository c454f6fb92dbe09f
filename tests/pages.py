"""Pages in a browser."""

from typing import Any

PICTURES = {
    "learning-log_loss", "learning-ne", "learning-auc", "calibration", "recall-over-k",
    "ndcg-over-k", "by-activity", "by-popularity", "coverage", "times", "rows-by-day",
}  # fmt: skip
"""Figures of the sample's report."""


def watched(tab: Any, origin: str = "file:") -> list[str]:
    """Problems in a tab, as they occur: console messages, errors, requests beyond the origin."""
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(origin) else problems.append(r.url))
    return problems
