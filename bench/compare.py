"""Ratios of two tables of measurements: did a change make us slower?

    python -m bench compare OLD.csv NEW.csv --threshold 1.1

Each time is divided by that of the matmul that was measured with it, if there is one, so that the
speed of the machine on that day cancels out.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.results import KEY, Row, table

FLOOR_MIB = 8.0  # peak memory differs by this much between equal runs; chosen, untested


@dataclass(frozen=True)
class Change:
    """One measurement in both tables; ratios are new / old."""

    old: Row
    new: Row

    @property
    def time(self) -> float | None:
        """Ratio of the times, None if either was not measured."""
        if not (self.old.median_ms and self.new.median_ms):
            return None
        ratio = self.new.median_ms / self.old.median_ms
        if self.old.matmul_tflops and self.new.matmul_tflops:
            ratio *= self.new.matmul_tflops / self.old.matmul_tflops
        return ratio

    @property
    def memory(self) -> float | None:
        """Ratio of the peaks, both raised by `FLOOR_MIB`; None if either was not measured."""
        if self.old.extra_mib is None or self.new.extra_mib is None:
            return None
        return (self.new.extra_mib + FLOOR_MIB) / (self.old.extra_mib + FLOOR_MIB)

    def is_worse(self, threshold: float) -> bool:
        """Whether it became slower, takes more memory or no longer works."""
        if not self.new.is_ok:
            return self.old.is_ok
        return any(ratio is not None and ratio > threshold for ratio in (self.time, self.memory))

    def line(self, threshold: float) -> str:
        """The change for a person to read."""
        new = self.new
        name = f"{new.title} {new.dtype} {new.mode} {new.implementation}"
        figures = (
            new.status if not new.is_ok else f"{times(self.time)} time, {times(self.memory)} memory"
        )
        return f"{'WORSE ' if self.is_worse(threshold) else '      '}{figures:32} {name}"


def times(ratio: float | None) -> str:
    return "  -  " if ratio is None else f"{ratio:5.2f}"


def changes(old: list[Row], new: list[Row]) -> list[Change]:
    """The measurements that are in both tables, whatever device each was made on."""

    def what(row: Row) -> tuple:
        return tuple(getattr(row, name) for name in KEY if name != "device")

    before = {what(row): row for row in old}
    return [Change(before[what(row)], row) for row in new if what(row) in before]


def main(arguments: list[str]) -> int:
    """Exit code 1 if an implementation of ours got worse, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="largest ratio (default 1.1)")
    options = parser.parse_args(arguments)
    try:
        old, new = table(options.old).read(), table(options.new).read()
    except (OSError, ValueError) as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    found = changes(old, new)
    if not found:
        print("bench compare: the tables must have a measurement in common", file=sys.stderr)
        return 2
    for change in found:
        print(change.line(options.threshold))
    worse = [c for c in found if c.new.is_ours and c.is_worse(options.threshold)]
    print(f"{len(found)} compared, {len(worse)} of ours worse than {options.threshold:g} times")
    return 1 if worse else 0
