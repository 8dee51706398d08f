"""Ratios of two tables of measurements: did a change make us slower?

    python -m bench compare OLD.csv NEW.csv --threshold 1.1

Times are compared in units of the matmul that was measured beside each, where there is one: a
machine that was slower on one of the days cancels out.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.results import Row, read

FLOOR_MIB = 8.0  # peaks of memory differ by so much for no reason


@dataclass(frozen=True)
class Change:
    """One measurement in both tables; ratios are new / old."""

    old: Row
    new: Row

    @property
    def time(self) -> float | None:
        if not (self.old.median_ms and self.new.median_ms):
            return None
        ratio = self.new.median_ms / self.old.median_ms
        if self.old.matmul_tflops and self.new.matmul_tflops:
            ratio *= self.new.matmul_tflops / self.old.matmul_tflops
        return ratio

    @property
    def memory(self) -> float | None:
        if self.old.extra_mib is None or self.new.extra_mib is None:
            return None
        return (self.new.extra_mib + FLOOR_MIB) / (self.old.extra_mib + FLOOR_MIB)

    def is_worse(self, threshold: float) -> bool:
        """Slower, larger, or no longer right."""
        if not self.new.is_ok:
            return self.old.is_ok
        return any(ratio is not None and ratio > threshold for ratio in (self.time, self.memory))

    def line(self, threshold: float) -> str:
        new = self.new
        name = f"{new.title} {new.dtype} {new.mode} {new.implementation}"
        figures = (
            new.status if not new.is_ok else f"{times(self.time)} time, {times(self.memory)} memory"
        )
        return f"{'WORSE ' if self.is_worse(threshold) else '      '}{figures:32} {name}"


def times(ratio: float | None) -> str:
    return "  -  " if ratio is None else f"{ratio:5.2f}"


def changes(old: list[Row], new: list[Row]) -> list[Change]:
    """Of the measurements in both; on whatever device."""
    before = {row.key[1:]: row for row in old}
    return [Change(before[row.key[1:]], row) for row in new if row.key[1:] in before]


def main(arguments: list[str]) -> int:
    """Exit code 1 if an implementation of ours got worse, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="largest ratio (default 1.1)")
    options = parser.parse_args(arguments)
    try:
        old, new = read(options.old), read(options.new)
    except (OSError, ValueError) as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    found = changes(old, new)
    if not found:
        print("bench compare: the tables must have a measurement in common", file=sys.stderr)
        return 2
    for change in found:
        print(change.line(options.threshold))
    worse = [
        change
        for change in found
        if change.new.implementation.startswith("codistill") and change.is_worse(options.threshold)
    ]
    print(f"{len(found)} compared, {len(worse)} of ours worse than {options.threshold:g} times")
    return 1 if worse else 0
