"""Runs of the study, one after the other, each kept when it is finished.

A run is `train.py` with the task's file and the method's keys, in one process with one thread. Its
numbers are written to a record as soon as it ends, and a run that has one is not started again.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from study.methods import METHODS, Method
from study.places import Places
from study.record import Record, read, versions
from study.tasks import Task, training_problems

PROMPTS = 16  # per step, as the task's file has it
EVALUATIONS = 4  # in a run, at equal distances, besides the one before the first step


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    task: Task
    method: Method
    seed: int
    steps: int
    """The budget: steps of a run that is not continued training."""
    places: Places

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.method.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.places.runs / self.name

    @property
    def log(self) -> Path:
        """The file of what it printed."""
        return self.places.runs / "logs" / f"{self.name}.txt"

    @property
    def record(self) -> Path:
        """The file of its numbers."""
        folder = self.places.results / self.task.name / self.method.name
        return folder / f"seed_{self.seed}.json"

    @property
    def own_steps(self) -> int:
        return round(self.steps * self.method.steps_share)

    def needed(self) -> "Run | None":
        """The run that must be finished before this one."""
        if self.method.needs is None:
            return None
        return replace(self, method=METHODS[self.method.needs])

    def command(self, training_file: Path) -> list[str]:
        """What a user would type, after `python`."""
        every = max(1, self.steps // EVALUATIONS)
        options = {
            "name": self.name,
            "output_dir": str(self.places.runs),
            "data.train": str(training_file),
            "seed": str(self.seed),
            "training.steps": str(self.own_steps),
            "evaluation.every": str(every),
            "checkpoint.every": str(every),
            "checkpoint.keep": str(EVALUATIONS + 1),
            **self.models(),
            **self.method.options,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        return ["train.py", "--config", str(self.task.config.relative_to(Path.cwd())), *words]

    def models(self) -> dict[str, str]:
        """The models that it starts from."""
        here = Path.cwd()
        paths = {name: getattr(self.task, name).relative_to(here) for name in ("small", "large")}
        if self.method.options.get("algorithm") == "grpo":
            paths = {name: paths[name] for name in [self.method.options["grpo.model"]]}
        needed = self.needed()
        if needed:
            step = best_step(needed) if self.method.teacher else needed.own_steps
            paths["large"] = needed.folder / "export" / f"step_{step}" / "large"
        found = {}
        for name, path in paths.items():
            found[f"{name}.path"] = str(path)
            rate = self.task.learning_rates[name] * self.method.rate
            found[f"{name}.learning_rate"] = f"{rate:g}"
        return found


def best_step(run: Run) -> int:
    """The step after which the large model's held-out accuracy was highest; the first of them."""
    rows = read(run.record).evaluations
    accuracies = {int(row["step"]): row["large"] for row in rows if row["step"]}
    return max(accuracies, key=lambda step: (accuracies[step], -step))


def export(run: Run, step: int, log: Path) -> None:
    """Make the models of a checkpoint folders to load, if they are none yet."""
    if not (run.folder / "export" / f"step_{step}").exists():
        words = ["-m", "codistill", "export", str(run.folder), "--step", str(step)]
        call(words, log)


def call(words: list[str], log: Path) -> None:
    """Run python with these words, one thread; what it prints goes to a file.

    Raises:
        subprocess.CalledProcessError: its exit code is not 0.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        subprocess.run(
            [sys.executable, *words], stdout=file, stderr=file, env=environment, check=True
        )


def execute(run: Run, training_file: Path) -> Record:
    """Train, and keep the numbers.

    Raises:
        subprocess.CalledProcessError: the run failed; its record says so.
    """
    needed = run.needed()
    if needed and run.method.teacher:
        export(needed, best_step(needed), run.log)
    command = run.command(training_file)
    record = Record.begin(run.record, run.method.name, run.seed, command, versions())
    start = time.monotonic()
    try:
        call(command, run.log)
    except subprocess.CalledProcessError as error:
        record.end(f"exit code {error.returncode}", time.monotonic() - start)
        raise
    record.take(run.folder)
    record.end("finished", time.monotonic() - start)
    return record


def execute_all(runs: list[Run], jobs: int) -> list[str]:
    """All runs that are not finished, `jobs` at a time, each after what it needs; what failed.

    Raises:
        ValueError: a finished one has another number of steps, or its folder is needed and gone.
    """
    pending = {run.name: run for run in runs}
    for run in runs:
        needed = run.needed()
        while needed:
            pending.setdefault(needed.name, needed)
            needed = needed.needed()
    for run in pending.values():
        done = read(run.record).steps
        if done not in (0, run.own_steps):
            raise ValueError(
                f"--steps: {run.record} has {done} steps, expected {run.own_steps}; another "
                "--output begins a study of another budget"
            )
    todo = [run for run in pending.values() if not read(run.record).finished]
    names = {run.name for run in todo}
    for run in todo:
        needed = run.needed()
        if needed and needed.name not in names and not needed.folder.is_dir():
            raise ValueError(
                f"{run.name}: starts from a model of {needed.folder}, which is gone; delete "
                f"{needed.record} to train it again"
            )
    if not todo:
        return []
    training_file = todo[0].task.write_data(training_problems(todo[0].steps, PROMPTS))
    started: dict[str, Future] = {}

    def after_needed(run: Run) -> Record:
        needed = run.needed()
        if needed and needed.name in started:
            started[needed.name].result()
        return execute(run, training_file)

    # What is needed by others comes first, so that no job waits for one that is not begun.
    order = sorted(todo, key=depth)
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for run in order:
            started[run.name] = pool.submit(after_needed, run)
        for run in order:
            try:
                record = started[run.name].result()
                print(f"{run.name}: {record.summary()}", flush=True)
            except (subprocess.CalledProcessError, OSError, ValueError) as error:
                failed.append(run.name)
                print(f"{run.name}: failed, {reason(run, error)}", flush=True)
    return failed


def reason(run: Run, error: Exception) -> str:
    """One line for a run that failed."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}, see {run.log}"
    return str(error)


def depth(run: Run) -> int:
    """How many runs must come before this one."""
    needed = run.needed()
    return 0 if needed is None else 1 + depth(needed)
