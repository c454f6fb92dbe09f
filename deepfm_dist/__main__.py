"""``python -m deepfm_dist``: what there is to type."""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfm_dist.messages import nearest
from deepfm_dist.terminal import coloured
from deepfm_dist.version import __version__

_FIRST = ("prepare", "train", "evaluate", "recommend", "similar", "predict", "serve")
"""In the order in which they are met; the rest follows by name."""


def commands() -> dict[str, str]:
    """Every command and its line, from the first line of its module, none of which is imported."""
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        launched, _, line = told.partition("\n")[0].partition("``: ")
        if launched.endswith(f"-m deepfm_dist.{path.stem}"):
            found[path.stem] = line.rstrip(".")
    rest = sorted(found.keys() - set(_FIRST))
    return {name: found[name] for name in [*_FIRST, *rest]}


def main(argv: Sequence[str] | None = None) -> int:
    """Lists the commands, or runs the one that is named first.

    Returns:
        The command's exit code; 2 for a name that is none.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if arguments and arguments[0] in known:
        name, *rest = arguments
        code: int = importlib.import_module(f"deepfm_dist.{name}").main(rest)
        return code
    if arguments and arguments[0] not in ("-h", "--help"):
        near = nearest(arguments[0], known)
        hint = f"did you mean {near}?" if near else f"available: {', '.join(known)}"
        print(f"ConfigError: {arguments[0]}: unknown command; {hint}", file=sys.stderr)
        return 2
    width = max(map(len, known))
    print(f"deepfm_dist {__version__}\n\nusage: python -m deepfm_dist.COMMAND [arguments]\n")
    for name, line in known.items():
        print(f"  {coloured(name.ljust(width), 'bold')}  {line}")
    print(
        "\nEach says more with --help. With several ranks:\n"
        "  torchrun --nproc_per_node=4 -m deepfm_dist.train"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
