"""Grading of generated text: whether the answer is right and the form is the one asked for.

Grading happens in processes that import this module and no torch.
"""

import logging
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool
from rich.console import Console
from rich.progress import track

from codistill import gold_cache
from codistill.comparing import is_correct, is_only_text
from codistill.config.base import ConfigError
from codistill.stopping import STOPS

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NUMBER = re.compile(r"-?\d+(\.\d+)?")
CHUNK = 32
"""Gold answers per step of the progress bar."""


def format_reward(text: str) -> float:
    """0.25 for each of the four tags that occurs exactly once; 1.0 at most (appendix B)."""
    return sum(0.25 for tag in TAGS if text.count(tag) == 1)


@dataclass(frozen=True)
class Grades:
    """What a grader found in a batch of completions."""

    correct: list[bool]
    """One per completion; False also where grading failed or took too long."""
    failures: int
    """How many completions raised an exception while they were graded."""
    timeouts: int
    """How many completions ran into the time limit."""


class GradingError(RuntimeError):
    """Completions could not be graded, for a reason that is none of theirs."""


class Grader:
    """`is_correct` in processes of its own, because sympy can hang on what a model writes.

    Grading has no side effects: where its processes are killed, new ones do it again.

    timeout: seconds that a completion may take; after that its process is killed and replaced.
    """

    attempts = 4
    """How often the same completions are graded at most; chosen, untested."""

    def __init__(self, *, timeout: float, processes: int = 1) -> None:
        self.timeout, self.processes = timeout, processes
        self.pool = self.make_pool()

    def make_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self.processes,
            context=multiprocessing.get_context("spawn"),
            initializer=prepare_process,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.pool.stop()
        self.pool.join()

    def call(self, function: Callable, arguments: Sequence[tuple]) -> list[Any]:
        """function(*item) for each item of `arguments`, in processes, within the time limit.

        Returns: what the function returned or the exception that it raised, TimeoutError included.

        Raises:
            GradingError: the processes were killed again and again.
        """
        outcomes: dict[int, Any] = {}
        for attempt in range(1, self.attempts + 1):
            rest = [number for number in range(len(arguments)) if number not in outcomes]
            found = self.attempt(function, {number: arguments[number] for number in rest})
            if attempt == self.attempts:  # a process that died each time failed on its item
                outcomes |= found
            else:
                outcomes |= {n: o for n, o in found.items() if not isinstance(o, ProcessExpired)}
            if len(outcomes) == len(arguments):
                return [outcomes[number] for number in range(len(arguments))]
            # An error, because only those are printed by every process of a run.
            logging.getLogger(__name__).error(
                "a grading process was killed: new ones grade %d completions again",
                len(arguments) - len(outcomes),
            )
            self.stop()
            self.pool = self.make_pool()
        raise GradingError(f"the grading processes were killed {self.attempts} times in a row")

    def attempt(self, function: Callable, items: dict[int, tuple]) -> dict[int, Any]:
        """What `call` returns, by number of the item; without those that a broken pool lost."""
        tasks: dict[int, Future] = {}
        outcomes: dict[int, Any] = {}
        try:
            for number, item in items.items():
                call = (self.timeout, function, *item)
                tasks[number] = self.pool.schedule(with_alarm, args=call, timeout=self.timeout)
        except RuntimeError:  # how pebble says that a process died while none was at work
            return outcomes
        for number, task in tasks.items():
            try:
                outcomes[number] = task.result()
            except BrokenProcessPool:
                continue
            except ProcessExpired as error:
                by_alarm = error.exitcode == -signal.SIGALRM
                outcomes[number] = TimeoutError() if by_alarm else error
            except Exception as error:  # math-verify may raise anything on what a model writes
                outcomes[number] = error
        return outcomes

    def grade(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> Grades:
        """Grade each text against its gold answers, any of which is right.

        Raises:
            GradingError: the processes were killed again and again.
        """
        pairs = [(text, tuple(gold)) for text, gold in zip(texts, answers, strict=True)]
        outcomes = self.call(is_correct, pairs)
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        for error in errors:
            logging.getLogger(__name__).debug("grading failed: %r", error)
        timeouts = sum(isinstance(error, TimeoutError) for error in errors)
        correct = [outcome is True for outcome in outcomes]
        return Grades(correct, failures=len(errors) - timeouts, timeouts=timeouts)

    def unreadable(self, golds: Sequence[Sequence[str]]) -> list[int]:
        """Numbers, from 0, of the rows with an answer that math-verify cannot read.

        One that takes too long is not among them: that depends on the machine, and every process
        must find the same rows. `check_golds` refuses it.

        golds: the answers of each row.
        """
        answers = sorted({a for row in golds for a in row if not NUMBER.fullmatch(a)})
        outcomes = self.call(is_only_text, [(answer,) for answer in answers])
        wrong = {
            answer
            for answer, outcome in zip(answers, outcomes, strict=True)
            if isinstance(outcome, Exception)
            and not isinstance(outcome, TimeoutError | ProcessExpired)
        }
        return [number for number, row in enumerate(golds) if not wrong.isdisjoint(row)]

    def check_golds(self, key: str, path: Path, golds: Sequence[Sequence[str]]) -> None:
        """Refuse gold answers that no completion can be graded against; warn of mere text.

        What was found is kept in the user's cache: answers that were checked before take no time.

        key, path: the key of the configuration and the file that the answers come from.
        golds: the answers of each row.

        Raises:
            ConfigError: an answer has nothing to compare, math-verify fails or exceeds the time
                limit.
        """
        rows: dict[str, int] = {}
        for number, answers in enumerate(golds, start=1):
            for answer in answers:
                if not NUMBER.fullmatch(answer):
                    rows.setdefault(answer, number)
        texts = gold_cache.load_texts(list(rows))
        if texts is None:
            texts = self.only_texts(key, path, rows)
            gold_cache.save_texts(list(rows), texts)
        if texts:
            logging.getLogger(__name__).warning(
                "%s: to math-verify %d answers are mere text: only the same text is right "
                "(first in row %d: %r)",
                *(key, len(texts), rows[texts[0]], texts[0]),
            )

    def only_texts(self, key: str, path: Path, rows: dict[str, int]) -> list[str]:
        """The gold answers that are only text, of `rows`: answers and the rows they stand in.
        A terminal shows how far the check is. Raises ConfigError as `check_golds`."""
        golds = list(rows)
        chunks = [golds[first : first + CHUNK] for first in range(0, len(golds), CHUNK)]
        console = Console(stderr=True)
        texts = []
        for chunk in track(
            chunks,
            description=f"checking the answers of {key}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            outcomes = self.call(is_only_text, [(answer,) for answer in chunk])
            for answer, outcome in zip(chunk, outcomes, strict=True):
                check_gold(key, path, rows[answer], answer, outcome)
            texts += [answer for answer, found in zip(chunk, outcomes, strict=True) if found]
        return texts


def check_gold(key: str, path: Path, row: int, answer: str, outcome: Any) -> None:
    """Raise ConfigError if an answer could not be checked: by an exception or the time limit."""
    if isinstance(outcome, Exception):
        where = f"expected an answer in row {row} that can be compared"
        reason = f"{answer!r}: {type(outcome).__name__}: {outcome}"
        raise ConfigError(f"{key} = {str(path)!r}: {where}, found {reason}") from outcome


def with_alarm(timeout: float, function: Callable, *arguments: Any) -> Any:
    """Call function(*arguments) in a process of the pool. An alarm ends the process a second after
    the time limit, should the parent, which ends it otherwise, have died."""
    signal.alarm(math.ceil(timeout) + 1)
    try:
        return function(*arguments)
    finally:
        signal.alarm(0)


def prepare_process() -> None:
    """Prepare a process of the pool: leave the group of the processes that a terminal, torchrun or
    a scheduler sends its signals to, because a run that is told to stop still finishes its step;
    load math-verify before the first time limit runs.

    A process whose parent has died ends by itself: it reads the end of its pipe, or the alarm of
    its time limit goes off.
    """
    os.setsid()
    for number in STOPS:
        if number != signal.SIGTERM:  # by which the pool ends its processes
            signal.signal(number, signal.SIG_IGN)
    import math_verify  # noqa: F401

    # math-verify warns on every call that its own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
