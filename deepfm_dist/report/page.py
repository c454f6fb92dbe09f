"""A run's ``report.html``: a self-contained file for any browser."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, Field

from deepfm_dist.data.cards import Card, Cards
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.schema import OUT_OF_VOCABULARY
from deepfm_dist.distributed.checkpoint import REFIT, SELECTED
from deepfm_dist.events import EndEvent, Event, TrainEvent, ValidEvent, last
from deepfm_dist.messages import plural
from deepfm_dist.ranking.evaluation import Comparison
from deepfm_dist.ranking.profiles import Insight
from deepfm_dist.ranking.reasons import Reason
from deepfm_dist.recipe import Choice
from deepfm_dist.report.curves import sentence, trend_of
from deepfm_dist.report.plots import Plot, Plotter
from deepfm_dist.report.verdicts import EASE_ALONE, MODEL, Verdict
from deepfm_dist.storage import atomic_write, write_errors_to_user
from deepfm_dist.training.evaluation import Unknown
from deepfm_dist.training.metrics import Calibration, split_target, target_figure
from deepfm_dist.training.state import is_lower_better
from deepfm_dist.version import __version__

log = logging.getLogger(__name__)

SHOWN_HISTORY = 10
"""Number of latest items shown of a user's history."""

_LOG_LOSS = {
    "log_loss": ("Log loss", "Mean cross-entropy in nats; lower is better."),
    "ne": (
        "Normalized entropy",
        "Log loss divided by that of always predicting the mean label; 1 is no better than that.",
    ),
}
_AUC = {
    "auc": ("AUC", "Chance that a positive row scores above a negative one; 0.5 is guessing."),
}
_MEANING = {
    "auc": "chance that a positive row scores above a negative one; 0.5 is guessing",
    "user_auc": "the same within each user, weighted by rows",
    "log_loss": "mean cross-entropy in nats; lower is better",
    "ne": "log loss divided by that of always predicting the mean label; below 1 is better",
    "calibration": "mean prediction divided by mean label; 1 is right",
    "accuracy": "share of rows whose probability is on the label's side of one half",
    "majority_rate": "accuracy of always predicting the more frequent label",
}


