"""What a first run on a device finds: numbers beside expected ones, written as soon as known."""

from dataclasses import dataclass
from pathlib import Path

from bench.table import Table

OK, FAILED = "ok", "FAILED"


@dataclass(frozen=True)
class Finding:
    """A measured number or property, all of it as text for a person to read."""

    what: str
    measured: str
    unit: str
    expected: str
    verdict: str
    """OK, FAILED, or what to think of a number outside the expected range."""

    def __str__(self) -> str:
        expected = f"expected {self.expected}" if self.expected else ""
        return f"{self.what:52} {self.measured:>9} {self.unit:8} {expected:24} {self.verdict}"


def holds(what: str, is_so: bool) -> Finding:
    """A property that must hold; FAILED if it does not."""
    return Finding(what, "yes" if is_so else "no", "", "yes", OK if is_so else FAILED)


def in_range(
    what: str, measured: float, unit: str, bounds: tuple[float, float] | None, otherwise: str
) -> Finding:
    """A number beside its bounds (None if none are known); otherwise: what follows from one that is
    outside."""
    if bounds is None:
        return Finding(what, f"{measured:.4g}", unit, "-", "")
    low, high = bounds
    side = "below" if measured < low else "above"
    verdict = OK if low <= measured <= high else f"{side}: {otherwise}"
    return Finding(what, f"{measured:.4g}", unit, f"{low:.4g} to {high:.4g}", verdict)


class Findings:
    """Findings printed and written to a table one by one, so that a run can be cut off."""

    def __init__(self, path: Path) -> None:
        self.table = Table(path, Finding, key=("what",))
        self.failed: list[str] = []

    def add(self, finding: Finding) -> None:
        """Write and print a finding; one that was there before is replaced."""
        self.table.add([finding])
        if finding.verdict == FAILED:
            self.failed.append(finding.what)
        print(finding, flush=True)
