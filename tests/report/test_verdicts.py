"""Verdicts of a report, with figures computed by hand."""

import pytest

from deepfm_dist.events import ValidEvent
from deepfm_dist.ranking.evaluation import Comparison
from deepfm_dist.ranking.profiles import Insight
from deepfm_dist.report.curves import sentence, trend_of
from deepfm_dist.report.verdicts import (
    ranking_advice,
    ranking_verdicts,
    row_verdicts,
    training_verdicts,
    unknown_verdicts,
    verdicts_on,
)
from deepfm_dist.training.evaluation import Unknown

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
        (0.0, 0.0, "even", "Ranks like ease"),  # the same lists for every user
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
    [verdict] = ranking_verdicts(compared(0.03, 0.01, 0.0, 0.04), 10)
    assert str(verdict).startswith("No clear difference from ease: NDCG@10 0.0300, ease 0.0100")


def test_a_baseline_that_wins_comes_with_what_to_try() -> None:
    settings = {"data": {"features": [{"name": "user"}]}, "trainer": {"loss": "bce"}}
    advice = ranking_advice(settings)
    assert advice == (
        "the field {name: seen, entity: user, history: item, pooling: sqrt} and "
        "trainer.loss=softmax (docs/choosing.md)"
    )
    has_history = {"data": {"features": [{"name": "seen", "history": "item"}]}}
    assert ranking_advice(has_history) == "trainer.loss=softmax (docs/choosing.md)"
    recipe = has_history | {"trainer": {"loss": "softmax"}}
    assert ranking_advice(recipe) == "model.linear=ease (docs/choosing.md)"
    default = recipe | {"model": {"linear": "ease"}}
    assert ranking_advice(default).startswith("fields that describe the items (data.features)")
    item, genre = {"name": "item", "entity": "item"}, {"name": "genre", "entity": "item"}
    seen = {"name": "seen", "entity": "user", "history": "item"}
    no_more = default | {"data": {"features": [item, seen]}}
    assert ranking_advice(no_more) == ranking_advice(default)
    all_of_it = default | {"data": {"features": [item, genre | {"file": "genres.tsv"}, seen]}}
    assert ranking_advice(all_of_it).startswith("tune, over optimizer.tables.lr")
    brand = {"name": "brand", "entity": "item", "column": "b"}
    assert ranking_advice(default | {"data": {"features": [item, brand, seen]}}).startswith("tune")
    city = {"name": "city", "entity": "user", "file": "users.csv"}  # says nothing of items
    of_users = default | {"data": {"features": [item, city, seen]}}
    assert ranking_advice(of_users) == ranking_advice(default)
    [worse] = ranking_verdicts(compared(0.2, 0.3, -0.15, -0.05), 10, advice)
    assert worse.text.endswith(f"-0.1500 to -0.0500; to try: {advice}")
    for low, high in ((-0.15, 0.05), (0.05, 0.15)):
        [verdict] = ranking_verdicts(compared(0.2, 0.3, low, high), 10, advice)
        assert "to try" not in verdict.text
    [worse] = ranking_verdicts(compared(0.2, 0.3, -0.15, -0.05), 10)
    assert worse.kind == "worse" and "to try" not in worse.text
    sparse = compared(0.2, 0.3, -0.15, -0.05)
    sparse.figures["ease of 9 items"] = sparse.figures.pop("ease")
    sparse.differences["ease of 9 items"] = sparse.differences.pop("ease")
    [worse] = ranking_verdicts(sparse, 10, advice)
    assert worse.title == "Worse than ease of 9 items" and worse.text.endswith(advice)
    other = compared(0.2, 0.3, -0.15, -0.05)
    other.figures["best_possible"] = other.figures.pop("ease")
    other.differences["best_possible"] = other.differences.pop("ease")
    [verdict] = ranking_verdicts(other, 10, advice)  # a file of scores, no baseline
    assert verdict.kind == "worse" and "to try" not in verdict.text


@pytest.mark.parametrize(
    ("rows", "kind"), [(0, None), (9, None), (10, "even"), (49, "even"), (50, "worse")]
)
def test_unknown_items_are_named_from_a_tenth_on(rows: int, kind: str | None) -> None:
    verdicts = unknown_verdicts(Unknown(100, {"user": 0, "item": rows}), "test", False)
    assert [v.kind for v in verdicts] == ([kind] if kind else [])


