"""Tables in plain text, and the page of a run."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape

from deepfm_dist.data.cards import Cards
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.events import TrainEvent, ValidEvent, read_events
from deepfm_dist.messages import format_bytes
from deepfm_dist.ranking.evaluation import Comparison
from deepfm_dist.ranking.output import RankingFiles
from deepfm_dist.ranking.profiles import Example, Groups, Insight, profile
from deepfm_dist.ranking.reasons import Reason
from deepfm_dist.recipe import Choice
from deepfm_dist.report import page as page_module
from deepfm_dist.report import plots as plots_module
from deepfm_dist.report.page import Report, write_page
from deepfm_dist.report.plots import Plotter
from deepfm_dist.report.tables import metrics_table, ranking_table, trials_table
from deepfm_dist.report.verdicts import Verdict, _ease_alone
from deepfm_dist.training.evaluation import Unknown
from deepfm_dist.training.metrics import Calibration, order_figures
from deepfm_dist.training.search import Trial
from tests.oracles.row_figures import click_figures
from tests.pages import PICTURES, watched

NO_INSIGHT = Insight({}, 0, (), 0, (), [])


def test_figures_are_shown_next_to_each_other() -> None:
    figures = {"model": {"recall@5": 0.5, "recall@10": 0.6}, "ease": {"recall@5": 0.25}}
    intervals = {"model": {"recall@5": (0.4, 0.6)}, "ease": {"recall@5": (0.2, 0.3)}}
    comparison = Comparison(figures, intervals, {"ease": {"recall@5": (0.1, 0.4)}}, NO_INSIGHT)
    lines = metrics_table("valid", {"auc": 0.75}, comparison, (5,)).splitlines()
    assert lines[0] == "valid rows"
    assert lines[1].split() == ["auc", "0.7500"]
    assert lines[3] == "valid rankings, whole catalogue, K = 5"
    assert [line.rpartition("  ")[0].strip() for line in lines[5:]] == [
        "model", "95 %, from", "95 %, to",
        "ease", "95 %, from", "95 %, to", "model minus it, from", "model minus it, to",
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[4:]] == [
        "recall",
        *["0.5000", "0.4000", "0.6000"],
        *["0.2500", "0.2000", "0.3000", "0.1000", "0.4000"],
    ]
    assert lines[-1].startswith("  model minus it, to")
    assert metrics_table("test", {"auc": 1}, None, (5,)) == "test rows\nauc    1.0000"
    large = Comparison({"model": {"a@5": 99.5, "b@5": 100.0}}, {"model": {}}, {}, NO_INSIGHT)
    last_line = metrics_table("valid", {"auc": 1}, large, (5,)).splitlines()[-1]
    assert last_line.split() == ["model", "99.5000", "100.0"]
    composition = "3 positives and 5 negatives"
    first = metrics_table("test", {"auc": 1}, None, (5,), composition).splitlines()[0]
    assert first == "test rows: 3 positives and 5 negatives"


def test_ids_next_to_missing_ones_stay_integers(sample: PreparedDataset, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    table = pa.table({"request": [0, 1], "user_id": [7, None], "item_id": [1, 2], "rank": [1, 1]})
    pq.write_table(table, path)
    text = ranking_table(RankingFiles(path, None, path, 2, 2, 1, 2), sample)
    assert re.search(r"request 0\n.*\n.*\n1 +7 +1\b", text)
    assert "NaN" not in text and "None" not in text.partition("request 1")[2].partition("title")[0]


def test_reasons_are_one_cell_each(sample: PreparedDataset, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    reasons = [
        {"field": "seen", "value": "17", "share": 0.43501},
        {"field": "price", "value": None, "share": -0.25},
    ]
    explanation = {"base": 0.0, "reasons": reasons, "other": 1.0, "remainder": 0.0}
    table = {"user_id": [7], "item_id": [1], "rank": [1], "explanation": [explanation]}
    pq.write_table(pa.table(table), path)
    text = ranking_table(RankingFiles(path, None, path, 1, 1, 1, 1), sample)
    assert "seen 17 +0.435, price -0.250" in text and "{" not in text


def test_the_best_titles_of_three_users_are_shown(sample: PreparedDataset, tmp_path: Path) -> None:
    ids = [int(i) for i in sample.entity_ids("item").to_pylist()[1:41]]
    titles = sample.titles()
    assert titles is not None
    path = tmp_path / "r.parquet"
    table = {"user_id": [7] * 40 + [5] * 40 + [6] * 40 + [9] * 40, "item_id": ids * 4}
    table |= {"score": [0.5] * 160, "rank": [*range(1, 41)] * 4}
    pq.write_table(pa.table(table), path)
    text = ranking_table(RankingFiles(path, tmp_path / "r.csv", path, 4, 160, 40, 4), sample)
    blocks = text.split("\n\n")
    assert [b.splitlines()[0] for b in blocks[:3]] == ["user 7", "user 5", "user 6"]
    for block in blocks[:3]:
        shown = block.splitlines()[3:]
        assert [int(line.split()[0]) for line in shown] == list(range(1, 11))
        for line, item, title in zip(shown, ids, titles.to_pylist()[1:], strict=False):
            assert line.split(maxsplit=3)[1:] == [str(item), "0.5000", title]
    assert blocks[3].splitlines() == [
        "4 users, 160 rows",
        f"written: {tmp_path / 'r.csv'}",
        f"written: {path}",
    ]


def test_no_more_is_read_than_is_shown(sample: PreparedDataset, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    item = int(sample.entity_ids("item")[1].as_py())
    table = pa.table({"user_id": range(900), "item_id": [item] * 900, "score": [0.5] * 900})
    table = table.append_column("rank", pa.array([1] * 900))
    pq.write_table(table, path, row_group_size=300)
    whole = path.read_bytes()
    second = pq.read_metadata(path).row_group(1).column(0)
    begin = second.dictionary_page_offset or second.data_page_offset
    path.write_bytes(whole[:begin] + b"?" * 200 + whole[begin + 200 :])
    with pytest.raises((OSError, pa.ArrowInvalid)):
        pq.read_table(path)
    assert "user 2\n" in ranking_table(RankingFiles(path, path, path, 900, 900, 1, 900), sample)


@pytest.fixture(scope="module")
def page(sample: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an invented run on the sample's users and items; not to be changed."""
    folder = tmp_path_factory.mktemp("page") / "invented"
    folder.mkdir()
    events = []
    for step in range(50, 2001, 50):
        figures = {"log_loss": 20 / step, "ne": 25 / step, "auc": 1 - 10 / step}
        seconds = {"data": 0.5, "forward": 1.5}
        events.append({"event": "train", "step": step, "rows_per_s": 12_345, "seconds": seconds})
        events[-1] |= figures
        if step % 500 == 0:
            events.append({"event": "valid", "step": step, **figures, "user_auc": None})
    events.append({"event": "end", "step": 2000, "peak_memory_gib": [0.25, 0.5]})
    # What other commands, another version and a crash leave in the log is no part of the page.
    events.append({"event": "recommend", "peak_memory_gib": [99.0], "seconds": 1234.5})
    events.append({"event": "of another version", "seconds": 1234.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    table = {"table": "user", "rows": 70_000, "row_width": 20, "sharding": "row_wise"}
    plan = {"ranks": 2, "device": "cpu", "tables": [{**table, "ranks": "all", "kernel": "fused"}]}
    (folder / "plan.json").write_text(json.dumps(plan))
    random = np.random.default_rng(1)
    labels = (random.random(500) < 0.2).astype(np.float32)
    logits = random.normal(-1, 1, 500).astype(np.float32)
    relevant = Jagged.from_pairs([0, 0, 1, 2], [7, 8, 9, 10], 3)
    activity = Groups.by_quantile(np.array([3, 30, 3000]))
    popularity = Groups.by_quantile(np.array([1, 2, 3, 4]))
    orders = {"model": [[7, 1], [9, 1], [1, 10]], "popularity": [[1, 2], [1, 2], [1, 2]]}
    profiles = {
        name: profile(np.array(ranked), relevant, activity, popularity)
        for name, ranked in orders.items()
    }
    figures = {"ndcg@2": 0.75, "coverage@2": 0.01}, {"ndcg@2": 0.25, "coverage@2": 0.005}
    reasons = [[Reason("seen", "x", 0.5, item=9), Reason("genre", "Noir", -0.25)], []]
    example = [Example(1, [7, 1], [*range(3, 15), 0], [7, 8], reasons)]
    comparison = Comparison(
        dict(zip(orders, figures, strict=True)),
        {name: {"ndcg@2": (0.125, 0.875)} for name in orders},
        {"popularity": {"ndcg@2": (0.375, 0.625)}},
        Insight(profiles, 3, activity.bounds, 4, popularity.bounds, example),
    )
    report = Report(
        folder=folder,
        config_yaml="run: {name: <invented>}\n",
        checkpoint=Path("step_00002000"),
        dataset=sample,
        split="test",
        loss="bce",
        rows=click_figures(labels, logits),
        unknown=Unknown(100, {"user": 0, "item": 25}),
        calibrations={"": Calibration([0.1, 0.7], [0.2, 0.6], [5, 5])},
        comparison=comparison,
        cutoffs=(2,),
        events=read_events(folder / "metrics.jsonl"),
        verdicts=[
            Verdict("Better than popularity", "by <far>", "better"),
            Verdict("Worse than a constant", "NE 1.0470 on test rows", "worse"),
        ],
        chosen=[Choice("optimizer.tables.decay_steps", "w" * 60, "because")],
    )
    return write_page(report)


def test_the_page_shows_what_a_user_has_and_gets(page: Path, sample: PreparedDataset) -> None:
    text, cards = page.read_text(), Cards(sample)
    for row in (7, 1, 14, 5):
        assert ", ".join(cards(row).tags) in text
    history, ranked = (
        re.findall(r'<span class="title">(.*?)</span>', part)
        for part in text.partition("<h3>Latest history</h3>")[2].split("<h3>Recommended</h3>")
    )
    # The latest ten of the history, without the item that has no row, and the ranking in order.
    assert history == [str(escape(cards(row).title)) for row in range(14, 4, -1)]
    assert ranked == [str(escape(cards(row).title)) for row in (7, 1)]
    assert text.count("✓ hit") == 1
    assert f"seen {html.escape(str(cards(9).title))} +0.50; genre Noir -0.25</span>" in text
    user = sample.entity_ids("user")[1]
    assert f"User {user}: 13 training items,\n      1 of 2 held-out items found" in text


def test_the_page_starts_with_the_verdicts(page: Path) -> None:
    text = page.read_text()
    shown = re.findall(
        r'<li class="(\w+)">\s*<strong>(.*?)</strong>\s*<span>(.*?)</span>', text, re.S
    )
    assert shown == [
        ("better", "Better than popularity", "by &lt;far&gt;"),
        ("worse", "Worse than a constant", "NE 1.0470 on test rows"),
    ]
    assert re.search(r"\.verdicts li\.worse \{ border-color: var\(--bad\)", text)
    assert "compared by a paired bootstrap over users" in text


def test_the_page_explains_each_figure_on_rows(page: Path) -> None:
    text = page.read_text()
    meaning = '<th scope="row">{}</th><td class="number">[^<]*</td><td class="muted">{}</td>'
    for name, words in (
        ("auc", "chance that a positive row scores above a negative one; 0.5 is guessing"),
        ("log_loss", "mean cross-entropy in nats; lower is better"),
        ("ne", "log loss divided by that of always predicting the mean label; below 1 is better"),
        ("calibration", "mean prediction divided by mean label; 1 is right"),
        ("accuracy", "share of rows whose probability is on the label's side of one half"),
        ("majority_rate", "accuracy of always predicting the more frequent label"),
    ):
        assert re.search(meaning.format(name, re.escape(str(escape(words)))), text), name
    assert page_module._MEANING["user_auc"] == "the same within each user, weighted by rows"
    notes = re.findall(r'<p class="note">(The .*?|Of .*?)</p>', text)
    assert notes == [
        "The negatives among these rows are sampled, 4 for each positive. AUC, log loss, NE, "
        "calibration and accuracy refer to this mix, not to how often users choose an item.",
        "Of 100 test positives, 25 (25.0%) have no known item: one that training rows lack, one "
        "below min_count, or none.",
    ]


def test_the_page_shows_rankings_with_intervals_and_differences(page: Path) -> None:
    text = page.read_text()
    # The model's line, the baseline's, and the paired difference of the two.
    lines = re.findall(r'<tr class="(\w+)"><th scope="row">(.*?)</th>(.*?)</tr>', text, re.S)
    assert [line[:2] for line in lines] == [
        ("model", "model"), ("other", "popularity"), ("difference", "model minus popularity")
    ]  # fmt: skip
    cell = '<td class="number">{}<small>{} to {}</small></td>'
    for line, figures in zip(
        lines,
        [("0.7500", "0.1250", "0.8750"), ("0.2500", "0.1250", "0.8750"),
         ("+0.5000", "+0.3750", "+0.6250")],
        strict=True,
    ):  # fmt: skip
        assert cell.format(*figures) in line[2]


def test_every_plot_of_the_page_has_its_title_and_caption(page: Path) -> None:
    figures = re.findall(
        r'<figure id="([^"]*)">\s*<h3>(.*?)</h3>\s*(<svg.*?)<figcaption>(.*?)</figcaption>',
        page.read_text(),
        re.S,
    )
    assert {name for name, *_ in figures} == PICTURES
    shown = {
        name: (html.unescape(title), html.unescape(caption)) for name, title, _, caption in figures
    }
    # Log loss is 20 / step, NE 25 / step and AUC 1 - 10 / step at steps 500 to 2,000.
    assert shown["learning-log_loss"] == (
        "Log loss",
        "Mean cross-entropy in nats; lower is better. Validation was still falling at the last "
        "step.",
    )
    assert shown["learning-ne"] == (
        "Normalized entropy",
        "Log loss divided by that of always predicting the mean label; 1 is no better than that. "
        "Validation was still falling at the last step.",
    )
    assert shown["learning-auc"] == (
        "AUC",
        "Chance that a positive row scores above a negative one; 0.5 is guessing. Validation was "
        "still rising at the last step.",
    )
    title, caption = shown["calibration"]
    assert title == "Calibration"
    assert caption.startswith("Each point is one of 2 bins of about 5 rows, ordered by prediction.")
    assert caption.endswith(" The negatives among these rows are sampled.")
    assert shown["recall-over-k"] == (
        "Recall@K",
        "Share of a user's held-out items among the first K; mean over users.",
    )
    assert shown["ndcg-over-k"] == (
        "NDCG@K",
        "The same with hits at the top counting more; 1 is the best possible order.",
    )
    assert shown["by-activity"] == (
        "NDCG@2 by user activity",
        "3 users in groups of about equal size, the least active first.",
    )
    assert shown["by-popularity"] == (
        "Recall@2 by item popularity",
        "4 held-out items in groups of about equal size, rarest first.",
    )
    assert shown["coverage"] == (
        "Catalogue coverage, K = 2", "Share of items recommended to at least one user."
    )  # fmt: skip
    # 40 windows of 0.5 s for data and 1.5 s for forward.
    assert shown["times"] == (
        "Where training's time went", "Shares of 80.0 host seconds on rank 0."
    )  # fmt: skip
    assert shown["rows-by-day"][0] == "Rows over time"
    svgs = {name: svg for name, _, svg, _ in figures}
    for name, labels in {
        "times": ["data", "forward", "25.0%", "75.0%"],
        "coverage": ["model", "popularity", "1.0%", "0.5%"],
        "recall-over-k": ["K", "model", "popularity"],
        "by-activity": ["training items of the user", "model", "popularity"],
        "by-popularity": ["training rows of the item", "model", "popularity"],
        "calibration": ["mean predicted probability", "share of positives", "perfect", "model"],
    }.items():
        for label in labels:
            assert f">{label}</text>" in svgs[name], (name, label)


def test_the_page_is_complete(page: Path) -> None:
    text = page.read_text()
    words = " ".join(text.split())
    assert 'genre</th><td class="number">0.75 %</td>' in text  # of 400 items, 3
    density = 100 * 28_798 / (700 * 400)
    assert f"{density:.3g} % are training positives" in words
    assert "36,000 dated rows of all splits, counted by 10-day period" in text
    for shown_text in ("70,000", "row_wise", "run: {name: &lt;invented&gt;}"):
        assert shown_text in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Figures on test rows", "Training", "Rankings in detail", "What the model recommends",
        "The log", "Tables, time and memory", "Configuration", "What to type next",
    ]  # fmt: skip
    assert re.findall(r'<th scope="col"[^>]*>(.*?)</th>', text) == [
        "figure", "value", "meaning",
        "ranking", "ndcg", "coverage",
        "field", "without a value",
        "table", "rows", "row width", "sharding", "ranks", "kernel",
        "setting", "value", "because",
    ]  # fmt: skip
    anchors = re.findall(r'<a href="#(\w+)">(\w+)</a>', text)
    assert anchors == [
        ("figures", "Figures"), ("training", "Training"), ("rankings", "Rankings"),
        ("examples", "Examples"), ("data", "Log"), ("machine", "Machine"),
        ("config", "Configuration"), ("next", "Next"),
    ]  # fmt: skip
    for sentence in (
        "<h3>Rankings, K = 2</h3>",
        "<h3>Sharding plan: 2 x cpu</h3>",
        "better or worse if the 95 % interval of the difference excludes 0. They cover the whole "
        "catalogue, without items that the user has already seen.",
        "95 % bootstrap intervals of the mean over users; of a difference, from the same samples "
        "of users for both rankings. One that excludes 0 is more than chance.",
        "From the least to the most active user. A ✓ marks an item that the user did choose and "
        "that was held out: a hit. Below each item are the three values with the largest shares "
        "of its score.",
        "Last window of training: 12,345 rows/s.",
        "Peak memory by rank: 0.25 GiB, 0.50 GiB.",
        "Chosen from the data, where the configuration leaves a setting out",
        '<th scope="row">optimizer.tables.decay_steps</th>',
        "<td>because</td>",
    ):
        assert sentence in words, sentence
    for command in ("recommend", "similar", "serve", "predict", "export"):
        assert f"python -m deepfm_dist.{command} --run {page.parent}" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', text)) <= set(ids)
    assert not re.findall(r"#00ff\d\d", text)  # every stand-in has its colour


def test_examples_may_have_no_reasons(sample: PreparedDataset) -> None:
    [shown] = page_module._examples(
        sample, replace(NO_INSIGHT, examples=[Example(1, [7, 8], [3], [8], [])])
    )
    assert [(hit, reasons) for _, hit, reasons in shown.ranked] == [(False, []), (True, [])]


def test_a_ranking_has_its_colour_on_every_plot() -> None:
    plotter, values = Plotter(["model", "ease"]), {"ease": [0.25, 0.5]}
    for plot in (
        plotter.over_k("a", "", "", values),
        plotter.groups("b", "", "", "", ["x", "y"], values),
        plotter.shares("c", "", "", {"ease": 0.5}, per_ranking=True),
        plotter.learning("d", "", "", [(1, 0.5), (2, 0.25)], []),  # on training rows alone
    ):
        assert set(re.findall(r"--series-(\d)", plot.svg)) == {"1"}, plot.name
    bars = plotter.groups("b", "", "", "", ["2-30", "31-3,000"], values).svg
    assert ">2-30</text>" in bars and ">31-3,000</text>" in bars
    for plot in (
        plotter.over_k("a", "", "", {"model": [0.25, 0.5]}),
        plotter.shares("c", "", "", {"ease": 0.5}, per_ranking=False),
        plotter.learning("d", "", "", [], [(1, 0.5), (2, 0.25)]),
    ):
        assert set(re.findall(r"--series-(\d)", plot.svg)) == {"0"}, plot.name


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (500, 500), (501, 251), (1001, 335)])
def test_long_curves_are_thinned_and_keep_their_ends(n: int, kept: int) -> None:
    # Every second of 501 points and every third of 1,001, and the last one.
    points = [(float(k), 0.0) for k in range(n)]
    thinned = plots_module._thin(points)
    assert len(thinned) == kept
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])


