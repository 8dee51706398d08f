"""How the loss's time and memory grow with the number of tokens and with the vocabulary."""

from dataclasses import dataclass

import numpy as np

from bench.results import Row

OPERATION, MODE = "linear_policy_loss", "both"
AXES = {"tokens": "N", "vocab": "V"}


@dataclass(frozen=True)
class Series:
    """Measurements of one implementation that differ in one size only."""

    implementation: str
    axis: str
    rows: list[Row]

    @property
    def sizes(self) -> list[int]:
        return [getattr(row, self.axis) for row in self.rows]

    def slope(self, figure: str) -> float:
        """Slope of the least-squares line, per thousand tokens or rows of the vocabulary."""
        values = [getattr(row, figure) for row in self.rows]
        return 1000 * float(np.polyfit(self.sizes, values, 1)[0])

    def exponent(self, figure: str) -> float:
        """k if the figure grows as size^k: the slope in logarithms."""
        values = [max(getattr(row, figure), 1e-3) for row in self.rows]
        return float(np.polyfit(np.log(self.sizes), np.log(values), 1)[0])


def all_series(rows: list[Row]) -> list[Series]:
    """All series with at least three sizes."""
    chosen = [
        row
        for row in rows
        if (row.operation, row.mode) == (OPERATION, MODE) and row.is_ok and not row.inactive
    ]
    found: dict[tuple, list[Row]] = {}
    for axis in AXES:
        other = "vocab" if axis == "tokens" else "tokens"
        for row in chosen:
            key = (axis, row.implementation, row.dtype, row.hidden, getattr(row, other))
            found.setdefault(key, []).append(row)
    return [
        Series(key[1], key[0], sorted(members, key=lambda row, axis=key[0]: getattr(row, axis)))
        for key, members in found.items()
        if len({getattr(row, key[0]) for row in members}) >= 3
    ]


def slopes_table(rows: list[Row]) -> str:
    """A Markdown table with a line per series."""
    lines = [
        "| | axis | sizes | time, ms per thousand | memory, MiB per thousand | time ~ size^ |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for series in all_series(rows):
        sizes = f"{AXES[series.axis]} {series.sizes[0]} to {series.sizes[-1]}"
        figures = f"{series.slope('median_ms'):.3g} | {series.slope('extra_mib'):.3g}"
        exponent = f"{series.exponent('median_ms'):.2f}"
        lines.append(
            f"| {series.implementation} | {series.axis} | {sizes} | {figures} | {exponent} |"
        )
    return "\n".join(lines) if len(lines) > 2 else "Not measured."