def test_the_text_of_unknown_values_gives_their_share() -> None:
    unknown = Unknown(1200, {"item": 240, "ad": 1200, "often_empty": 1000})
    of_items, of_ads = unknown_verdicts(unknown, "test", only_positives=True)
    assert str(of_items) == (
        "Some test positives have an unknown item: 240 of 1,200 test positives (20.0%) have an "
        "item that training rows lack, so the model cannot tell these apart; give items fields "
        "that describe them, or hold out rows of known items (data.split)"
    )
    assert str(of_ads) == (
        "Many test positives have an unknown ad: 1,200 of 1,200 test positives (100.0%) have no "
        "value of ad that training rows have, so the model cannot tell these apart; hold out rows "
        "with known values (data.split), or leave ad out"
    )
    [of_users] = unknown_verdicts(Unknown(1200, {"user": 120}), "valid", only_positives=False)
    assert str(of_users) == (
        "Some valid rows have an unknown user: 120 of 1,200 valid rows (10.0%) have a user that "
        "training rows lack, so the model cannot tell these apart; give users fields that describe "
        "them, or hold out rows of known users (data.split)"
    )
    assert unknown_verdicts(Unknown(0, {"item": 0}), "test", True) == []


def test_steered_rankings_are_shown_by_their_cost_and_gain_and_never_judged() -> None:
    figures = {
        "model": {"ndcg@10": 0.3, "coverage@10": 0.25, "novelty@10": 5.5},
        "model, steered": {"ndcg@10": 0.28, "coverage@10": 0.5, "novelty@10": 6.25},
        "ease": {"ndcg@10": 0.2},
    }
    differences = {"model, steered": {"ndcg@10": (0.01, 0.03)}, "ease": {"ndcg@10": (0.05, 0.15)}}
    compared = Comparison(figures, {name: {} for name in figures}, differences, NO_INSIGHT)
    steered, other = ranking_verdicts(compared, 10)
    assert (str(steered), steered.kind) == (
        "Steered rankings: NDCG@10 0.3000 to 0.2800, 95 % interval of the loss +0.0100 to "
        "+0.0300; coverage 0.250 to 0.500, novelty 5.500 to 6.250",
        "even",
    )
    assert other.title == "Better than ease"


def test_no_verdict_on_rankings_without_another_ranking() -> None:
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


def test_a_loss_above_that_of_a_constant_is_named_with_both() -> None:
    # A quarter of positives: a constant has -(0.25 ln 0.25 + 0.75 ln 0.75) = 0.562335.
    rows = {"ne": 1.0470, "log_loss": 1.0470 * 0.562335, "majority_rate": 0.75}
    [verdict] = row_verdicts(rows, "valid", is_ranked=True)
    assert str(verdict) == (
        "Worse than a constant: NE 1.0470 on valid rows: always predicting the mean label has a "
        "lower log loss than 0.5888"
    )


def test_each_of_several_targets_is_judged_by_its_own_figures() -> None:
    rows = {"click.ne": 0.75, "click.log_loss": 0.5, "click.majority_rate": 0.75}
    rows |= {"buy.ne": 1.25, "buy.log_loss": 0.25, "buy.majority_rate": 0.9}
    settings = {"data": {"task": "ctr", "interactions": {"labels": ["click", "buy"]}}}
    state = {"step": 10, "config": settings, "trainer": {"monitor": None}}
    verdicts = verdicts_on(state, losses(0.5), rows, Unknown(9, {}), "test", None, 10)
    assert [(str(verdict), verdict.kind) for verdict in verdicts] == [
        (
            "click: Better than a constant: NE 0.7500 on test rows: log loss 0.5000 is 25.0% below "
            "that of always predicting the mean label",
            "better",
        ),
        (
            "buy: Worse than a constant: NE 1.2500 on test rows: always predicting the mean label "
            "has a lower log loss than 0.2500",
            "worse",
        ),
    ]


def test_a_target_may_be_named_like_another_one_with_a_dot() -> None:
    rows = {"buy.ne": 0.75, "buy.log_loss": 0.5, "buy.majority_rate": 0.75}
    rows |= {"buy.again.ne": 1.25, "buy.again.log_loss": 0.25, "buy.again.majority_rate": 0.9}
    for targets in (["buy", "buy.again"], ["buy.again", "buy"]):
        verdicts = row_verdicts(rows, "test", is_ranked=False, targets=targets)
        assert [verdict.title for verdict in verdicts] == [
            f"{target}: {'Better' if target == 'buy' else 'Worse'} than a constant"
            for target in targets
        ]


def test_rows_of_one_label_are_named() -> None:
    rows = {"ne": NAN, "log_loss": 0.6, "majority_rate": 1.0}
    [verdict] = row_verdicts(rows, "test", is_ranked=False)
    assert (verdict.title, verdict.kind) == ("All test labels are the same", "worse")
    assert verdict.text == "AUC and NE are undefined; hold out rows of both labels (data.split)"
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