def test_fields_are_listed_by_their_share_of_missing_values() -> None:
    profile = SimpleNamespace(missing={"a": 0.1, "b": 0.0, "c": 0.5})
    missing = page_module._missing(SimpleNamespace(profile=profile))  # type: ignore[arg-type]
    assert [*missing.items()] == [("c", 0.5), ("a", 0.1)]


def test_a_damaged_plan_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plan.json"
    assert page_module._plan(path) is None and caplog.text == ""
    for damaged in ("{", '{"ranks": 2, "device": "cpu", "tables": []}'):
        caplog.clear()
        path.write_text(damaged)
        assert page_module._plan(path) is None
        assert f"{path}: damaged; the report leaves the sharding plan out" in caplog.text


def test_a_browser_shows_the_page(page: Path, browser: Any) -> None:
    for scheme in ("light", "dark"):
        tab = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
        problems = watched(tab)
        tab.goto(page.as_uri())
        assert problems == []
        for name in PICTURES:
            drawn = tab.locator(f"#{name} svg path")
            box = tab.locator(f"#{name} svg").bounding_box()
            assert box["width"] > 250 and box["height"] > 150, name
            assert drawn.count() > 5, name
            svg = tab.locator(f"#{name} svg")
            assert svg.evaluate("svg => getComputedStyle(svg).overflow") == "visible"  # no cut text
        # The pictures follow the page's colours, and nothing makes a telephone scroll sideways.
        colours = tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document"
            ".querySelector('#recall-over-k svg text')).fill]"
        )
        dark, light = (min(colours, key=_brightness), max(colours, key=_brightness))
        assert colours == ([light, dark] if scheme == "light" else [dark, light])
        assert _brightness(light) - _brightness(dark) > 150
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        tab.set_viewport_size({"width": 1280, "height": 800})
        cell = tab.locator("table.wide td").first.evaluate("cell => cell.outerHTML")
        tab.locator("table.wide tr").evaluate_all(  # as many figures as a run has
            "(rows, cell) => rows.forEach(row => row.innerHTML += cell.repeat(11))", cell
        )
        assert tab.locator("table.wide").evaluate("table => table.scrollWidth") <= 1280
        tab.close()


