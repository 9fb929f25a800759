"""Curves for `report.html`: a metric over the steps, as SVG in the page's own colours."""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# CSS pixels of a plot. A large one is as wide and high as 2 × 2 others, their captions and the gaps between.
PLOT = (268, 140)
LARGE_PLOT = (556, 320)
POINTS = 300

# Stand-ins in the plots for the page's own colours, which follow the reader's light or dark mode.
INK, ACCENT = "#010203", "#040506"
PAGE_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)"}

# Where ratios are what matters; other keys are decibels, fractions or rates.
LOGARITHMIC = ("loss", "norm")

SMOOTHING = 0.03  # of the values, on either side


class Line(NamedTuple):
    """The values of a run.

    Attributes:
        steps: increasing, at least one.
        values: finite.
        colour: in CSS.
    """

    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    colour: str = ACCENT


def curve(key: str, steps: np.ndarray, values: np.ndarray, large: bool) -> str:
    """The curve of one run, see `curves`."""
    return curves(key, [Line(steps, values)], large)


def curves(key: str, lines: Sequence[Line], large: bool) -> str:
    """Plots the values of each line, faint, and their moving mean.

    Args:
        key: the metric's name, which decides on the scale.
        lines: at least one.
        large: as large as four others.

    Returns:
        An `<svg>` element; a line without a colour of its own is `var(--accent)`, and its text is the page's.
    """
    width, height = LARGE_PLOT if large else PLOT
    # A figure of its own, without pyplot, leaves no state behind.
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((42 / width, 20 / height, 1 - 52 / width, 1 - 28 / height))
    means = []
    for steps, values, colour in lines:
        axes.plot(*_thinned(steps, values), color=colour, alpha=0.35 if len(lines) == 1 else 0.2, linewidth=0.8)
        smooth_steps, smooth = _smoothed(steps, values)
        axes.plot(smooth_steps, smooth, color=colour, linewidth=1.6, marker="o" if len(values) < 3 else "")
        means.append(smooth)
    values, smooth = np.concatenate([line.values for line in lines]), np.concatenate(means)
    if any(word in key for word in LOGARITHMIC) and values.min() > 0 and smooth.max() > 5 * smooth.min():
        _logarithmic(axes, values, labels=10 if large else 6)
    else:
        _linear(axes, values, from_zero=key.endswith("_per_second"))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6 if large else 3, integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=INK, alpha=0.3)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=10, labelcolor=INK)
    return _svg(figure)


def _logarithmic(axes: Axes, values: np.ndarray, labels: int) -> None:
    low, high = values.min(), values.max()
    decades = np.log10(high / low)
    subdivisions = [s for s in ((1, 2, 5), (1, 3), (1,)) if len(s) * decades <= labels]
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=subdivisions[0] if subdivisions else (1,), numticks=labels))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    margin = (high / low) ** 0.05
    axes.set_ylim(low / margin, high * margin)


def _linear(axes: Axes, values: np.ndarray, from_zero: bool) -> None:
    """The range leaves out the wildest values, which would flatten all others."""
    low, high = np.percentile(values, (0.5, 99.5))
    if from_zero:  # or a steady rate would look wild
        low = 0.0
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    axes.set_ylim(0 if from_zero else low - margin, high + margin)


def _short(value: float) -> str:
    """At most six characters, which is what there is room for."""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A moving mean at up to POINTS of the steps, the last among them.

    It is of the middle half of the values in the window, which leaves out single wild ones. At the start the window is
    narrow and centred, or it would hide how a loss falls at first.
    """
    stride = -(-len(values) // POINTS)
    index = np.arange(len(values))[::-stride][::-1]
    half = round(SMOOTHING * len(values))
    windows = [np.sort(values[max(i - half, 0) : i + min(half, i) + 1]) for i in index]
    return steps[index], np.array([w[len(w) // 4 : len(w) - len(w) // 4].mean() for w in windows])


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest of each stretch: looks like all the points, in few."""
    if len(values) <= 2 * POINTS:
        return steps, values
    stretches = np.array_split(np.arange(len(values)), POINTS)
    chosen = sorted({s[pick(values[s])] for s in stretches for pick in (np.argmin, np.argmax)})
    return steps[chosen], values[chosen]


def _svg(figure: Figure) -> str:
    """The figure as SVG for the inside of a page: in its colours, with text as text, equal for equal figures."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    # Names of groups, which would not be unique in the page, and are of no use in it.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    for colour, page_colour in PAGE_COLOURS.items():
        svg = svg.replace(colour, page_colour)
    return svg
