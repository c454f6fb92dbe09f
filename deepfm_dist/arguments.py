"""Command-line parsing: help with examples, one-line errors, completion; imports nothing heavy.

argparse takes 10 ms to import, click 35 ms; completion, which argparse lacks, is argcomplete's.
"""

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from deepfm_dist.bundle import bundled_configs
from deepfm_dist.errors import ConfigError
from deepfm_dist.terminal import print_error

EXAMPLES = (
    "",
    "--config sample run.threads=2",
    "torchrun --config mine.yaml data.root=/data",
)
"""Arguments of examples for --help; those that begin with torchrun show several ranks."""


class Parser(argparse.ArgumentParser):
    """A command's parser, with examples in its help and one-line errors.

    Args:
        name: the name of the command.
        description: one line for --help.
        examples: the examples of its arguments, for --help; as in `EXAMPLES`.
    """

    def __init__(self, name: str, description: str, examples: Sequence[str] = ()) -> None:
        super().__init__(
            prog=command_line(name),
            description=description,
            epilog="examples:\n" + "".join(_example(name, text) for text in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Prints a one-line error and exits with code 2."""
        print_error(ConfigError.__name__, f"{message}; see {self.prog} --help")
        self.exit(2)


def command_line(name: str) -> str:
    """How to run a command: ``deepfm NAME`` if the user typed that, otherwise the Python module."""
    return f"deepfm {name}" if by_script() else f"python -m deepfm_dist.{name}"


def as_typed(text: str) -> str:
    """Rewrites ``python -m deepfm_dist.NAME`` in a message to the form this user typed."""
    if not by_script():
        return text
    return re.sub(
        r"python -m deepfm_dist(\.(?=\w))?", lambda m: "deepfm " if m[1] else "deepfm", text
    )


def by_script() -> bool:
    """Whether this process was started as ``deepfm``."""
    return Path(sys.argv[0]).name == "deepfm"


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers a shell's completion request and exits; otherwise returns."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def complete_config(prefix: str, **_: object) -> list[str]:
    """Completions of ``--config``, for argcomplete."""
    from argcomplete.completers import FilesCompleter

    files = FilesCompleter(("yaml", "yml"))(prefix)
    return [*(name for name in bundled_configs() if name.startswith(prefix)), *files]


def bundled_as_text() -> str:
    """The bundled configurations' names, indented, in lines of at most 80 characters."""
    names = textwrap.fill(", ".join(bundled_configs()), 78, break_on_hyphens=False)
    return textwrap.indent(names, "  ")


def _example(name: str, arguments: str) -> str:
    """A command, indented, in lines of at most 80 characters as far as its words allow."""
    launcher, _, rest = arguments.partition(" ")
    command = f"{command_line(name)} {arguments}"
    if launcher == "torchrun":
        command = f"torchrun --nproc_per_node=4 -m deepfm_dist.{name} {rest}"
    lines = textwrap.wrap(command, 72, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(" \\\n    ".join(lines), "  ") + "\n"