def _brightness(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12345, "0.1235"), (99.99994, "99.9999"), (100, "100.0"), (-1234.56, "-1,234.6")],
)
def test_figures_have_as_many_digits_as_say_something(value: float, shown: str) -> None:
    assert page_module._figure(value) == shown


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.979, "predictions are too low: 0.979 times the share of positives."),
        (0.98, "predictions are right: 0.980 times"),
        (1.02, "predictions are right: 1.020 times"),
        (1.021, "predictions are too high: 1.021 times"),
        (float("nan"), None),
    ],
)
def test_the_caption_of_calibration_follows_the_ratio(ratio: float, text: str | None) -> None:
    curve = Calibration([0.1, 0.7], [0.2, 0.6], [1234, 1233])
    plot = page_module._calibration(Plotter(), curve, {"calibration": ratio})
    first = "Each point is one of 2 bins of about 1,234 rows, ordered by prediction."
    assert plot.caption.startswith(first)
    assert (plot.caption == first) if text is None else (text in plot.caption)


def test_a_figure_of_a_target_with_a_dot_in_its_name_is_explained() -> None:
    targets = ["buy", "buy.again"]
    meaning = page_module._meaning("auc", ())
    assert meaning
    assert page_module._meaning("buy.again.auc", targets) == meaning
    assert page_module._meaning("buy.auc", targets) == meaning
    assert page_module._meaning("auc", targets) == f"the targets' weighted mean: {meaning}"


