"""Terminal colours. Imports nothing else, since the doctor must run where nothing is installed."""

import os
import sys
from typing import TextIO

_CODES = {"bold": 1, "red": 31, "yellow": 33}


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text, coloured if the stream is a terminal.

    Args:
        text: the text to print.
        colour: bold, red or yellow.
        stream: where it goes; default: stdout.

    Source: https://no-color.org for the variable that switches colours off.
    """
    is_terminal = (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"
    if not is_terminal or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_CODES[colour]}m{text}\033[0m"


def print_error(kind: str, text: str) -> None:
    """Prints ``kind: text`` on stderr, with the kind in red.

    The line is one write, which ranks that share an unbuffered stderr cannot interleave.
    """
    sys.stderr.write(f"{coloured(kind, 'red', sys.stderr)}: {text}\n")
    sys.stderr.flush()
