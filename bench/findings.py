"""What a first run on a device finds: numbers beside those expected, written as they come."""

import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
OK, FAILED = "ok", "FAILED"


@dataclass(frozen=True)
class Finding:
    what: str
    measured: str
    unit: str
    expected: str
    verdict: str

    def __str__(self) -> str:
        expected = f"expected {self.expected}" if self.expected else ""
        return f"{self.what:52} {self.measured:>9} {self.unit:8} {expected:24} {self.verdict}"


def holds(what: str, is_so: bool) -> Finding:
    """A property that is there or not."""
    return Finding(what, "yes" if is_so else "no", "", "yes", OK if is_so else FAILED)


def in_range(
    what: str, measured: float, unit: str, bounds: tuple[float, float] | None, otherwise: str
) -> Finding:
    """A number, and what follows where it is outside its bounds: None, where none are known."""
    if bounds is None:
        return Finding(what, f"{measured:.4g}", unit, "-", "")
    low, high = bounds
    side = "below" if measured < low else "above"
    verdict = OK if low <= measured <= high else f"{side}: {otherwise}"
    return Finding(what, f"{measured:.4g}", unit, f"{low:.4g} to {high:.4g}", verdict)


class Findings:
    """A table on disk and on the screen. What is found again takes the place of the old row."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}
        self.failed: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open(newline="") as file:
                self.rows = {row["what"]: Finding(**row) for row in csv.DictReader(file)}

    def add(self, finding: Finding) -> None:
        self.rows[finding.what] = finding
        if finding.verdict == FAILED:
            self.failed.append(finding.what)
        # A run may be cut off while it writes: the table is whole at any moment.
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([field.name for field in fields(Finding)])
            writer.writerows(map(astuple, self.rows.values()))
        os.replace(part, self.path)
        print(finding, flush=True)


# --- predictions -------------------------------------------------------------------------------


def roofline_csv() -> str:
    """`bench roofline`'s predictions as text; empty where it has none to give."""
    command = [sys.executable, "-m", "bench", "roofline", "--csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout if done.returncode == 0 else ""


class Predictions:
    """Milliseconds and GiB of an operation on one device."""

    def __init__(self, text: str, device_name: str) -> None:
        names = set(re.split(r"[^A-Za-z0-9]+", device_name))  # "NVIDIA H100 80GB HBM3"
        self.rows = {
            tuple(row[name] for name in ("operation", "mode", "tokens", "hidden", "vocab")): row
            for row in table(text)
            if row["device"] in names and row["dtype"] == "bf16"
        }

    def of(
        self, operation: str, mode: str, tokens: int, hidden: int, vocab: int
    ) -> tuple[float, float] | None:
        """(ms, GiB) for bf16, or None; hidden: the sum of two models'."""
        row = self.rows.get((operation, mode, str(tokens), str(hidden), str(vocab)))
        return None if row is None else (float(row["ms"]), float(row["gib"]))


def table(text: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV text, whatever lines are in front of its header."""
    start = text.find("device,operation,")
    return iter(csv.DictReader(io.StringIO(text[start:]))) if start >= 0 else iter(())