def test_names_of_targets_may_have_any_characters() -> None:
    curve = Calibration([0.1, 0.7], [0.2, 0.6], [1234, 1233])
    plot = Plotter().calibration(curve, "", 'buy "now" \\d <b>')
    assert re.fullmatch(r"[\w-]+", plot.name)
    [label] = re.findall(r'^<svg [^>]* aria-label="([^"]*)">', plot.svg)
    assert html.unescape(label) == plot.title == 'Calibration of buy "now" \\d <b>'


def test_a_plot_of_training_has_what_was_measured(tmp_path: Path) -> None:
    events = [
        TrainEvent(step=50, log_loss=0.5, ne=None, seconds={"data": 1.0, "forward": 0.0}),
        TrainEvent(step=100, log_loss=0.4, ne=None, seconds={"data": 0.5, "forward": 4.5}),
        TrainEvent(step=150, ne=None, seconds={"data": None, "gone": None}),
        ValidEvent(step=100, epoch=1, log_loss=0.45),
    ]
    [plot] = page_module._learning(Plotter(), events, "bce", 10)  # neither NE nor AUC has a value
    assert (plot.name, plot.title) == ("learning-log_loss", "Log loss")
    assert plot.caption == "Mean cross-entropy in nats; lower is better."
    events += [ValidEvent(step=s, log_loss=v) for s, v in ((200, 0.40), (300, 0.42))]
    [worsened] = page_module._learning(Plotter(), events, "bce", 10)
    assert worsened.caption.endswith(
        "Validation was best at step 200 (0.4000) and had risen to 0.4200 by the last step."
    )
    for label in ("training, before learning", "validation", "step"):
        assert f">{label}</text>" in plot.svg
    [without] = page_module._learning(Plotter(), events[:3], "bce", 10)
    assert ">validation</text>" not in without.svg
    seconds = page_module._seconds(events)
    assert seconds == {"data": 1.5, "forward": 4.5}
    times = page_module._times(Plotter(), seconds)
    assert times is not None
    assert times.caption == "Shares of 6.0 host seconds on rank 0."
    for label in ("data", "forward", "25.0%", "75.0%"):
        assert f">{label}</text>" in times.svg
    assert page_module._times(Plotter(), {}) is None


