"""Runs as the page shows them: what their folders hold, finished or not, and which of them differ
only in their seed."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from codistill.config import ConfigError
from codistill.config.changes import flatten
from codistill.config.read_yaml import read_yaml
from codistill.files import read_object, read_rows
from codistill.output.summary import read_summary, summarize

FILES = ("metrics.jsonl", "config.yaml")
"""A folder with neither of these is no run."""
OF_ONE_RUN = ("name", "output_dir", "seed")
"""Keys in which the seeds of one experiment differ."""

MODELS = ("small", "large")

Row = dict[str, Any]
Points = tuple[np.ndarray, np.ndarray]
"""Steps [K] int64, in order, and the numbers at them [K] float64, all finite."""


@dataclass(frozen=True)
class Run:
    """The files of a run, as far as they can be read."""

    folder: Path
    name: str
    """What tells it from the other runs of the page."""
    settings: dict[str, Any]
    """Dotted key -> value; empty if config.yaml cannot be read."""
    inputs: dict[str, Any]
    metrics: list[Row]
    evaluations: list[Row]
    summary: Row
    """As `summarize` has it; without "problems" where the run has not written it down."""
    is_finished: bool
    notices: tuple[str, ...]
    """One line for each file that cannot be read."""

    @property
    def steps(self) -> int:
        """The last step that has ended."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def experiment(self) -> str:
        """The same for two runs that differ in their seed alone."""
        settings = {key: v for key, v in self.settings.items() if key not in OF_ONE_RUN}
        return json.dumps([settings or str(self.folder), self.inputs], sort_keys=True, default=str)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; often only one."""

    label: str
    runs: tuple[Run, ...]


def is_run(folder: Path) -> bool:
    """Whether a folder holds files of a run."""
    return any((folder / name).is_file() for name in FILES)


def load_run(folder: Path, name: str) -> Run:
    """Read a run's folder. A run that goes on is read as far as it has come."""
    notices = []
    try:
        settings = flatten(read_yaml(folder / "config.yaml"))
    except ConfigError:
        settings = {}
        notices.append(f"{folder}/config.yaml is missing or damaged: no configuration is shown")
    metrics = in_order(read_rows(folder / "metrics.jsonl"))
    if not metrics:
        notices.append(f"{folder}/metrics.jsonl has no step yet: there are no curves of training")
    steps = metrics[-1]["step"] if metrics else 0
    summary = read_summary(folder)
    if summary is None and (folder / "summary.json").exists():
        notices.append(f"{folder}/summary.json is damaged: its numbers are summed up again")
    if summary is not None and summary["steps"] < steps:
        summary = None  # the run has gone on since
    totals = summarize(folder, steps=steps, problems=0)
    del totals["problems"]
    return Run(
        folder=folder,
        name=name,
        settings=settings,
        inputs=read_object(folder / "inputs.json"),
        metrics=metrics,
        evaluations=in_order(read_rows(folder / "evaluations.jsonl")),
        summary=totals | (summary or {}),
        is_finished=summary is not None,
        notices=tuple(notices),
    )


def in_order(rows: list[Row]) -> list[Row]:
    """The last row of each step, by step: a run that was killed has written some twice."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read each folder once, however often it is named; runs are called as their folders are, and
    by their paths where two have one name."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    return [
        load_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ only in their seed together, in the order of their first ones."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.experiment, []).append(run)
    return [Group(label(members), tuple(members)) for members in found.values()]


def label(runs: Sequence[Run]) -> str:
    """The name of one run; of several, what their names begin with, and how many seeds it are."""
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(names)
    return f"{start}*, {len(names)} seeds" if start else f"{names[0]} ..., {len(names)} seeds"


def points(rows: Sequence[Row], key: str) -> Points:
    """The numbers under a key of metrics.jsonl or evaluations.jsonl; a step may lack one."""
    found = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def at_common_steps(curves: Sequence[Points]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all curves have, [K], and their numbers there, [curves, K].

    A mean over the seeds at a step that one of them lacks would jump.
    """
    common = reduce(np.intersect1d, [steps for steps, _ in curves])
    values = [numbers[np.isin(steps, common)] for steps, numbers in curves]
    return common, np.stack(values)


def evaluation_sets(runs: Sequence[Run]) -> list[str]:
    """Names of the sets that models are evaluated on, from keys small/NAME and large/NAME."""
    keys = [key for run in runs for row in run.evaluations for key in row]
    parts = [key.partition("/") for key in dict.fromkeys(keys)]
    return list(dict.fromkeys(name for model, _, name in parts if name and model in MODELS))


def differences(groups: Sequence[Group]) -> Iterator[tuple[str, list[str]]]:
    """Keys of the configuration whose values are not the same in all groups, and these values."""
    settings = [known_settings(group) for group in groups]
    for key in dict.fromkeys(key for values in settings for key in values):
        texts = [shown_value(values[key]) if key in values else "" for values in settings]
        if len(set(texts)) > 1:
            yield key, texts


def known_settings(group: Group) -> dict[str, Any]:
    """The configuration of a group without what its seeds differ in, and the checksums of what it
    read."""
    first = group.runs[0]
    settings = {key: value for key, value in first.settings.items() if key not in OF_ONE_RUN}
    contents = {key: brief(prints) for key, prints in first.inputs.items()}
    return settings | {f"contents of {key}": text for key, text in contents.items()}


def brief(prints: Any) -> str:
    """A few digits of each checksum of inputs.json."""
    values = prints.values() if isinstance(prints, dict) else ()
    return "+".join(str(value)[:8] for value in values)


def shown_value(value: Any) -> str:
    """A value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