@dataclass(frozen=True)
class Cell:
    """A figure and its 95 % interval."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Line:
    """A row of a table of rankings.

    Attributes:
        name: the name of the ranking or of the comparison.
        kind: model, other, or difference: the model minus the ranking above.
        cells: the cells, by figure.
    """

    name: str
    kind: Literal["model", "other", "difference"]
    cells: dict[str, Cell]


class _Plan(BaseModel):
    """The contents of ``plan.json``."""

    ranks: int
    device: str
    tables: list[dict[str, Any]] = Field(min_length=1)


def _plan(path: Path) -> _Plan | None:
    """The sharding plan; None without one, or, with a warning, if it is damaged."""
    try:
        return _Plan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        log.warning("%s: damaged; the report leaves the sharding plan out", path)
        return None


@dataclass(frozen=True)
class Report:
    """The contents of a run's page.

    Attributes:
        folder: the folder of the run, with its ``plan.json``.
        config_yaml: the effective settings.
        checkpoint: the measured one.
        dataset: the prepared dataset.
        split: valid or test.
        loss: training loss.
        rows: figures on the rows of the split.
        unknown: counts of values unknown to training.
        calibrations: on these rows, by target; the key of a single target is "".
        comparison: the comparison of rankings, if any.
        cutoffs: values of K.
        events: the events of the run's log.
        verdicts: shown at the top.
        chosen: settings that were chosen from the data.
        is_validation_known: whether the users' validation items are in their histories.
    """

    folder: Path
    config_yaml: str
    checkpoint: Path
    dataset: PreparedDataset
    split: str
    loss: str
    rows: Mapping[str, float]
    unknown: Unknown
    calibrations: Mapping[str, Calibration]
    comparison: Comparison | None
    cutoffs: Sequence[int]
    events: list[Event]
    verdicts: Sequence[Verdict] = ()
    chosen: Sequence[Choice] = ()
    is_validation_known: bool = False


def write_page(report: Report, name: str = "report.html") -> Path:
    """Writes the page into the run's folder. Rank 0.

    Returns:
        Its path.
    """
    path = report.folder / name
    page = _environment().get_template("report.html").render(_variables(report))
    with write_errors_to_user(path), atomic_write(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("deepfm_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    return environment


def _part(checkpoint: Path) -> str:
    """The name of a model that was computed after the training loop; otherwise empty."""
    name = checkpoint.parent.parent.name
    return name if name in (REFIT, SELECTED) else ""


def _variables(report: Report) -> dict[str, Any]:
    """The template's variables."""
    comparison, cutoffs, events = report.comparison, report.cutoffs, report.events
    plotter = Plotter(list(comparison.figures) if comparison else [MODEL])
    seconds = _seconds(events)
    insight = comparison.insight if comparison else None
    return {
        "version": __version__,
        "run": report.folder.name,
        "folder": report.folder,
        "config": report.config_yaml,
        "chosen": report.chosen,
        "checkpoint": report.checkpoint.name,
        "part": _part(report.checkpoint),
        "is_ease_alone": EASE_ALONE.title in [v.title for v in report.verdicts],
        "manifest": report.dataset.manifest,
        "split": report.split,
        "missing": _missing(report.dataset.manifest),
        "log_plots": _log_plots(plotter, report.dataset.manifest),
        "rows": {
            name: (value, _meaning(name, report.dataset.manifest.targets))
            for name, value in report.rows.items()
        },
        "notes": _notes(report),
        "known": _known(report),
        "rankings": {k: _table(comparison, k) for k in cutoffs} if comparison else {},
        "verdicts": report.verdicts,
        "learning": _learning(plotter, events, report.loss, max(cutoffs)),
        "calibrations": [
            _calibration(
                plotter,
                curve,
                report.rows,
                _negatives_per_positive(report) is not None,
                target=target,
            )
            for target, curve in report.calibrations.items()
        ],
        "profiles": _profiles(plotter, comparison, insight, max(cutoffs))
        if comparison and insight
        else [],
        "examples": _examples(report.dataset, insight) if insight else [],
        "plan": _plan(report.folder / "plan.json"),
        "seconds": seconds,
        "times": _times(plotter, seconds),
        "peak_memory_gib": ended.peak_memory_gib if (ended := last(events, EndEvent)) else [],
        "rows_per_s": trained.rows_per_s if (trained := last(events, TrainEvent)) else None,
        "picture": lambda plot: Markup(plot.svg),
    }


def _meaning(name: str, targets: Sequence[str]) -> str:
    """Explains a figure on rows."""
    target, plain_name = split_target(name)
    meaning = _MEANING.get(plain_name, "")
    is_mean = targets and target is None and meaning
    return f"the targets' weighted mean: {meaning}" if is_mean else meaning


def _missing(manifest: Manifest) -> dict[str, float]:
    """Non-zero shares of missing values by field, largest first."""
    shares = {name: share for name, share in manifest.profile.missing.items() if share > 0}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _log_plots(plotter: Plotter, manifest: Manifest) -> list[Plot]:
    profile = manifest.profile
    if profile.first_day is None or len(profile.rows_by_period) < 2:
        return []
    period = "day" if profile.days_per_period == 1 else f"{profile.days_per_period}-day period"
    dated = sum(profile.rows_by_period)
    caption = f"{dated:,} dated rows of all splits, counted by {period} (UTC)."
    given = profile.first_day, profile.days_per_period, profile.rows_by_period
    return [plotter.periods("rows-by-day", "Rows over time", caption, *given)]


def _figure(value: float, sign: str = "") -> str:
    """Formats with four decimals, one for large numbers; sign "+" shows a plus."""
    return f"{value:{sign}.4f}" if not abs(value) >= 100 else f"{value:{sign},.1f}"


def _seconds(events: Sequence[Event]) -> dict[str, float]:
    """Seconds of training by phase, over all windows."""
    seconds: dict[str, float] = {}
    for event in events:
        if isinstance(event, TrainEvent):
            for phase, spent in event.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + (spent or 0.0)
    return {phase: spent for phase, spent in seconds.items() if spent > 0}


