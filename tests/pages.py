"""Pages in a browser."""

from typing import Any


def watched(tab: Any, origin: str = "file:") -> list[str]:
    """What goes wrong in a tab: messages on its console, errors, requests that leave the origin."""
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(origin) else problems.append(r.url))
    return problems
