"""``deepfm COMMAND``, or ``python -m deepfm_dist COMMAND``: the entry point of all commands."""

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfm_dist.arguments import bundled_as_text, by_script, complete
from deepfm_dist.messages import nearest
from deepfm_dist.terminal import coloured, print_error
from deepfm_dist.version import __version__

_FIRST = ("prepare", "train", "evaluate", "recommend", "similar", "predict", "serve")
"""In the order of a typical session; the others follow by name."""


def commands() -> dict[str, str]:
    """Every command with its one-line help, read from the modules without importing them."""
    lines = {}
    for path in Path(__file__).parent.glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        launched, _, line = docstring.partition("\n")[0].partition("``: ")
        if launched.endswith(f"-m deepfm_dist.{path.stem}"):
            lines[path.stem] = line.rstrip(".")
    others = sorted(lines.keys() - set(_FIRST))
    return {name: lines[name] for name in [*_FIRST, *others]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command named first, or lists the commands.

    Returns:
        The command's exit code; 2 for an unknown name.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if "_ARGCOMPLETE" in os.environ:
        _complete(known)
    if arguments and arguments[0] in known:
        return _run(arguments[0], arguments[1:])
    if arguments[:1] == ["--version"]:
        print(f"deepfm_dist {__version__}")
        return 0
    if arguments and arguments[0] not in ("-h", "--help"):
        near = nearest(arguments[0], known)
        hint = f"did you mean {near}?" if near else f"available: {', '.join(known)}"
        print_error("ConfigError", f"{arguments[0]}: unknown command; {hint}")
        return 2
    print(_overview(known))
    return 0


def _run(name: str, arguments: Sequence[str]) -> int:
    code: int = importlib.import_module(f"deepfm_dist.{name}").main(arguments)
    return code


def _complete(known: dict[str, str]) -> None:
    """Completes the name of a command, or leaves the rest of the line to the command."""
    words = os.environ.get("COMP_LINE", "").split()
    if len(words) > 1 and words[1] in known:
        os.environ["_ARGCOMPLETE"] = "2"  # index of the word to treat as the program
        _run(words[1], [])
    parser = argparse.ArgumentParser(prog="deepfm")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("command", choices=known)
    complete(parser)


def _overview(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = (f"  {coloured(name.ljust(width), 'bold')}  {line}" for name, line in known.items())
    program = "deepfm" if by_script() else "python -m deepfm_dist"
    return "\n".join(
        [
            f"deepfm_dist {__version__}",
            f"\nusage: {program} COMMAND [arguments]\n",
            *lines,
            "\nCOMMAND --help lists the options. With several ranks:",
            "  torchrun --nproc_per_node=4 -m deepfm_dist.train",
            f"\nBundled configurations, for --config:\n{bundled_as_text()}",
            "\nCompletion in bash and zsh, with pip install argcomplete:",
            '  eval "$(register-python-argcomplete deepfm)"',
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
