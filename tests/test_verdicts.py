"""The words at the top of a report, with figures computed by hand."""

import pytest

from deepfm_dist.events import ValidEvent
from deepfm_dist.ranking.evaluation import Comparison
from deepfm_dist.ranking.profiles import Insight
from deepfm_dist.report.verdicts import (
    ranking_verdicts,
    row_verdicts,
    training_verdicts,
    verdicts_on,
)

NO_INSIGHT = Insight({}, 0, (), 0, (), [])
NAN = float("nan")


def compared(ours: float, theirs: float, low: float, high: float) -> Comparison:
    """Two rankings; at K = 5 the other one has the same figure, so that K matters."""
    figures = {
        "model": {"ndcg@5": 0.5, "ndcg@10": ours},
        "ease": {"ndcg@5": 0.5, "ndcg@10": theirs},
    }
    differences = {"ease": {"ndcg@5": (0.0, 0.0), "ndcg@10": (low, high)}}
    return Comparison(figures, {name: {} for name in figures}, differences, NO_INSIGHT)


@pytest.mark.parametrize(
    ("low", "high", "kind", "title"),
    [
        (0.01, 0.03, "better", "Better than ease"),
        (-0.03, -0.01, "worse", "Worse than ease"),
        (-0.01, 0.03, "even", "No clear difference from ease"),
        (-0.03, 0.01, "even", "No clear difference from ease"),
        (0.0, 0.03, "even", "No clear difference from ease"),  # an interval with 0 at its end
        (-0.03, 0.0, "even", "No clear difference from ease"),
        (0.0, 0.0, "even", "No clear difference from ease"),  # the same lists for every user
    ],
)
def test_a_ranking_is_judged_by_the_interval_of_the_difference(
    low: float, high: float, kind: str, title: str
) -> None:
    # The means alone would say the opposite of some of these.
    [verdict] = ranking_verdicts(compared(0.3, 0.2, low, high), 10)
    assert (verdict.kind, verdict.title) == (kind, title)
    [verdict] = ranking_verdicts(compared(0.2, 0.3, low, high), 10)
    assert (verdict.kind, verdict.title) == (kind, title)
    [verdict] = ranking_verdicts(compared(0.2, 0.3, low, high), 5)
    assert verdict.kind == "even"


def test_the_text_of_a_ranking_gives_its_figures() -> None:
    [verdict] = ranking_verdicts(compared(0.3, 0.2, 0.05, 0.15), 10)
    assert str(verdict) == (
        "Better than ease: NDCG@10 0.3000, ease 0.2000 (1.50 times); 95 % interval of the "
        "difference +0.0500 to +0.1500"
    )
    [verdict] = ranking_verdicts(compared(0.3, 0.0, 0.2, 0.4), 10)
    assert "times" not in verdict.text


def test_without_another_ranking_there_is_no_verdict_on_rankings() -> None:
    alone = Comparison({"model": {"ndcg@10": 0.3}}, {"model": {}}, {}, NO_INSIGHT)
    assert ranking_verdicts(alone, 10) == []


@pytest.mark.parametrize(
    ("entropy", "title"),
    [
        (0.75, "Better than a constant"),
        (0.999, "Better than a constant"),
        (1.0, "Worse than a constant"),
        (1.047, "Worse than a constant"),
    ],
)
def test_rows_are_judged_by_ne(entropy: float, title: str) -> None:
    rows = {"ne": entropy, "log_loss": 0.6, "majority_rate": 0.8}
    [verdict] = row_verdicts(rows, "valid", is_ranked=False)
    assert verdict.title == title
    assert verdict.kind == ("worse" if entropy >= 1 else "better")
    assert f"NE {entropy:.4f} on valid rows" in verdict.text
    # Where rankings are what counts, only bad news about rows is shown.
    assert len(row_verdicts(rows, "valid", is_ranked=True)) == (entropy >= 1)


def test_the_gain_over_a_constant_is_a_share_of_its_log_loss() -> None:
    # Always predicting 0.5 has a log loss of ln 2 = 0.6931; 0.5199 is a quarter less.
    rows = {"ne": 0.75, "log_loss": 0.5199, "majority_rate": 0.5}
    [verdict] = row_verdicts(rows, "test", is_ranked=False)
    assert verdict.text == (
        "NE 0.7500 on test rows: log loss 0.5199 is 25.0% below that of always predicting the mean "
        "label"
    )


def test_rows_of_one_label_are_named() -> None:
    rows = {"ne": NAN, "log_loss": 0.6, "majority_rate": 1.0}
    [verdict] = row_verdicts(rows, "test", is_ranked=False)
    assert (verdict.title, verdict.kind) == ("All test labels are the same", "worse")
    assert row_verdicts({**rows, "majority_rate": 0.5}, "test", is_ranked=False) == []


def losses(*values: float | None) -> list[ValidEvent]:
    return [
        ValidEvent(
            step=10 * n, epoch=n, log_loss=v, auc=None if v is None else 1 - v, **{"ndcg@10": n / 8}
        )
        for n, v in enumerate(values, 1)
    ]


@pytest.mark.parametrize("monitor", ["log_loss", "auc"])
def test_a_better_checkpoint_that_was_passed_over_is_named(monitor: str) -> None:
    validations = losses(0.5, 0.25, 0.375)
    [verdict] = training_verdicts(validations, 30, monitor)
    assert (verdict.title, verdict.kind) == ("An earlier checkpoint was better", "worse")
    here, best = ("0.3750", "0.2500") if monitor == "log_loss" else ("0.6250", "0.7500")
    name = monitor.replace("_", " ")
    assert verdict.text == f"validation {name} {here} at this one (step 30), {best} at step 20"
    assert training_verdicts(validations, 20, monitor) == []  # one worse validation is chance


def test_epochs_that_did_not_help_are_named() -> None:
    validations = losses(0.5, 0.25, 0.375, 0.3125)
    [verdict] = training_verdicts(validations, 20, "log_loss")
    assert (verdict.title, verdict.kind) == ("Trained for too long", "even")
    assert verdict.text == (
        "validation log loss was best at step 20 (0.2500); at the last one, step 40, it is 0.3125"
    )


@pytest.mark.parametrize(
    "validations",
    [
        [],
        losses(0.5),
        losses(0.5, 0.25, 0.125),
        losses(0.5, 0.5, 0.125),
        losses(None, None, None),  # a figure that was never defined
        [ValidEvent(step=10, epoch=1, ne=0.9)],
    ],
)
def test_training_that_helped_to_the_end_has_no_verdict(validations: list[ValidEvent]) -> None:
    assert training_verdicts(validations, 10 * len(validations), "log_loss") == []


@pytest.mark.parametrize(
    ("loss", "monitor", "titles"),
    [
        ("bce", "log_loss", ["Worse than a constant", "An earlier checkpoint was better"]),
        ("bce", None, ["Worse than a constant", "An earlier checkpoint was better"]),
        ("softmax", "ndcg@10", []),  # gives no probabilities, and was best at the last step
        ("softmax", None, []),
        ("softmax", "log_loss", ["An earlier checkpoint was better"]),
    ],
)
def test_verdicts_follow_what_was_trained_for(
    loss: str, monitor: str | None, titles: list[str]
) -> None:
    validations = losses(0.25, 0.5)
    state = {
        "step": 20,
        "config": {"trainer": {"loss": loss}},
        "trainer": {"monitor": monitor},
    }
    rows = {"ne": 1.25, "log_loss": 0.75, "majority_rate": 0.75}
    verdicts = verdicts_on(state, validations, rows, "test", None, 10)
    assert [v.title for v in verdicts] == titles
