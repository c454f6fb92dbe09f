"""Pages in a browser."""

from typing import Any


def watched(tab: Any, origin: str = "file:") -> list[str]:
    """What goes wrong in a tab: messages on its console, errors, requests that leave the origin."""
    told: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(origin) else told.append(r.url))
    return told
