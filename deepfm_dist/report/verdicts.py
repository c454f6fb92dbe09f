"""Verdicts on a model in words: cards at the top of the report, last lines of evaluate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from deepfm_dist.events import ValidEvent
from deepfm_dist.ranking.evaluation import STEERED, Comparison
from deepfm_dist.ranking.settings import BaselineName
from deepfm_dist.report.curves import trend_of
from deepfm_dist.training.evaluation import Unknown
from deepfm_dist.training.metrics import split_target
from deepfm_dist.training.state import WARN_AFTER, is_lower_better

MODEL = "model"
SOME, MANY, NEARLY_ALL = 0.1, 0.5, 0.9
"""Minimum shares of rows with an unknown user or item for a card, and for a red one; and of rows
without a known value of a context field, which is often empty.
"""
_TITLES = {
    "better": "Better than {}",
    "worse": "Worse than {}",
    "even": "No clear difference from {}",
}


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Attributes:
        title: the finding.
        text: the figures behind it.
        kind: decides the color of its card.
    """

    title: str
    text: str
    kind: Literal["better", "worse", "even"]

    def __str__(self) -> str:
        return f"{self.title}: {self.text}"


def ranking_verdicts(comparison: Comparison, k: int, advice: str = "") -> list[Verdict]:
    """Compares the model with each other ranking, by NDCG@K.

    It is better or worse if the 95 % interval of the difference excludes 0; an interval that ends
    at 0 does not exclude it.

    Args:
        comparison: the comparison of rankings.
        k: the cut-off.
        advice: what to try if a baseline is better; not given for another system's scores.
    """
    verdicts = []
    figure = f"ndcg@{k}"
    ours = comparison.figures[MODEL][figure]
    for name, differences in comparison.differences.items():
        low, high = differences[figure]
        if name == STEERED:
            verdicts.append(_steering_verdict(comparison, k))
            continue
        theirs = comparison.figures[name][figure]
        kind: Literal["better", "worse", "even"] = "even"
        if low > 0:
            kind = "better"
        elif high < 0:
            kind = "worse"
        if low == high == 0:
            text = f"NDCG@{k} {ours:.4f}, and equal to that of {name} for every user"
            verdicts.append(Verdict(f"Ranks like {name}", text, "even"))
            continue
        ratio = f" ({ours / theirs:.2f} times)" if theirs > 0 else ""
        text = (
            f"NDCG@{k} {ours:.4f}, {name} {theirs:.4f}{ratio}; 95 % interval of the difference "
            f"{low:+.4f} to {high:+.4f}"
        )
        if kind == "worse" and advice and name.partition(" ")[0] in get_args(BaselineName):
            text += f"; to try: {advice}"
        verdicts.append(Verdict(_TITLES[kind].format(name), text, kind))
    return verdicts


def _steering_verdict(comparison: Comparison, k: int) -> Verdict:
    """The effect of popularity penalty, diversity and limits of `recommend`."""
    ours, theirs = comparison.figures[MODEL], comparison.figures[STEERED]
    low, high = comparison.differences[STEERED][f"ndcg@{k}"]
    changes = ", ".join(
        f"{name} {ours[f'{name}@{k}']:.3f} to {theirs[f'{name}@{k}']:.3f}"
        for name in ("coverage", "novelty")
    )
    text = (
        f"NDCG@{k} {ours[f'ndcg@{k}']:.4f} to {theirs[f'ndcg@{k}']:.4f}, 95 % interval of the "
        f"loss {low:+.4f} to {high:+.4f}; {changes}"
    )
    return Verdict("Steered rankings", text, "even")


