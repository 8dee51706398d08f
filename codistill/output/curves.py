"""curves.png: the curves of one run, from its files."""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from codistill import files
from codistill.files import read_rows
from codistill.output.summary import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Line(NamedTuple):
    """One curve of a panel."""

    label: str
    key: str
    """A key of metrics.jsonl; the curve is left out if the algorithm does not have it."""
    color: str


SMALL, LARGE = "C0", "C1"  # the same colour for a model in every panel
PANELS = {
    "accuracy": [
        Line("training", "reward/accuracy", "C2"),
        Line("prompts without a right rollout", "reward/zero_fraction", "C7"),
    ],
    "KD reward (nats, alpha included)": [Line("small", "reward/kd", SMALL)],
    "importance ratio": [
        Line("clipped tokens, small", "ratio/small_clip_fraction", SMALL),
        Line("clipped tokens, large", "ratio/large_clip_fraction", LARGE),
        Line("effective sample size, large", "ratio/large_ess", "C4"),
    ],
    "gradient norm": [
        Line("small", "grad_norm/small", SMALL),
        Line("large", "grad_norm/large", LARGE),
    ],
    "completion length (tokens)": [Line("mean", "rollout/mean_tokens", "C2")],
    "time per step (s)": [
        Line("rollout", "time/rollout", "C2"),
        Line("score", "time/score", "C4"),
        Line("update small", "time/update_small", SMALL),
        Line("update large", "time/update_large", LARGE),
        Line("sync", "time/sync", "C7"),
    ],
}
SHARES = ("accuracy", "importance ratio")
"""Panels whose numbers are shares, shown in percent."""


def plot(folder: Path) -> Path:
    """Draw curves.png: the metrics of each step faintly, and smoothed on top; its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_rows(folder / "metrics.jsonl")
    evaluations = read_rows(folder / "evaluations.jsonl")
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 9), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, PANELS.items(), strict=True):
        for line in lines:
            draw_line(axis, line, metrics)
        if title == "accuracy":
            draw_evaluations(axis, evaluations)
        finish_panel(axis, title)
    figure.suptitle(folder.resolve().name, fontsize=14)
    path = folder / "curves.png"
    files.write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110))
    pyplot.close(figure)
    return path


def draw_line(axis: "Axes", line: Line, metrics: list[dict[str, Any]]) -> None:
    """The numbers of each step faintly, and their moving average; None stands for no number."""
    rows = [row for row in metrics if row.get(line.key) is not None]
    if not rows:
        return
    steps, values = ([row[key] for row in rows] for key in ("step", line.key))
    axis.plot(steps, values, color=line.color, alpha=0.3, linewidth=0.8)
    axis.plot(steps, moving_average(values), color=line.color, label=line.label)


def draw_evaluations(axis: "Axes", evaluations: list[dict[str, float]]) -> None:
    """Held-out accuracy, which is never smoothed: of each model, bold where it is a mean, and of
    each set that has a name."""
    names = measured(evaluations)
    sets = dict.fromkeys(name.partition("/")[2] for name in names)
    markers = dict(zip(sets, cycle("osvD^Pp*X"), strict=False))
    for name in names:
        model, _, part = name.partition("/")
        is_mean = any(other.startswith(f"{name}/") for other in names)
        rows = [row for row in evaluations if name in row]
        steps, values = ([row[key] for row in rows] for key in ("step", name))
        axis.plot(
            steps,
            values,
            f"{markers[part]}-",
            markersize=4,
            linewidth=3 if is_mean else 1.5,
            color={"small": SMALL, "large": LARGE}[model],
            label=f"held-out, {name}" + (", mean" if is_mean else ""),
        )


def finish_panel(axis: "Axes", title: str) -> None:
    """Title, grid and scale; the legend stands below the panel, where it covers no line."""
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axis.set_xlabel("step")
    axis.set_ylim(*limits(*axis.get_ylim()))
    axis.grid(alpha=0.25, linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=0)
    if title in SHARES:
        show_percent(axis)
    if axis.lines:
        axis.legend(
            fontsize=9, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12)
        )


def show_percent(axis: "Axes") -> None:
    """Shares as percent, with the decimals that a tick has: 35%, 37.5%."""
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")


def limits(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis: 0 or what is lower, and room above the highest curve."""
    low = min(0.0, low)
    return low, high + 0.03 * (high - low)


def moving_average(values: list[float]) -> np.ndarray:
    """Each number's mean with its neighbours, a tenth of all numbers together, weighted by a Hann
    window around the number; at the two ends over the neighbours that there are."""
    window = np.hanning(3 + 2 * (len(values) // 20))[1:-1]
    weights = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / weights