def _table(comparison: Comparison, k: int) -> list[Line]:
    """The rankings' figures at K; each ranking is followed by the model's difference from it."""
    ending = f"@{k}"
    ours = comparison.figures[MODEL]
    lines = []
    for ranking, figures in comparison.figures.items():
        figures = {name: value for name, value in figures.items() if name.endswith(ending)}
        intervals = comparison.intervals[ranking]
        cells = {
            name.removesuffix(ending): Cell(value, intervals.get(name))
            for name, value in figures.items()
        }
        lines.append(Line(ranking, "model" if ranking == MODEL else "other", cells))
        if differences := comparison.differences.get(ranking):
            cells = {
                name.removesuffix(ending): Cell(ours[name] - value, differences.get(name))
                for name, value in figures.items()
            }
            lines.append(Line(f"model minus {ranking}", "difference", cells))
    return lines


def _negatives_per_positive(report: Report) -> float | None:
    """Sampled negatives per positive of the measured rows; None if labels come from the log."""
    spec = report.dataset.manifest.splits[report.split]
    if report.dataset.manifest.data.task != "implicit" or not spec.positives:
        return None
    return (spec.rows - spec.positives) / spec.positives


def _notes(report: Report) -> list[str]:
    """Notes on the figures on rows."""
    notes = []
    ratio = _negatives_per_positive(report)
    if ratio is not None:
        figures = "AUC, log loss, NE, calibration and accuracy refer"
        if report.loss != "bce":
            figures = "AUC refers"
        notes.append(
            f"The negatives among these rows are sampled, {ratio:.3g} for each positive. {figures} "
            f"to this mix, not to how often users choose an item."
        )
    if report.loss != "bce":
        notes.append(
            f"The model was trained with loss={report.loss}, for the order of items. Its scores "
            f"are not log-odds, so log loss, NE, calibration and accuracy are left out."
        )
    n = report.unknown.n
    counted = f"{report.split} {'rows' if ratio is None else 'positives'}"
    parts = [
        f"{rows:,} ({rows / n:.1%}) have no known {name}"
        for name, rows in report.unknown.rows.items()
        if rows
    ]
    if parts:
        notes.append(
            f"Of {n:,} {counted}, {', '.join(parts)}: one that training rows lack, one below "
            f"min_count, or none."
        )
    elif report.unknown.rows:
        *others, final = report.unknown.rows
        names = f"{', '.join(others)} and {final}" if others else final
        notes.append(f"All {n:,} {counted} have a known {names}.")
    return notes


def _known(report: Report) -> str:
    """What the compared rankings know of the users."""
    if not report.dataset.manifest.splits["valid"].positives or report.split != "test":
        return "All rankings know the users' training items only."
    if report.is_validation_known:
        return (
            "All rankings know the users' validation items too, as a deployed model would: these "
            "are in the histories and not ranked. evaluate.validation_known=false leaves them out."
        )
    return (
        "All rankings know the users' training items only (evaluate.validation_known=false); "
        "validation items are not ranked."
    )


def _learning(plotter: Plotter, events: Sequence[Event], loss: str, k: int) -> list[Plot]:
    ranking = {
        "loss": ("Loss", f"Mean training loss ({loss}); lower is better."),
        f"ndcg@{k}": (
            f"NDCG@{k}",
            f"Validation rankings; hits at the top of the first {k} count more, and 1 is the best "
            f"possible order.",
        ),
    }
    plots = []
    for name, (title, caption) in ((_LOG_LOSS if loss == "bce" else ranking) | _AUC).items():
        curves = {
            kind: [
                (event.step, value)
                for event in events
                if isinstance(event, kind) and (value := event.figures.get(name)) is not None
            ]
            for kind in (TrainEvent, ValidEvent)
        }
        if any(curves.values()):
            train, valid = curves[TrainEvent], curves[ValidEvent]
            falls = is_lower_better(name)
            caption = f"{caption} {sentence(trend_of(valid, falls), falls)}".rstrip()
            plots.append(plotter.learning(name, title, caption, train, valid))
    return plots