def ranking_advice(settings: Mapping[str, Any]) -> str:
    """What to try for better rankings.

    Args:
        settings: the settings of the run, as checkpoints hold them.
    """
    steps = []
    features = settings.get("data", {}).get("features", [])
    if not any(feature.get("history") for feature in features):
        steps.append("the field {name: seen, entity: user, history: item, pooling: sqrt}")
    if settings.get("trainer", {}).get("loss", "bce") == "bce":
        steps.append("trainer.loss=softmax")
    if not steps and settings.get("model", {}).get("linear", "none") == "none":
        steps.append("model.linear=ease")
    if not steps and not any(_describes_items(feature) for feature in features):
        steps.append("fields that describe the items (data.features), which EASE uses as well")
    if not steps:
        steps.append("tune, over optimizer.tables.lr, optimizer.tables.l2 and model.embedding_dim")
    return f"{' and '.join(steps)} (docs/choosing.md)"


def _describes_items(feature: Mapping[str, Any]) -> bool:
    """Whether a field describes items beyond their identity."""
    is_id = feature.get("file") is None and feature.get("column") is None
    return feature.get("entity") == "item" and not is_id


def unknown_verdicts(unknown: Unknown, split: str, only_positives: bool) -> list[Verdict]:
    """Shares of rows with users, items or values unknown to the model.

    Args:
        unknown: counts.
        split: valid or test.
        only_positives: whether only positives are counted.
    """
    verdicts = []
    counted = f"{split} {'positives' if only_positives else 'rows'}"
    for name, rows in unknown.rows.items():
        is_id = name in ("user", "item")
        if not rows or rows < (SOME if is_id else NEARLY_ALL) * unknown.n:
            continue
        many = rows >= MANY * unknown.n
        if is_id:
            what = f"{'a' if name == 'user' else 'an'} {name} that training rows lack"
            cure = (
                f"give {name}s fields that describe them, or hold out rows of known {name}s "
                f"(data.split)"
            )
        else:
            what = f"no value of {name} that training rows have"
            cure = f"hold out rows with known values (data.split), or leave {name} out"
        verdicts.append(
            Verdict(
                f"{'Many' if many else 'Some'} {counted} have an unknown {name}",
                f"{rows:,} of {unknown.n:,} {counted} ({rows / unknown.n:.1%}) have {what}, so the "
                f"model cannot tell these apart; {cure}",
                "worse" if many else "even",
            )
        )
    return verdicts


def row_verdicts(
    rows: Mapping[str, float], split: str, is_ranked: bool, targets: Sequence[str] = ()
) -> list[Verdict]:
    """Compares the model with always predicting the mean label, by NE, for each target.

    Args:
        rows: figures on the rows of the split.
        split: valid or test.
        is_ranked: whether there are verdicts on rankings; positive verdicts on rows are then
            omitted.
        targets: names of several targets.
    """
    if targets:
        by_target: dict[str, dict[str, float]] = {target: {} for target in targets}
        for figure, value in rows.items():
            target, name = split_target(figure)
            if target is not None:
                by_target[target][name] = value
        return [
            replace(verdict, title=f"{target}: {verdict.title}")
            for target, figures in by_target.items()
            for verdict in row_verdicts(figures, split, is_ranked)
        ]
    entropy = rows["ne"]
    if math.isnan(entropy):
        if rows["majority_rate"] < 1:
            return []
        return [
            Verdict(
                f"All {split} labels are the same",
                "AUC and NE are undefined; hold out rows of both labels (data.split)",
                "worse",
            )
        ]
    if entropy >= 1:
        return [
            Verdict(
                _TITLES["worse"].format("a constant"),
                f"NE {entropy:.4f} on {split} rows: always predicting the mean label has a lower "
                f"log loss than {rows['log_loss']:.4f}",
                "worse",
            )
        ]
    if is_ranked:
        return []
    return [
        Verdict(
            _TITLES["better"].format("a constant"),
            f"NE {entropy:.4f} on {split} rows: log loss {rows['log_loss']:.4f} is "
            f"{1 - entropy:.1%} below that of always predicting the mean label",
            "better",
        )
    ]


EASE_ALONE = Verdict(
    "The model is EASE alone",
    "with the trained part it did not rank clearly better, so training is not part of this model",
    "even",
)


