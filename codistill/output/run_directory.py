"""The files of a run, in output_dir/name, written by one process.

Every file but two is written under another name first, and has its own once it is on the disk.
metrics.jsonl and evaluations.jsonl grow by one line at a time.
"""

import fcntl
import json
import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet
import yaml

from codistill import distributed, files
from codistill.config import Config, ConfigError
from codistill.fingerprints import INPUTS, Fingerprints
from codistill.output.samples import samples_table
from codistill.rollout import Rollouts
from codistill.scoring import Scored

LOCK = "lock"


def run_lock(config: Config) -> AbstractContextManager[None]:
    """`folder_lock` of the run's folder."""
    return folder_lock(config.output_dir / config.name, "output_dir", config.output_dir)


@contextmanager
def folder_lock(folder: Path, key: str, value: Path) -> Iterator[None]:
    """Make a folder, and keep all other runs from it while the block runs; the first process does.

    key, value: what the user gave for the folder.

    Raises:
        ConfigError: another run has the folder, or it cannot be written to.
    """
    if not distributed.is_first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
        acquire(file, folder)
    except OSError as error:
        raise ConfigError(
            f"{key} = {str(value)!r}: expected a folder to write to: {error}"
        ) from error
    with file:
        yield


def check_shared(folder: Path, key: str, value: Path) -> None:
    """Raise ConfigError on all processes unless all see the folder that the first one has locked.
    Collective.

    key, value: what the user gave for the folder.
    """
    try:
        holder = (folder / LOCK).read_text()
    except OSError:
        holder = ""
    if not distributed.same_everywhere(holder):
        raise ConfigError(
            f"{key} = {str(value)!r}: expected a folder that all nodes share: some do not see "
            f"what the first one writes to {folder}"
        )


def acquire(file: TextIO, folder: Path) -> None:
    """Lock the open file, and write into it who has it; the lock ends with the process.

    Raises ConfigError where another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = (folder / LOCK).read_text(errors="replace") or "another process"
        raise ConfigError(
            f"{folder}: expected a run that is not running: {holder} is writing to this folder"
        ) from error
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s: its file system has no locks (%s): see to it that no run is started twice",
            *(folder, error.strerror),
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    os.fsync(file.fileno())  # other nodes look for it


class RunDirectory:
    """config.yaml, inputs.json, metrics.jsonl (one row per step), evaluations.jsonl, samples/,
    summary.json.

    config.yaml is that of the last start: a run may go on with other settings of some keys.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, config.output_dir / config.name

    def start(self, done: int, inputs: Fingerprints) -> list[str]:
        """Write what the run is started with, and drop the rows of steps after `done`, which are
        computed again; one line for each file that lacks rows of steps before.

        done: -1 where not even the evaluation before the first step is done.
        """
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        files.write_text(self.path / "config.yaml", content)
        files.write_text(self.path / INPUTS, json.dumps(inputs, indent=2) + "\n")
        steps = self.keep_until("metrics.jsonl", done)
        evaluated = self.keep_until("evaluations.jsonl", done)
        lost = sorted(set(range(1, done + 1)) - steps)
        lines = []
        if lost:
            lines.append(
                f"{self.path}/metrics.jsonl lacks {len(lost)} of the {done} steps that are done, "
                f"step {lost[0]} the first of them: curves and summary are of the others"
            )
        if done >= 0 and 0 not in evaluated:
            lines.append(
                f"{self.path}/evaluations.jsonl lacks the evaluation before the first step: "
                "the summary will have no accuracy"
            )
        return lines

    def keep_until(self, name: str, done: int) -> set[int]:
        """Drop rows of steps after `done`, and all but the last of a step; the steps that stay."""
        rows = {
            row["step"]: row for row in files.read_rows(self.path / name) if row["step"] <= done
        }
        lines = [row_text(rows[step]) + "\n" for step in sorted(rows)]
        files.write_text(self.path / name, "".join(lines))
        return set(rows)

    def add_metrics(self, step: int, numbers: dict[str, float]) -> None:
        files.append_line(self.path / "metrics.jsonl", row_text({"step": step} | numbers))

    def add_evaluation(self, accuracy: dict[str, float]) -> None:
        files.append_line(self.path / "evaluations.jsonl", row_text(accuracy))

    def add_samples(self, step: int, rollouts: Rollouts, scored: Scored, tokenizer: Any) -> None:
        """Write the first process's rollouts of one step."""
        table = samples_table(rollouts, scored, tokenizer)
        files.write_whole(
            self.path / "samples" / f"step_{step:06d}.parquet",
            lambda unfinished: pyarrow.parquet.write_table(table, unfinished),
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2, allow_nan=False)
        files.write_text(self.path / "summary.json", text + "\n")


def row_text(row: dict[str, Any]) -> str:
    """One line of JSON, which has no NaN and no infinity: null stands for them."""
    numbers = {key: None if is_no_number(value) else value for key, value in row.items()}
    return json.dumps(numbers, allow_nan=False)


def is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
