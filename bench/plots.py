"""The plots in bench/results."""

import statistics
from pathlib import Path

from bench.growth import AXES, MODE, OPERATION, all_series
from bench.operations import OURS
from bench.results import FOLDER, Row, slug

COLORS = {OURS: "black"}  # the others take the colours of matplotlib's cycle, which has no black
FIGURES = {"median_ms": "time (ms)", "extra_mib": "extra memory (MiB)"}


def paths(device: str) -> list[Path]:
    """The files of a device's plots: the loss, and its growth."""
    return [FOLDER / f"{slug(device)}-{kind}.png" for kind in ("loss", "growth")]


def draw(rows: list[Row]) -> list[Path]:
    """Draw the plots of one device for which there are measurements, and return their files."""
    import matplotlib

    matplotlib.use("Agg")
    bars, growth = paths(rows[0].device)
    return [path for path in (draw_bars(rows, bars), draw_growth(rows, growth)) if path]


def draw_bars(rows: list[Row], path: Path) -> Path | None:
    """Time and memory of the loss for every implementation and model; None if there is nothing."""
    from matplotlib import pyplot

    chosen = [
        row
        for row in rows
        if (row.operation, row.mode) == (OPERATION, MODE) and row.is_ok and row.is_at_model_size
    ]
    usual = statistics.mode(row.tokens for row in chosen) if chosen else 0
    # Other numbers of tokens are in the plot of the growth.
    chosen = [row for row in chosen if row.tokens == usual]
    cases = list({row.case: row for row in chosen}.values())
    place = {row.case: index for index, row in enumerate(cases)}
    names = list(dict.fromkeys(row.implementation for row in chosen))
    if not chosen:
        return None
    figure, axes = pyplot.subplots(2, 1, figsize=(14, 9), layout="constrained", sharex=True)
    width = 0.8 / len(names)
    for axis, (column, label) in zip(axes, FIGURES.items(), strict=True):
        for index, name in enumerate(names):
            members = [row for row in chosen if row.implementation == name]
            places = [place[row.case] + index * width - 0.4 for row in members]
            values = [getattr(row, column) or 0.0 for row in members]
            axis.bar(places, values, width, align="edge", label=name, color=COLORS.get(name))
        axis.set(ylabel=label)
        axis.grid(alpha=0.3, axis="y")
    labels = [label_of(row) for row in cases]
    axes[1].set_xticks(range(len(cases)), labels, fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    axes[0].set_title(f"{OPERATION}, forward and backward, {rows[0].device}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def label_of(row: Row) -> str:
    """The case of a row, in lines."""
    inactive = f"\n{row.inactive:.0%} off" if row.inactive else ""
    return f"{row.model}\n{row.tokens} x {row.hidden} x {row.vocab}{inactive}"


def draw_growth(rows: list[Row], path: Path) -> Path | None:
    """Time and memory against N and V, on logarithmic axes; None if there is nothing."""
    from matplotlib import pyplot

    series = all_series(rows)
    if not series:
        return None
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for column, (axis_name, letter) in enumerate(AXES.items()):
        for line, (figure_name, label) in enumerate(FIGURES.items()):
            axis = axes[line][column]
            for one in (s for s in series if s.axis == axis_name):
                values = [getattr(row, figure_name) for row in one.rows]
                color = COLORS.get(one.implementation)
                axis.loglog(one.sizes, values, "o-", label=one.implementation, color=color)
            axis.set(xlabel=f"{axis_name} ({letter})", ylabel=label)
            axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{OPERATION}, forward and backward, {rows[0].device}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
