"""The records of a task, by method and seed, and the numbers that tables and claims take."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codistill.output.curves import moving_average
from codistill.output.summary import measured
from study.methods import METHODS, Method
from study.record import Record, read

EARLY, LATE = 0.5, 0.25
"""Shares of a run's steps: its first half, its last quarter."""


@dataclass(frozen=True)
class Results:
    """What there is of one task."""

    task: str
    records: dict[str, dict[int, Record]]
    """Method -> seed -> record of a run that was started, whatever became of it."""

    def among(self, seeds: Container[int]) -> "Results":
        """The runs with some of the seeds."""
        chosen = {
            method: {seed: record for seed, record in runs.items() if seed in seeds}
            for method, runs in self.records.items()
        }
        return Results(self.task, chosen)

    def beside(self, methods: Iterable[Method]) -> "Results":
        """The runs with the seeds that any of some methods has: with more seeds than these, what
        they are compared with would have other ones."""
        return self.among({seed for method in methods for seed in self.finished(method.name)})

    def finished(self, method: str) -> dict[int, Record]:
        """Seed -> record of the runs that are finished."""
        runs = self.records.get(method, {})
        return {seed: record for seed, record in runs.items() if record.finished}

    def chain(self, method: str, seed: int) -> list[Record]:
        """The run and, before it, the runs that it needs; empty unless all are finished."""
        needed = METHODS[method].needs
        before = self.chain(needed, seed) if needed else []
        record = self.finished(method).get(seed)
        if record is None or (needed and not before):
            return []
        return [*before, record]

    def values(self, method: str, measure: "Measure") -> dict[int, float]:
        """Seed -> number, for the seeds of which the measure can be taken."""
        chains = {seed: self.chain(method, seed) for seed in self.finished(method)}
        found = {seed: measure(chain) for seed, chain in chains.items() if chain}
        return {seed: value for seed, value in found.items() if value is not None}

    def sets(self, model: str) -> list[str]:
        """Names of the held-out sets on which a model was measured."""
        rows = [
            row
            for method in METHODS
            for record in self.finished(method).values()
            for row in record.evaluations
        ]
        parts = [name.partition("/") for name in measured(rows)]
        return [part for owner, _, part in parts if owner == model and part]


def load(folder: Path) -> Results:
    """The records below a task's folder, METHOD/seed_K.json, methods in the order of `METHODS`."""
    records: dict[str, dict[int, Record]] = {}
    for file in sorted(folder.glob("*/seed_*.json")):
        record = read(file)
        records.setdefault(record.method, {})[record.seed] = record
    order = [name for name in METHODS if name in records]
    order += [name for name in records if name not in METHODS]
    return Results(folder.name, {name: dict(sorted(records[name].items())) for name in order})


# --- measures ----------------------------------------------------------------------------------

Measure = Callable[[list[Record]], float | None]
"""From a run, the last of the list, and the runs that it needs before it; None without a number."""


def final(key: str) -> Measure:
    """Held-out accuracy after the last step. key: "small", "large", "small/NAME", "large/NAME"."""
    return lambda chain: chain[-1].evaluations[-1].get(key)


def before(key: str) -> Measure:
    """Held-out accuracy before the first step."""
    return lambda chain: chain[-1].evaluations[0].get(key)


def gain(key: str) -> Measure:
    """Held-out accuracy after the last step, less that before the first."""

    def measure(chain: list[Record]) -> float | None:
        after, base = final(key)(chain), before(key)(chain)
        return None if after is None or base is None else after - base

    return measure


def learning(key: str) -> Measure:
    """Mean of the held-out accuracies after the first step: the height of the learning curve."""

    def measure(chain: list[Record]) -> float | None:
        return mean([row[key] for row in chain[-1].evaluations if row["step"] and key in row])

    return measure


def accuracy_fall(key: str) -> Measure:
    """The largest fall of held-out accuracy below what it had reached before."""
    return lambda chain: fall([row[key] for row in chain[-1].evaluations if key in row])


def whole(key: str) -> Measure:
    """Mean of a key of metrics.jsonl over all steps."""
    return lambda chain: mean(numbers(chain[-1], key))


def early(key: str) -> Measure:
    """Mean of a key of metrics.jsonl over the first half of the steps."""

    def measure(chain: list[Record]) -> float | None:
        values = numbers(chain[-1], key)
        return mean(values[: max(1, round(EARLY * len(values)))])

    return measure


def late(key: str) -> Measure:
    """Mean of a key of metrics.jsonl over the last quarter of the steps."""

    def measure(chain: list[Record]) -> float | None:
        values = numbers(chain[-1], key)
        return mean(values[-max(1, round(LATE * len(values))) :])

    return measure


def metric_fall(key: str) -> Measure:
    """The largest fall of a key of metrics.jsonl, smoothed, below what it had reached before."""

    def measure(chain: list[Record]) -> float | None:
        values = numbers(chain[-1], key)
        return fall(moving_average(values).tolist()) if values else None

    return measure


def median(key: str) -> Measure:
    """Median over the steps: a step that had to wait for something else does not count."""

    def measure(chain: list[Record]) -> float | None:
        values = numbers(chain[-1], key)
        return float(np.median(values)) if values else None

    return measure


def total(key: str) -> Measure:
    """Sum over the steps of the run and of the runs that it needs."""
    return lambda chain: sum(sum(numbers(record, key)) for record in chain)


def numbers(record: Record, key: str) -> list[float]:
    """A key of metrics.jsonl in the steps that have a finite number of it."""
    return [value for value in record.metrics.get(key, []) if value is not None]


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def fall(values: list[float]) -> float | None:
    """The largest difference of a value and a later one, 0 if none is below an earlier one."""
    return float(np.max(np.maximum.accumulate(values) - values)) if values else None