def test_a_model_of_an_order_is_not_measured_as_probabilities() -> None:
    figures = {"auc": 0.75, "user_auc": 0.5, "log_loss": 4.0, "buy.ne": 8.0, "accuracy": 0.25}
    assert order_figures(figures) == {"auc": 0.75, "user_auc": 0.5}
    events = [
        TrainEvent(step=50, loss=4.5),
        TrainEvent(step=100, loss=3.5),
        ValidEvent(step=50, auc=0.625, log_loss=0.75, ne=1.5, **{"ndcg@5": 0.25, "ndcg@10": 0.5}),
        ValidEvent(step=100, auc=0.625, log_loss=1.5, ne=3.0, **{"ndcg@5": 0.25, "ndcg@10": 0.25}),
    ]
    plots = page_module._learning(Plotter(), events, "softmax", 10)
    assert [plot.title for plot in plots] == ["Loss", "NDCG@10", "AUC"]
    assert plots[0].caption == "Mean training loss (softmax); lower is better."
    assert plots[1].caption.endswith(
        "Validation was best at step 50 (0.5000) and had fallen to 0.2500 by the last step."
    )


def test_the_page_of_rows_has_no_rankings(
    sample: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "_missing", lambda manifest: {})
    rows = click_figures(np.array([0.0, 1, 0, 1]), np.array([-1.0, 1, 2, 0.5]))
    report = Report(
        folder=tmp_path,
        config_yaml="x: 1\n",
        checkpoint=Path("step_00000009"),
        dataset=sample,
        split="valid",
        loss="bce",
        rows=rows,
        unknown=Unknown(3600, {"user": 0, "item": 0}),
        calibrations={"": Calibration([0.1, 0.7], [0.2, 0.6], [2, 2])},
        comparison=None,
        cutoffs=(5,),
        events=[],
    )
    path = write_page(report)
    text = path.read_text()
    assert "Figures on valid rows" in text and "· step_00000009 · valid rows" in text
    assert "computed after the loop" not in text
    of_refit = replace(report, checkpoint=Path("run/refit/checkpoints/step_00000009"))
    other = write_page(of_refit, "refit.html").read_text()
    assert "· refit/step_00000009 · valid rows" in other
    assert "<code>refit</code>,\n  which was computed after the loop.</p>" in other
    for marker in ({}, {"is_ease_standardized": True}):
        of_ease = replace(of_refit, verdicts=[_ease_alone(marker)])
        alone = write_page(of_ease, "alone.html").read_text()
        assert "after the loop: EASE alone, which has nothing of what the curves show.</p>" in alone
    for absent in (
        *('verdicts">', "Rankings", "recommend --run", "serve --run", "Sharding plan"),
        *("What the model recommends", "without a value", "Where training", "Last window"),
        *("Peak memory", "Chosen from the data", ">Examples</a>", "was trained with loss"),
    ):
        assert absent not in text, absent
    assert "Every field has a value everywhere." in text
    assert f"predict --run {tmp_path} --input rows.csv" in text
    meanings = re.findall(r'<td class="muted">(.+?)</td>', text)
    assert len(meanings) == len(rows)  # every figure is explained
    splits = sample.manifest.splits
    lead = " ".join(re.findall(r'<p class="lead">(.*?)</p>', text, re.S)[0].split())
    # Negatives of training rows are drawn while training, four of each held-out row before.
    held_out = splits["valid"].rows // 5
    assert lead == (
        f"Training: {splits['train'].rows:,} positives. Validation: {held_out:,} positives and "
        f"{4 * held_out:,} sampled negatives. Test: {held_out:,} positives and {4 * held_out:,} "
        f"sampled negatives. 700 users, 400 items. Fields: user, item, genre."
    )
    assert "All 3,600 valid positives have a known user and item." in text