@pytest.mark.parametrize(
    ("figure", "name"), [("ndcg@10", "NDCG@10"), ("recall@10", "Recall@10"), ("auc", "auc")]
)
def test_steps_and_figures_are_written_for_people(figure: str, name: str) -> None:
    validations = [
        ValidEvent(step=1000 * n, epoch=n, **{figure: value})
        for n, value in enumerate((0.25, 0.5, 0.123456, 0.25), 1)
    ]
    [verdict] = training_verdicts(validations, 4000, figure)
    assert verdict.text == (
        f"validation {name} 0.2500 at this one (step 4,000), 0.5000 at step 2,000"
    )
    [verdict] = training_verdicts(validations, 2000, figure)
    assert verdict.text == (
        f"validation {name} was best at step 2,000 (0.5000); at the last one, step 4,000, it is "
        f"0.2500"
    )
    [verdict] = training_verdicts(validations[:2], 2000, figure)
    assert verdict.text == (
        f"validation {name} 0.5000 at the last step, 2,000, is the best so far, after 0.2500"
    )


def test_equal_checkpoints_are_as_good_as_each_other() -> None:
    validations = losses(0.25, 0.25)
    assert training_verdicts(validations, 20, "log_loss") == []
    assert training_verdicts(validations, 10, "log_loss") == []
    # By a figure that is missing at this step, no checkpoint is judged.
    assert training_verdicts(losses(0.25, None, 0.5), 20, "log_loss") == []


def test_a_better_checkpoint_after_the_measured_one_is_not_called_an_earlier_one() -> None:
    [verdict] = training_verdicts(losses(0.5, 0.375, 0.125), 20, "log_loss")
    assert verdict.title == "Still improving when training ended"


@pytest.mark.parametrize("loss_at_start", [0.5, None])
def test_a_fitted_start_that_training_did_not_improve_on_is_named(
    loss_at_start: float | None,
) -> None:
    start = ValidEvent(step=0, epoch=0, log_loss=loss_at_start)
    verdicts = training_verdicts([start, *losses(0.498, 0.52)], 0, "log_loss")
    if loss_at_start is None:  # it was not measured
        assert verdicts == []
        return
    [verdict] = verdicts
    assert (str(verdict), verdict.kind) == (
        "Training did not clearly improve on the fitted start: validation log loss 0.5000 at the "
        "start, which is used; 0.4980 at best",
        "even",
    )


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
        losses(0.5, 0.25, 0.2499),  # a plateau
        losses(None, None, None),  # a figure that was never defined
        [ValidEvent(step=10, epoch=1, ne=0.9)],
    ],
)
def test_training_that_ended_at_a_plateau_has_no_verdict(validations: list[ValidEvent]) -> None:
    assert training_verdicts(validations, 10 * len(validations), "log_loss") == []


@pytest.mark.parametrize("values", [(0.5, 0.25, 0.125), (0.5, 0.5, 0.125), (0.5, 0.125)])
def test_training_that_still_helped_at_its_end_is_named(values: tuple[float, ...]) -> None:
    validations, step = losses(*values), 10 * len(values)
    for monitor in ("log_loss", "auc"):
        [verdict] = training_verdicts(validations, step, monitor, {"epochs": 7})
        assert (verdict.title, verdict.kind) == ("Still improving when training ended", "even")
        assert verdict.text.endswith("; to try: trainer.epochs=14")
    settings = {"epochs": 7, "max_steps": 30}
    [verdict] = training_verdicts(validations, step, "log_loss", settings)
    assert verdict.text == (
        f"validation log loss 0.1250 at the last step, {step}, is the best so far, after "
        f"{values[-2]:.4f}; to try: trainer.max_steps=60"
    )


def test_ease_alone_is_not_judged_by_the_training_that_it_does_not_use() -> None:
    validations, rows = losses(0.5, 0.25, 0.375, 0.3125), {"ne": 0.75, "log_loss": 0.5}
    rows |= {"majority_rate": 0.75}
    settings = {"trainer": {"epochs": 9, "patience": 2}}
    state = {"step": 20, "config": settings, "trainer": {"monitor": "log_loss"}}
    for is_ease_alone, title in ((False, "Best before the end"), (True, "The model is EASE alone")):
        marker = state | {"is_ease_alone": is_ease_alone}
        verdicts = verdicts_on(marker, validations, rows, Unknown(9, {}), "test", None, 10)
        assert [v.title for v in verdicts] == ["Better than a constant", title]
        assert not any("baseline" in v.text for v in verdicts)  # of an earlier version
    marker = state | {"is_ease_alone": True, "is_ease_standardized": True}
    *_, verdict = verdicts_on(marker, validations, rows, Unknown(9, {}), "test", None, 10)
    assert "; unlike the baseline's, its scores are divided by the deviation" in verdict.text


