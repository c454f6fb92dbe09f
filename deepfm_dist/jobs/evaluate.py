"""Measures a run's model on held-out rows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.sources import find_file
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.events import EvaluateEvent, ValidEvent, read_events
from deepfm_dist.log import MetricsLog, warn_if_unwritable
from deepfm_dist.ranking.baselines import Baseline, Ease, Ials, ItemKNN, Popularity
from deepfm_dist.ranking.evaluation import LOGGED, Comparison, RankingEvaluator, evaluate_ranking
from deepfm_dist.ranking.items import cold_items_to_rank
from deepfm_dist.ranking.settings import EASE_L2
from deepfm_dist.recipe import choices_in
from deepfm_dist.report.verdicts import Verdict, verdicts_on
from deepfm_dist.runs.trained import LoadedModel, find_run, open_trained, open_weights, ranking_loss
from deepfm_dist.section import AUTO
from deepfm_dist.training.evaluation import Measured, RowEvaluator
from deepfm_dist.training.metrics import order_figures

log = logging.getLogger(__name__)
_OF_EVALUATE = ("data", "checkpoint", "evaluate", "recommend", "sharding", "run")
"""Sections that the command reads."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on held-out rows.

    Attributes:
        split: valid or test.
        composition: description of its rows.
        rows: figures on them.
        meaningful_rows: without those of probabilities if the training loss gives none.
        comparison: the comparison of rankings; None if rows have labels.
        verdicts: assessments in words.
        metrics_log: the file with the figures; None if it could not be written.
        report: the HTML report; None if it could not be written.
    """

    split: str
    composition: str
    rows: dict[str, float]
    meaningful_rows: dict[str, float]
    comparison: Comparison | None
    verdicts: list[Verdict]
    metrics_log: Path | None
    report: Path | None

    @property
    def figures(self) -> dict[str, float]:
        """The model's figures of rows and of rankings."""
        return _all_figures(self.rows, self.comparison)


def evaluate(config: Config, overrides: Sequence[str] = ()) -> Evaluation | None:
    """Measures a run's model on held-out rows, and writes its report. All ranks.

    Returns:
        The figures on rank 0; None elsewhere.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        ConfigError: a setting does not fit the run, or a baseline needs a missing library.
        DataError: the split is empty, or the reference cannot be read.
    """
    with process_group(*config.run.process_group) as world:
        return evaluate_on(config, overrides, world)


def evaluate_on(config: Config, overrides: Sequence[str], world: World) -> Evaluation | None:
    """`evaluate` in a process group that exists. All ranks."""
    baselines, reference = _baselines(config), _reference(config)
    trained = open_trained(config, overrides, world, same_rows=True, finished=_usable_parts(config))
    if "ease" in baselines and config.evaluate.ease_l2 is None:
        l2 = world.broadcast(world.run_on_rank0("ease_l2", lambda: _ease_l2(trained.checkpoint)))
        assert l2 is not None
        baselines["ease"] = Ease(l2)
    measured, comparison = _measure(config, trained, world, baselines, reference)
    return None if measured is None else _report(config, trained, measured, comparison)


def measure_weights(config: Config, weights: Path, world: World) -> dict[str, float] | None:
    """Measures another run's weights on the held-out rows of this one. All ranks.

    Args:
        config: the settings of the run with the rows.
        weights: folder of the other run; this run's dataset must extend its ids.
        world: the ranks.

    Returns:
        The figures on rows and, for implicit data, of the ranking, on rank 0; None elsewhere.

    Raises:
        CheckpointError: either run has no complete checkpoint, or the dataset does not extend the
            other's.
        DataError: the split is empty.
    """
    finished = _usable_parts(config)
    run = find_run(config, (), same_rows=True, finished=finished, world=world)
    trained = open_weights(weights, run, world, finished)
    measured, comparison = _measure(config, trained, world, {}, None)
    return None if measured is None else _all_figures(measured.figures, comparison)


def _usable_parts(config: Config) -> Sequence[str]:
    """The parts of a finished run that may be measured.

    Raises:
        ConfigError: the requested checkpoint was trained on the rows held out here.
    """
    split = config.evaluate.split
    if _knows_validation(config):
        return checkpoint.REFIT, checkpoint.SELECTED
    if config.checkpoint.use == checkpoint.REFIT:
        raise ConfigError(
            f"checkpoint.use=refit: trained on the validation rows too, which are not to be "
            f"known here (evaluate.split={split}); use checkpoint.use=selected"
        )
    return (checkpoint.SELECTED,)


def _knows_validation(config: Config) -> bool:
    """Whether validation rows count as known."""
    known = config.evaluate.split == "test" and config.evaluate.validation_known
    return known and config.data.split.method != "users"


def _measure(
    config: Config,
    trained: LoadedModel,
    world: World,
    baselines: Mapping[str, Baseline],
    reference: str | None,
) -> tuple[Measured | None, Comparison | None]:
    """Measures rows and rankings; figures on rank 0. All ranks."""
    split, dataset = config.evaluate.split, trained.dataset
    _check_not_empty(dataset, split)
    if _knows_validation(config):
        dataset = dataset.with_validation()
    held_out = None
    if trained.config.data.task == "implicit":
        cold_items = cold_items_to_rank(
            config.recommend.cold_items, trained.config.data.id_dropout, dataset.manifest
        )
        held_out = RankingEvaluator(
            dataset,
            split,
            config.recommend.context,
            config.evaluate.mask_seen,
            cold_items=cold_items,
        )
    weights = config.trainer.weights_of(dataset.manifest.targets)
    measured = RowEvaluator(dataset, split, weights).measure(trained.sharded, world)
    comparison = None
    if held_out is not None:
        model, cutoffs = deepfm_of(trained.sharded), config.evaluate.k
        comparison = evaluate_ranking(
            model,
            world,
            held_out,
            cutoffs,
            baselines,
            reference,
            steering=config.recommend,
        )
    return measured, comparison