def test_what_a_short_list_misses_is_under_the_table(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    path = tmp_path / "r.parquet"
    item = int(sample.entity_ids("item")[1].as_py())
    table = {"user_id": [1], "item_id": [item], "score": [0.5], "rank": [1]}
    pq.write_table(pa.table(table), path)
    short = {"candidates": 500, "users": 1000, "overlap": 0.98765, "times_as_fast": 3.25}
    short["deep_share"] = 0.125
    written = RankingFiles(path, path, path, 1, 1, 10, 1, figures={"short_list": short})
    assert (
        "500 candidates: on 1,000 users 0.9877 of the exact top 10, 3.2 times as fast; the "
        "over-arch replaces 0.125 of the pairwise part's top 10"
    ) in ranking_table(written, sample)
    assert "candidates" not in ranking_table(replace(written, figures={}), sample)


def test_trials_are_listed_with_what_they_varied() -> None:
    trials = [
        Trial(
            "000", {"optimizer.dense.lr": 0.0123456, "model.dropout": 0.5}, "complete", 0.87654321
        ),
        Trial("001", {"optimizer.dense.lr": 1e-05}, "failed", None),
    ]
    lines = [line.split() for line in trials_table(trials, "auc").splitlines()]
    assert lines[0] == ["trial", "outcome", "auc", "optimizer.dense.lr", "model.dropout"]
    assert lines[1] == ["000", "complete", "0.87654", "0.012346", "0.5"]
    assert lines[2] == ["001", "failed", "1e-05"]


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (5 << 20, "5 MiB"),
        (int(2.25 * 2**30), "2.25 GiB"), (3 << 40, "3.0 TiB"), (4096 << 40, "4,096.0 TiB"),
    ],
)  # fmt: skip
def test_sizes_have_units(n_bytes: int, shown: str) -> None:
    assert format_bytes(n_bytes) == shown


