"""Searches for the settings with the best validation figure."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore

from deepfm_dist.config import Config, with_settings
from deepfm_dist.distributed.checkpoint import (
    REFIT,
    SELECTED,
    complete_steps,
    keep_checkpoints,
    read_checkpoint,
)
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.jobs.train import Trained, train_on
from deepfm_dist.storage import atomic_write, is_remote, write_errors_to_user
from deepfm_dist.training.search import Search, Trial
from deepfm_dist.training.state import NonFiniteLoss, is_lower_better
from deepfm_dist.training.trainer import Pruned

log = logging.getLogger(__name__)
OF_PARTS = "log_loss"
"""The figure that is measured of the parts of a click model's run."""
WAIT_S = 2.0
"""Seconds between checks for trials whose process is lost."""


@dataclass(frozen=True)
class SearchResult:
    """The state of a search.

    Attributes:
        study: its file.
        monitor: the figure to compare trials by.
        trials: finished trials.
        best: the best complete trial, or None if no trial is complete.
        best_config: its configuration file.
        n_open: number of trials open in other processes.
    """

    study: Path
    monitor: str
    trials: list[Trial]
    best: Trial | None
    best_config: Path | None
    n_open: int


def tune(config: Config, wait: bool = False) -> SearchResult | None:
    """Trains trials, and writes the best one's settings. All ranks.

    Args:
        config: the settings.
        wait: whether to wait for trials open in other processes, and to take over those whose
            process is lost.

    Returns:
        The search on rank 0; None elsewhere, or if a signal stopped it: rerun the same command to
        resume.

    Raises:
        ConfigError: there is nothing to search, or the study is of another search.
    """
    check_search(config)
    with process_group(*config.run.process_group) as world:
        search = world.run_on_rank0("search", lambda: _open_search(config))
        while trial := world.broadcast(_next(search, config, wait) if search else None):
            log.info("%s: %s", trial.name, trial.values)
            outcome, best = _run_trial(config, trial, search, world)
            if outcome == "stopped":
                if search is not None:
                    search.close()
                return None
            if search is not None:
                search.over(outcome, best)
                _keep_best(config, search, trial, outcome)
        return None if search is None else _result(config, search)


def search_result(config: Config) -> SearchResult:
    """The result of a search so far; writes the best trial's settings.

    Raises:
        ConfigError: the study is of another search.
    """
    return _result(config, _open_search(config))


def search_folder(config: Config) -> Path:
    """Folder of the study and its trials' runs."""
    return config.run_dir / "tune"


def _next(search: Search, config: Config, wait: bool) -> Trial | None:
    """The next trial. Rank 0."""
    while (trial := search.next(config.tune.trials)) is None and wait and search.n_elsewhere():
        time.sleep(WAIT_S)
    return trial


def _run_trial(
    config: Config, trial: Trial, search: Search | None, world: World
) -> tuple[str, float | None]:
    """Trains with a trial's settings. All ranks.

    Returns:
        ``complete``, ``pruned``, ``failed`` or ``stopped``, and, on rank 0, the figure of a
        complete one.
    """
    monitor = config.monitor or ""
    shared: dict[str, Any] = {
        "run.runs_root": str(search_folder(config)),
        "run.name": trial.name,
        "data.name": config.data.name or config.run.name,
        "trainer.monitor": monitor,  # the same metric for all trials, even if their losses differ
    }
    if config.data.task == "implicit":  # a trial ends after its comparison
        shared |= {"model.linear": "none", "trainer.refit_best": False}
    elif monitor != OF_PARTS:  # what follows the loop is measured by the log loss alone
        shared |= {"trainer.refit_best": False}

    def on_validation(figures: Mapping[str, float], epoch: int) -> None:
        if world.broadcast(search is not None and search.report(epoch, figures[monitor])):
            raise Pruned

    # A store prefix per trial, so that trials do not see each other's keys.
    own_store = replace(world, store=PrefixStore(trial.name, world.store))
    try:
        tried = with_settings(config, trial.values | shared)
        result = train_on(tried, own_store, on_validation)
    except Pruned:
        return "pruned", None
    except (NonFiniteLoss, ConfigError) as error:  # including incompatible settings
        log.warning("%s", error)
        return "failed", None
    if result.stopped:
        return "stopped", None
    return "complete", own_store.run_on_rank0("figure", lambda: _figure(tried, result))


def _figure(config: Config, trained: Trained) -> float | None:
    """The figure of what a trial ends with. Rank 0.

    In the loop, a fitted start is often the best model, and the same in all trials.
    """
    for part in (REFIT, SELECTED) if config.monitor == OF_PARTS else ():
        if complete_steps(config.run_dir / part):
            best: float = read_checkpoint(config.run_dir, part).state["trainer"]["best"]
            return best
    return trained.state.best


def _keep_best(config: Config, search: Search, trial: Trial, outcome: str) -> None:
    """Logs a finished trial, and deletes the checkpoints of all but the best. Rank 0."""
    for past in search.past():
        if past.name == trial.name:
            log.info("%s: %s, %s %s", past.name, outcome, config.monitor, past.best)
        if past != search.best():
            for part in ("", SELECTED, REFIT):
                keep_checkpoints(search_folder(config) / past.name / part, ())


def _result(config: Config, search: Search) -> SearchResult:
    best, path = search.best(), None
    if best is not None:
        path = search_folder(config) / "best.yaml"
        settings = with_settings(config, best.values).with_run_name_on_same_data(
            f"{config.run.name}_best"
        )
        with write_errors_to_user(path), atomic_write(path) as file:
            file.write_text(settings.to_yaml())
    n_open = search.n_elsewhere()
    return SearchResult(search.path, config.monitor or "", search.past(), best, path, n_open)


def check_search(config: Config) -> None:
    """Checks whether a search can start.

    Raises:
        ConfigError: there is nothing to vary or to monitor, or the folder is remote.
    """
    if is_remote(search_folder(config)):
        raise ConfigError(
            f"run.runs_root={config.run.runs_root}: the journal of a search is locked and appended "
            f"to, which needs a local disk; set run.runs_root to a local folder"
        )
    space = config.tune.space
    if not space:
        raise ConfigError(
            "tune.space is empty: name what to vary, such as tune.space={optimizer.dense.lr: "
            "{low: 0.0001, high: 0.01, log: true}}"
        )
    if config.monitor is None:
        raise ConfigError(
            "tune compares trials by a validation figure, and trainer.monitor=null turns it off; "
            "leave that out, or set trainer.monitor=auc"
        )
    if "trainer.monitor" in space:
        raise ConfigError(
            "tune.space.trainer.monitor: trials are compared by one figure; leave it out"
        )
    _check_space(config)


def _open_search(config: Config) -> Search:
    """The search that the configuration describes.

    Raises:
        ConfigError: the study cannot be resumed.
    """
    return Search(
        search_folder(config),
        config.tune,
        is_lower_better(config.monitor or ""),
        config.run.seed,
        config.model_dump(mode="json", include={"data", "model", "optimizer", "trainer"}),
    )


def _check_space(config: Config) -> None:
    """Checks the bounds of each varied setting, and a fraction in between for floats.

    Raises:
        ConfigError: a setting is unknown or cannot have such a value.
    """
    for name, values in config.tune.space.items():
        if isinstance(values, tuple):
            tried: tuple[Any, ...] = values
        else:
            tried = (values.low, values.high)
            if not all(isinstance(bound, int) for bound in tried):
                tried = (*tried, values.low + 0.382 * (values.high - values.low))
        for value in tried:
            with_settings(config, {name: value}, f"tune.space.{name}")