def _all_figures(rows: Mapping[str, float], comparison: Comparison | None) -> dict[str, float]:
    return {**rows, **(comparison.figures["model"] if comparison else {})}


def _reference(config: Config) -> str | None:
    """Path or URL of the ranking to compare with."""
    reference = config.evaluate.reference
    if reference is None or config.data.task != "implicit":
        return reference
    return find_file(config.input_root, reference, "evaluate.reference")


def _check_not_empty(dataset: PreparedDataset, split: str) -> None:
    if dataset.manifest.splits[split].rows == 0:
        other = next((s for s in ("test", "valid") if dataset.manifest.splits[s].rows), None)
        data = dataset.manifest.data
        file, column = getattr(data.split, f"{split}_file"), data.interactions.split
        how = (
            "data.refit=false"
            if data.refit
            else f"data.split.{split}_file names other rows"
            if file
            else f"rows of it in the column {column!r}"
            if column
            else data.split.larger(split)
        )
        cure = (
            f"set evaluate.split={other}"
            if other and not data.refit
            else f"hold some out ({how}) in a run of another run.name"
        )
        raise DataError(f"{dataset.folder}: the {split} split has no rows; {cure}")


def _report(
    config: Config, trained: LoadedModel, measured: Measured, comparison: Comparison | None
) -> Evaluation:
    """Logs the figures and writes the page. Rank 0."""
    from deepfm_dist.report.page import Report, write_page  # slow to import

    split, rows, cutoffs = config.evaluate.split, measured.figures, config.evaluate.k
    logged = {name: getattr(comparison, name) for name in LOGGED} if comparison else {}
    unknown = measured.unknown
    event = EvaluateEvent(step=trained.step, split=split, rows=rows, unknown=unknown.rows, **logged)
    folder, metrics_log, page = config.run_dir, None, None
    copied = f"copy the run to another folder: cp -r {folder} FOLDER, --run FOLDER/{folder.name}"
    with warn_if_unwritable(f"the figures are not kept; {copied}"):
        metrics = MetricsLog(folder, is_first=True)
        metrics.write(event)
        metrics_log = metrics.path
    events = read_events(folder / "metrics.jsonl")
    validations = [event for event in events if isinstance(event, ValidEvent)]
    state = checkpoint.read_state(trained.checkpoint)
    verdicts = verdicts_on(state, validations, rows, unknown, split, comparison, k=max(cutoffs))
    loss = ranking_loss(trained.settings)
    shown = rows if loss is None else order_figures(rows)
    report = Report(
        folder=folder,
        config_yaml=_settings_shown(trained, state),
        chosen=choices_in(state),
        checkpoint=trained.checkpoint,
        dataset=trained.dataset,
        split=split,
        loss=loss or "bce",
        rows=shown,
        unknown=unknown,
        calibrations=measured.calibrations if loss is None else {},
        comparison=comparison,
        cutoffs=cutoffs,
        verdicts=verdicts,
        events=events,
        is_validation_known=_knows_validation(config),
    )
    own_split = trained.settings.get("evaluate", {}).get("split", split)
    name = "report.html" if split == own_split else f"report-{split}.html"
    composition = trained.dataset.manifest.composition(split)
    with warn_if_unwritable("there is no report" + f"; {copied}" * (metrics_log is not None)):
        page = write_page(report, name)
    return Evaluation(
        split=split,
        composition=composition,
        rows=rows,
        meaningful_rows=shown,
        comparison=comparison,
        verdicts=verdicts,
        metrics_log=metrics_log,
        report=page,
    )


def _settings_shown(trained: LoadedModel, state: Mapping[str, Any]) -> str:
    """YAML of the settings that the run was trained with, and below it how this model differs.

    Args:
        trained: the model.
        state: the state of its checkpoint.
    """
    ours, text = trained.config.model_dump(mode="json"), ""
    settings = dict(trained.settings)
    if trained_with := state.get("trained_config"):
        settings |= {"model": trained_with["model"]}
        if wider := _changes(trained_with["model"], trained.settings["model"]):
            text += "\n# This model combines others, or adds EASE's columns, and so is wider:\n"
            text += yaml.safe_dump({"model": wider}, sort_keys=False)
    changed = {
        section: different
        for section in _OF_EVALUATE
        if (different := _changes(trained.settings.get(section, {}), ours[section]))
    }
    if changed:
        text += "\n# In place of these, this evaluation has:\n"
        text += yaml.safe_dump(changed, sort_keys=False)
    return yaml.safe_dump(settings, sort_keys=False) + text


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ, except names, which do not change what is measured."""
    return {k: v for k, v in now.items() if k != "name" and v not in (before.get(k), AUTO)}


def _ease_l2(path: Path) -> float:
    """The L2 with which EASE ranked best when a checkpoint's run was trained."""
    l2 = float(checkpoint.read_state(path).get("ease_l2", EASE_L2))
    log.info("ease: L2 %g (set another one by evaluate.ease_l2)", l2)
    return l2


def _baselines(config: Config) -> dict[str, Baseline]:
    """The configured baselines.

    Raises:
        ConfigError: one needs a library that is not installed.
    """
    settings = config.evaluate
    makers: dict[str, Callable[[], Baseline]] = {
        "popularity": Popularity,
        "item_knn": lambda: ItemKNN(settings.item_knn_neighbours),
        "ease": lambda: Ease(settings.ease_l2 or EASE_L2),
        "ials": lambda: Ials(settings.ials, config.run.seed),
    }
    return {name: makers[name]() for name in settings.baselines}