@pytest.mark.parametrize(
    ("first_day", "days", "counts", "caption"),
    [
        ("2026-01-01", 1, [3, 4], "7 dated rows of all splits, counted by day (UTC)."),
        ("2026-01-01", 7, [3, 4], "7 dated rows of all splits, counted by 7-day period (UTC)."),
        ("2026-01-01", 1, [7], None),  # one bar shows nothing
        (None, 1, [3, 4], None),
    ],
)
def test_dated_rows_are_drawn_by_period(
    first_day: str | None, days: int, counts: list[int], caption: str | None
) -> None:
    profile = SimpleNamespace(first_day=first_day, days_per_period=days, rows_by_period=counts)
    plots = page_module._log_plots(Plotter(), SimpleNamespace(profile=profile))  # type: ignore[arg-type]
    assert [(p.title, p.caption) for p in plots] == (
        [("Rows over time", caption)] if caption else []
    )


@pytest.mark.parametrize(
    ("days", "n_bars", "dates"),
    [
        (1, 2, ["2026-01-01", "2026-01-02"]),
        (1, 8, ["2026-01-01", "2026-01-03", "2026-01-05", "2026-01-07"]),
        (7, 9, ["2026-01-01", "2026-01-22", "2026-02-12"]),
    ],
)
def test_dates_under_bars_leave_room_for_each_other(
    days: int, n_bars: int, dates: list[str]
) -> None:
    svg = Plotter().periods("rows", "Rows", "", "2026-01-01", days, [1] * n_bars).svg
    assert re.findall(r">(\d{4}-\d\d-\d\d)<", svg) == dates