def test_a_run_that_stopped_early_was_not_too_long() -> None:
    validations = losses(0.5, 0.25, 0.375, 0.3125)
    [verdict] = training_verdicts(validations, 20, "log_loss", {"epochs": 9, "patience": 2})
    assert (verdict.title, verdict.kind) == ("Best before the end", "even")


@pytest.mark.parametrize(
    ("values", "lower_is_better", "kind", "text"),
    [
        ((0.5, 0.4, 0.3), True, "improving", "Validation was still falling at the last step."),
        ((0.5, 0.6, 0.7), False, "improving", "Validation was still rising at the last step."),
        ((0.5, 0.3, 0.4), True, "worsened", "Validation was best at step 1 (0.3000) and had risen "
         "to 0.4000 by the last step."),
        ((0.5, 0.7, 0.6), False, "worsened", "Validation was best at step 1 (0.7000) and had "
         "fallen to 0.6000 by the last step."),
        ((0.5, 0.3, 0.301), True, "flat", ""),
        ((0.5, 0.301, 0.3), True, "flat", ""),
        ((0.5, 0.5), True, "flat", ""),
        ((4.0, 3.0, 3.5, 3.0), True, "flat", ""),  # the first of equal ones counts as the best
        # A change of exactly NOTABLE, a hundredth of the curve's range, is one.
        ((100.0, 1.0, 0.0), True, "improving", "Validation was still falling at the last step."),
        ((100.0, 0.0, 1.0), True, "worsened", "Validation was best at step 1 (0.0000) and had "
         "risen to 1.0000 by the last step."),
    ],
)  # fmt: skip
def test_the_end_of_a_curve_is_put_into_words(
    values: tuple[float, ...], lower_is_better: bool, kind: str, text: str
) -> None:
    trend = trend_of(list(enumerate(values)), lower_is_better)
    assert trend is not None
    assert (trend.kind, sentence(trend, lower_is_better)) == (kind, text)
    assert trend_of([(1, 0.5)], True) is None and sentence(None, True) == ""


def test_the_step_of_the_best_validation_has_thousands_separators() -> None:
    trend = trend_of([(1000, 0.75), (25_000, 0.25), (30_000, 0.5)], True)
    assert sentence(trend, True).startswith("Validation was best at step 25,000 (0.2500)")
    assert trend_of([(1, 0.5), (2, 0.25)], True) is not None


@pytest.mark.parametrize(
    ("loss", "monitor", "titles"),
    [
        ("bce", "log_loss", ["Worse than a constant", "An earlier checkpoint was better"]),
        ("bce", None, ["Worse than a constant", "An earlier checkpoint was better"]),
        # It gives no probabilities, and was best at the last step.
        ("softmax", "ndcg@10", ["Still improving when training ended"]),
        ("softmax", None, ["Still improving when training ended"]),
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
    verdicts = verdicts_on(state, validations, rows, Unknown(9, {}), "test", None, 10)
    assert [v.title for v in verdicts] == titles


@pytest.mark.parametrize(
    ("data", "counted"),
    [
        ({}, "test positives"),
        ({"task": "implicit"}, "test positives"),
        ({"task": "ctr"}, "test rows"),
    ],
)
def test_a_report_s_verdicts_are_those_on_rankings_rows_and_what_is_unknown(
    data: dict[str, str], counted: str
) -> None:
    settings = {"data": data, "trainer": {"loss": "bce"}}
    state = {"step": 10, "config": settings, "trainer": {"monitor": None}}
    rows = {"ne": 0.75, "log_loss": 0.5, "majority_rate": 0.75}
    given = state, losses(0.5), rows, Unknown(9, {"item": 9}), "test"
    comparison = compared(0.2, 0.3, -0.15, -0.05)
    worse, unknown = verdicts_on(*given, comparison, 10)
    assert worse.title == "Worse than ease" and "; to try: the field {name: seen" in worse.text
    assert unknown.title == f"Many {counted} have an unknown item"
    without, unknown = verdicts_on(*given, None, 10)
    assert without.title == "Better than a constant"
    assert unknown.title == f"Many {counted} have an unknown item"
    # A marker of an earlier version names neither the loss nor the task.
    old = {**state, "config": {}}, *given[1:]
    assert [v.kind for v in verdicts_on(*old, None, 10)] == ["better", "worse"]