def _ease_alone(state: Mapping[str, Any]) -> Verdict:
    """`EASE_ALONE` for a checkpoint's marker."""
    if not state.get("is_ease_standardized"):  # of an earlier version
        return EASE_ALONE
    unlike = "unlike the baseline's, its scores are divided by the deviation of an item's residuals"
    return replace(EASE_ALONE, text=f"{EASE_ALONE.text}; {unlike}")


def training_verdicts(
    validations: Sequence[ValidEvent],
    step: int,
    monitor: str,
    trainer: Mapping[str, Any] | None = None,
) -> list[Verdict]:
    """Whether training was too long or too short, and whether another checkpoint is better.

    Args:
        validations: the validations, in order.
        step: the step of the measured checkpoint.
        monitor: the figure to compare.
        trainer: its settings.
    """
    trainer = trainer or {}
    values = [(v.step, v.figures.get(monitor)) for v in validations]
    points = [(step, value) for step, value in values if value is not None]
    if not points:
        return []
    sign = 1 if is_lower_better(monitor) else -1
    best_step, best = min(points, key=lambda point: sign * point[1])
    last_step, last = points[-1]
    here = dict(points).get(step)
    name = monitor.replace("_", " ").replace("ndcg", "NDCG").replace("recall", "Recall")
    if step == 0 and here is not None:
        text = f"validation {name} {here:.4f} at the start, which is used; {best:.4f} at best"
        return [Verdict("Training did not clearly improve on the fitted start", text, "even")]
    if here is not None and best_step < step and sign * (here - best) > 0:
        return [
            Verdict(
                "An earlier checkpoint was better",
                f"validation {name} {here:.4f} at this one (step {step:,}), {best:.4f} at step "
                f"{best_step:,}",
                "worse",
            )
        ]
    trend = trend_of(points, is_lower_better(monitor))
    if trend is not None and trend.kind == "improving":
        limit = "epochs" if trainer.get("max_steps") is None else "max_steps"
        longer = f"; to try: trainer.{limit}={2 * trainer[limit]}" if limit in trainer else ""
        return [
            Verdict(
                "Still improving when training ended",
                f"validation {name} {last:.4f} at the last step, {last_step:,}, is the best so "
                f"far, after {points[-2][1]:.4f}{longer}",
                "even",
            )
        ]
    if sum(at > best_step for at, _ in points) >= WARN_AFTER:
        return [
            Verdict(
                "Trained for too long"
                if trainer.get("patience") is None
                else "Best before the end",
                f"validation {name} was best at step {best_step:,} ({best:.4f}); at the last one, "
                f"step {last_step:,}, it is {last:.4f}",
                "even",
            )
        ]
    return []


def verdicts_on(
    state: Mapping[str, Any],
    validations: Sequence[ValidEvent],
    rows: Mapping[str, float],
    unknown: Unknown,
    split: str,
    comparison: Comparison | None,
    k: int,
) -> list[Verdict]:
    """All verdicts on a model.

    Args:
        state: the state of its checkpoint, from the marker.
        validations: the validations, in order.
        rows: figures on the rows of the split.
        unknown: counts of values unknown to training.
        split: valid or test.
        comparison: the comparison of rankings, if any.
        k: the cut-off to compare rankings at.
    """
    settings = state["config"]
    trainer = settings.get("trainer", {})
    targets = settings.get("data", {}).get("interactions", {}).get("labels", ())
    only_positives = settings.get("data", {}).get("task", "implicit") == "implicit"
    has_row_loss = trainer.get("loss", "bce") == "bce"  # other losses give no probabilities
    monitor = state["trainer"].get("monitor") or ("log_loss" if has_row_loss else f"ndcg@{k}")
    return [
        *(ranking_verdicts(comparison, k, ranking_advice(settings)) if comparison else []),
        *(row_verdicts(rows, split, comparison is not None, targets) if has_row_loss else []),
        *unknown_verdicts(unknown, split, only_positives),
        *(
            [_ease_alone(state)]
            if state.get("is_ease_alone")
            else training_verdicts(validations, state["step"], monitor, trainer)
        ),
    ]
