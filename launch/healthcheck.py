"""Exits with 0 if the container is healthy: a service answers; any other command runs.

Docker calls it in the container (HEALTHCHECK); Kubernetes asks /healthz itself.
"""

import sys
from pathlib import Path
from urllib.request import urlopen


def main(process: str = "/proc/1/cmdline") -> int:
    """Checks the container's main process, whose command line a file of ``/proc`` holds."""
    words = Path(process).read_text().split("\0")
    if not {"serve", "deepfm_dist.serve"} & {*words}:
        return 0
    try:
        with urlopen(f"http://127.0.0.1:{_port(words)}/healthz", timeout=4) as answer:
            return int(answer.status != 200)
    except OSError:
        return 1


def _port(words: list[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--port":
            return following
        if word.startswith("--port="):
            return word.partition("=")[2]
    return "8000"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