def _calibration(
    plotter: Plotter,
    curve: Calibration,
    rows: Mapping[str, float],
    is_sampled: bool = False,
    target: str = "",
) -> Plot:
    ratio = rows[target_figure(target, "calibration") if target else "calibration"]
    caption = (
        f"Each point is one of {len(curve.rows)} bins of about {curve.rows[0]:,.0f} rows, ordered "
        f"by prediction."
    )
    if not math.isnan(ratio):
        judged = "too low" if ratio < 0.98 else "too high" if ratio > 1.02 else "right"
        caption += (
            f" Over all rows predictions are {judged}: {ratio:.3f} times the share of positives."
        )
    if is_sampled:
        caption += " The negatives among these rows are sampled."
    return plotter.calibration(curve, caption, target)


def _profiles(plotter: Plotter, comparison: Comparison, insight: Insight, k: int) -> list[Plot]:
    profiles, figures = insight.profiles, comparison.figures
    return [
        plotter.over_k(
            "recall-over-k",
            "Recall@K",
            "Share of a user's held-out items among the first K; mean over users.",
            {name: p.recall for name, p in profiles.items()},
        ),
        plotter.over_k(
            "ndcg-over-k",
            "NDCG@K",
            "The same with hits at the top counting more; 1 is the best possible order.",
            {name: p.ndcg for name, p in profiles.items()},
        ),
        plotter.groups(
            "by-activity",
            f"NDCG@{k} by user activity",
            f"{plural(insight.n_users, 'user')} in groups of about equal size, the least active "
            f"first.",
            "training items of the user",
            _labels(insight.activity),
            {name: p.by_activity for name, p in profiles.items()},
        ),
        plotter.groups(
            "by-popularity",
            f"Recall@{k} by item popularity",
            f"{plural(insight.n_held_out, 'held-out item')} in groups of about equal size, rarest "
            f"first.",
            "training rows of the item",
            _labels(insight.popularity),
            {name: p.by_popularity for name, p in profiles.items()},
        ),
        plotter.shares(
            "coverage",
            f"Catalogue coverage, K = {k}",
            "Share of items recommended to at least one user.",
            {name: of[f"coverage@{k}"] for name, of in figures.items()},
            per_ranking=True,
        ),
    ]


def _labels(bounds: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in bounds]


def _times(plotter: Plotter, seconds: Mapping[str, float]) -> Plot | None:
    total = sum(seconds.values())
    if not total:
        return None
    return plotter.shares(
        "times",
        "Where training's time went",
        f"Shares of {total:,.1f} host seconds on rank 0.",
        {phase: spent / total for phase, spent in seconds.items()},
        per_ranking=False,
    )


@dataclass(frozen=True)
class _Shown:
    """An example with cards for rows."""

    user: str
    n_history: int
    history: list[Card]
    ranked: list[tuple[Card, bool, list[tuple[str, str, float]]]]
    n_held_out: int


def _examples(dataset: PreparedDataset, insight: Insight) -> list[_Shown]:
    cards, users = Cards(dataset), dataset.entity_ids("user")
    examples = []
    for example in insight.examples:
        wanted = set(example.held_out)
        known = [item for item in example.history if item != OUT_OF_VOCABULARY]
        all_reasons = example.reasons or [()] * len(example.ranked)
        examples.append(
            _Shown(
                users[example.user].as_py(),
                len(example.history),
                [cards(item) for item in reversed(known[-SHOWN_HISTORY:])],
                [
                    (cards(item), item in wanted, [_shown_reason(r, cards) for r in reasons])
                    for item, reasons in zip(example.ranked, all_reasons, strict=True)
                ],
                len(example.held_out),
            )
        )
    return examples


def _shown_reason(reason: Reason, cards: Cards) -> tuple[str, str, float]:
    """A reason's field, value (the title if it is an item) and share."""
    value = reason.value or ""
    if reason.item is not None:
        card = cards(reason.item)
        value = card.title or str(card.id)
    return reason.field, value, reason.share