@pytest.mark.parametrize(
    ("task", "positives", "loss", "beginnings"),
    [
        (
            "implicit",
            25,
            "bce",
            ["The negatives among these rows are sampled, 3 for", "Of 100 test p"],
        ),
        (
            "implicit",
            25,
            "bpr",
            [
                "The negatives among these rows are sampled, 3 for each positive. AUC refers",
                "The model was trained with loss=bpr",
                "Of 100 te",
            ],
        ),
        ("implicit", 0, "bce", ["Of 100 test rows, 25 (25.0%) have no known item: one that"]),
        ("ctr", 25, "bce", ["Of 100 test rows, 25 (25.0%) have no known item: one that"]),
    ],
)
def test_notes_say_what_the_figures_refer_to(
    task: str, positives: int, loss: str, beginnings: list[str]
) -> None:
    manifest = SimpleNamespace(
        splits={"test": SimpleNamespace(rows=100, positives=positives)},
        data=SimpleNamespace(task=task),
    )
    report = SimpleNamespace(
        dataset=SimpleNamespace(manifest=manifest),
        split="test",
        loss=loss,
        unknown=Unknown(100, {"user": 0, "item": 25}),
    )
    notes = page_module._notes(report)  # type: ignore[arg-type]
    assert len(notes) == len(beginnings)
    for note, beginning in zip(notes, beginnings, strict=True):
        assert note.startswith(beginning)


def test_groups_are_labelled_by_their_bounds() -> None:
    bounds = [(1, 1), (2, 3000), (5000, 5000)]
    assert page_module._labels(bounds) == ["1", "2-3,000", "5,000"]
