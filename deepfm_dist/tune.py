"""``torchrun -m deepfm_dist.tune``: trains again and again, in search of the best settings."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from deepfm_dist.cli import run
from deepfm_dist.config import Config, with_settings

log = logging.getLogger("deepfm_dist.tune")  # also where it is __main__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("tune", "Search for the settings with the best validation figure.", _tune, argv)


def _tune(config: Config, arguments: argparse.Namespace) -> None:
    from torch.distributed import PrefixStore

    from deepfm_dist.build import search_of
    from deepfm_dist.distributed.checkpoint import keep_checkpoints
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.errors import ConfigError, DeepFMError
    from deepfm_dist.report.tables import trials_table
    from deepfm_dist.storage import atomic_write, write_errors_to_user
    from deepfm_dist.train import train_on
    from deepfm_dist.training.state import NonFiniteLoss
    from deepfm_dist.training.trainer import Pruned

    folder, monitor = config.run_dir / "tune", config.monitor or ""
    shared = {"run.runs_root": str(folder), "data.name": config.prepared_dir.name}
    shared["trainer.monitor"] = monitor  # the same figure whatever loss a trial has
    with process_group(*config.run.process_group) as world:
        search = world.run_on_rank0("search", lambda: search_of(config, folder))

        def on_validation(figures: Mapping[str, float], epoch: int) -> None:
            if world.broadcast(search is not None and search.report(epoch, figures[monitor])):
                raise Pruned

        while trial := world.broadcast(search.next(config.tune.trials) if search else None):
            log.info("%s: %s", trial.name, trial.values)
            # Names that ranks use in the store in one trial must not be seen in the next.
            alone = replace(world, store=PrefixStore(trial.name, world.store))
            best = None
            try:
                tried = with_settings(config, trial.values | shared | {"run.name": trial.name})
                state, stopped = train_on(tried, alone, on_validation)
                if stopped:
                    if search is not None:
                        search.close()
                    return  # the same command resumes this trial
                outcome, best = "complete", state.best
            except Pruned:
                outcome = "pruned"
            except (NonFiniteLoss, ConfigError) as error:  # settings that do not go together, too
                log.warning("%s", error)
                outcome = "failed"
            if search is not None:
                search.over(outcome, best)
                for past in search.past():
                    if past.name == trial.name:
                        log.info("%s: %s, %s %s", past.name, outcome, monitor, past.best)
                    if past != search.best():
                        keep_checkpoints(folder / past.name, ())
        if search is not None:
            print(trials_table(search.past(), monitor))
            found = search.best()
            if elsewhere := search.n_elsewhere():
                print(f"\n{elsewhere} trials are still open in other processes")
            elif found is None:
                raise DeepFMError(f"{search.path}: no trial is complete; see its log")
            if found is not None:
                path = folder / "best.yaml"
                best_run = with_settings(config, found.values).renamed(f"{config.run.name}_best")
                with write_errors_to_user(path), atomic_write(path) as file:
                    file.write_text(best_run.to_yaml())
                print(f"\nbest: {found.name}, {monitor} {found.best:.6f}\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(main())
