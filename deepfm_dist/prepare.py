"""``torchrun -m deepfm_dist.prepare``: input files -> a prepared dataset."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.launcher import read_launch

_DAY_S = 24 * 3600.0
"""How long a rank waits for another that reads larger files; torchrun notices dead ones."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("prepare", "Turn input files into a prepared dataset.", _prepare, argv)


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.data.crew import Crew
    from deepfm_dist.data.encode import prepare
    from deepfm_dist.data.manifest import Manifest
    from deepfm_dist.training.checks import warn_of_labels

    def replacing(old: Manifest, new: Manifest) -> Path | None:
        from deepfm_dist.runs import before_replacing, run_lock  # torch: slow to import

        with run_lock(config):
            return before_replacing(config, old, new)

    given = config.data, config.input_root, config.prepared_dir, config.data_seed
    if read_launch().world_size == 1:
        # Without torch.distributed, which takes longer to load than many datasets.
        warn_of_labels(prepare(*given, before_replacing=replacing))
        return
    import torch

    from deepfm_dist.distributed.process_group import process_group

    with process_group("cpu", _DAY_S, config.run.threads) as world:

        def total(array: Any) -> Any:
            return world.sum(torch.from_numpy(array.copy())).numpy()

        crew = Crew(world.rank, world.world_size, world.all_gather_object, total)
        manifest = prepare(*given, crew, replacing)
        if world.is_first:
            warn_of_labels(manifest)


if __name__ == "__main__":
    sys.exit(main())
