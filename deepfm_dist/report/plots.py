"""SVG plots in the colours of the surrounding page."""

import html
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

for _library in ("matplotlib", "matplotlib.font_manager"):
    # Messages about its font cache do not concern the reader of a report.
    logging.getLogger(_library).setLevel(logging.ERROR)

import numpy as np  # noqa: E402
from matplotlib import rc_context  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter  # noqa: E402

from deepfm_dist.training.metrics import Calibration  # noqa: E402

POINTS = 500
"""Maximum number of points of a curve; longer logs are thinned."""

# Placeholder colours: each is replaced by a variable of the page's style sheet.
_INK, _GRID = "#00ff01", "#00ff02"
_SERIES = [f"#00ff{number:02x}" for number in range(16, 24)]
_VARIABLES = {_INK: "--ink", _GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES)
}
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.figsize": (4.6, 3.0),
    "font.size": 10,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "deepfm_dist",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Plot:
    """A picture with its caption.

    Attributes:
        name: the name of the picture, unique on a page.
        title: what it shows.
        caption: how to read it.
        svg: the picture.
    """

    name: str
    title: str
    caption: str
    svg: str


class Colours:
    """A ranking has one colour on all plots.

    Args:
        names: the names of the rankings, the model's first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._places = {name: number % len(_SERIES) for number, name in enumerate(names)}

    def __getitem__(self, name: str) -> str:
        return _SERIES[self._places[name]]


class Plotter:
    """Draws a page's plots.

    Args:
        rankings: names, the model's first.
    """

    def __init__(self, rankings: Sequence[str] = ("model",)) -> None:
        self._colour = Colours(rankings)

    def learning(
        self,
        figure: str,
        title: str,
        caption: str,
        train: Sequence[tuple[float, float]],
        valid: Sequence[tuple[float, float]],
    ) -> Plot:
        """A figure over the steps.

        Args:
            figure: its name.
            title: the title of the plot.
            caption: the caption of the plot.
            train: (step, value) on training rows.
            valid: (step, value) on validation rows.
        """

        def draw(axes: Axes) -> None:
            for label, points, colour, style in (
                ("training, before learning", train, _SERIES[1], "-"),
                ("validation", valid, _SERIES[0], "o-"),
            ):
                if points:
                    steps, values = zip(*_thin(points), strict=True)
                    # A single point needs a marker; with many points, markers hide the line.
                    marked = "o-" if len(steps) < 3 else style if len(steps) < 40 else "-"
                    axes.plot(steps, values, marked, color=colour, label=label, ms=4, lw=1.6)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))

        return self._plot(f"learning-{figure}", title, caption, draw)

    def calibration(self, curve: Calibration, caption: str, target: str = "") -> Plot:
        """Predicted against observed probabilities, of one target if several."""

        def draw(axes: Axes) -> None:
            top = max(*curve.predicted, *curve.observed) * 1.05 or 1.0
            axes.plot([0, top], [0, top], "--", color=_INK, lw=1, label="perfect")
            axes.plot(
                curve.predicted, curve.observed, "o-", color=_SERIES[0], ms=4, lw=1.6, label="model"
            )
            axes.set_xlabel("mean predicted probability")
            axes.set_ylabel("share of positives")

        name, title = "calibration", "Calibration"
        if target:
            name, title = f"{name}-{target}", f"{title} of {target}"
        return self._plot(name, title, caption, draw)

    def over_k(
        self, name: str, title: str, caption: str, curves: Mapping[str, Sequence[float]]
    ) -> Plot:
        """A ranking figure at K = 1, 2, ... of every ranking."""

        def draw(axes: Axes) -> None:
            for ranking, values in curves.items():
                places = range(1, len(values) + 1)
                style = "o-" if len(values) < 40 else "-"
                colour = self._colour[ranking]
                axes.plot(places, values, style, color=colour, label=ranking, ms=3.5, lw=1.6)
            axes.set_xlabel("K")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))

        return self._plot(name, title, caption, draw)

    def groups(
        self,
        name: str,
        title: str,
        caption: str,
        label: str,
        groups: Sequence[str],
        figures: Mapping[str, Sequence[float]],
    ) -> Plot:
        """Bars of every ranking, side by side for each group."""

        def draw(axes: Axes) -> None:
            width = 0.8 / len(figures)
            for number, (ranking, values) in enumerate(figures.items()):
                places = [g - 0.4 + (number + 0.5) * width for g in range(len(groups))]
                colour = self._colour[ranking]
                axes.bar(places, values, width * 0.92, color=colour, label=ranking)
            axes.set_xticks(range(len(groups)), groups)
            axes.set_xlabel(label)
            axes.grid(False, axis="x")

        return self._plot(name, title, caption, draw)

    def periods(
        self, name: str, title: str, caption: str, first: str, days: int, counts: Sequence[int]
    ) -> Plot:
        """One bar per period, from a first day on."""

        def draw(axes: Axes) -> None:
            begins = np.datetime64(first, "D") + days * np.arange(len(counts))
            axes.bar(begins.astype(object), counts, 0.9 * days, align="edge", color=_SERIES[0])
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.grid(False, axis="x")
            labelled = begins[:: -(-len(counts) // 4)]  # there is room for four dates
            axes.set_xticks(labelled.astype(object), labels=labelled.astype(str).tolist())
            axes.tick_params("x", pad=7)  # below the 0 of the other axis

        return self._plot(name, title, caption, draw)

    def shares(
        self, name: str, title: str, caption: str, shares: Mapping[str, float], per_ranking: bool
    ) -> Plot:
        """Horizontal bars of shares of 1."""

        def draw(axes: Axes) -> None:
            names = list(shares)
            colours = [self._colour[n] if per_ranking else _SERIES[0] for n in names]
            bars = axes.barh(names, list(shares.values()), 0.6, color=colours)
            axes.bar_label(bars, [f"{v:.1%}" for v in shares.values()], padding=4, color=_INK)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_xlim(0, max(*shares.values(), 0.01) * 1.2)
            axes.invert_yaxis()
            axes.grid(False, axis="y")

        return self._plot(name, title, caption, draw)

    def _plot(self, name: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Plot:
        name = re.sub(r"[^\w-]", "-", name)  # a part of it may be the name of a label's column
        with rc_context(_STYLE):
            figure = Figure(layout="constrained")
            axes = figure.subplots()
            draw(axes)
            if handles := axes.get_legend_handles_labels()[0]:
                columns = len(handles) if len(handles) < 4 else 3
                figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.2)
            text = io.StringIO()
            # Without a date, so that equal figures give identical pictures.
            no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
        return Plot(name, title, caption, _for_page(text.getvalue(), name, title))


def _for_page(svg: str, name: str, title: str) -> str:
    """Embeds an SVG file in a page, with unique ids and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    label = html.escape(title)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        lambda match: f'<svg viewBox="{match[1]}" role="img" aria-label="{label}">',
        svg,
        count=1,
    )
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = -(-len(points) // POINTS)
    return [*points[:-1:step], points[-1]]
