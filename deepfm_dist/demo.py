"""``python -m deepfm_dist.demo``: run all commands on the bundled sample."""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from deepfm_dist.arguments import Parser, as_typed, command_line, complete
from deepfm_dist.messages import plural
from deepfm_dist.terminal import coloured


def main(argv: Sequence[str] | None = None) -> int:
    """Runs prepare, train, evaluate and recommend; stops at the first that fails.

    Returns:
        The exit code of the last command that ran.
    """
    description = "Run all commands on the bundled sample."
    parser = Parser("demo", description, ["--nproc 1 trainer.epochs=2"])
    parser.add_argument(
        "--nproc", type=_number_of_ranks, help="ranks (default: every GPU, or 2 on CPU)"
    )
    parser.add_argument("--quiet", action="store_true", help="print results and errors only")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    complete(parser)
    arguments = parser.parse_intermixed_args(argv)
    from deepfm_dist.cli import uses_setting
    from deepfm_dist.config import Config, load_config
    from deepfm_dist.typed_yaml import settings_of

    ranks = arguments.nproc or _ranks()
    torchrun = ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    alone = ["python", "-m"]
    started = time.perf_counter()
    for launcher, name in (
        (alone, "prepare"),
        (torchrun, "train"),
        (torchrun, "evaluate"),
        (torchrun, "recommend"),
    ):
        quiet = ["--quiet"] * arguments.quiet
        used = [
            override
            for override in arguments.overrides
            if any(uses_setting(name, setting) for setting in settings_of(override, Config))
        ]
        command = [*launcher, f"deepfm_dist.{name}", *quiet, *used]
        print(coloured(f"\n$ {shlex.join(command)}", "bold"), flush=True)
        code = subprocess.run(_here(command), check=False).returncode
        if code != 0:
            print(f"{name} failed: exit code {code}", file=sys.stderr)
            return code
    print(f"\nthe whole job took {time.perf_counter() - started:.0f} s on {plural(ranks, 'rank')}")
    run = load_config(None, arguments.overrides).run_dir
    print(
        f"Open {run / 'report.html'} in a browser for the results. To try the model: "
        f"{command_line('serve')} --run {run}. All commands: {as_typed('python -m deepfm_dist')}"
    )
    return 0


def _number_of_ranks(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks")


def _ranks() -> int:
    import torch

    from deepfm_dist.environment import observe

    usable = torch.cuda.is_available() and observe().variant == "cuda"
    return torch.cuda.device_count() if usable else 2


def _here(command: list[str]) -> list[str]:
    """The same command with this interpreter, whether or not its folder is on the PATH."""
    module = ["-m", "torch.distributed.run"] if command[0] == "torchrun" else []
    return [sys.executable, *module, *command[1:]]


if __name__ == "__main__":
    sys.exit(main())
