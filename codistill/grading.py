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
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool

from codistill.config.base import ConfigError
from codistill.stopping import STOPS

GRADER_VERSION = 1
"""Rises when the same completion may be graded otherwise than before."""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
BARE = re.compile(r"[^{}$\s]+")
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d+)(?![\w^]|\.\d)")
POWER = r"\1 \\times 10^{\2}"
NUMBER = re.compile(r"-?\d+(\.\d+)?")
# The time limit is that of `Grader`, so math-verify's own is off.
OPTIONS: dict[str, Any] = dict(parsing_timeout=None, raise_on_error=True)


def format_reward(text: str) -> float:
    """0.25 for each of the four tags that occurs exactly once; 1.0 at most (appendix B)."""
    return sum(0.25 for tag in TAGS if text.count(tag) == 1)


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Whether `text` gives one of the gold `answers`, as mathematics, not as a string.

    A text without an answer is wrong.

    Raises:
        ValueError: math-verify finds nothing in a gold answer.
        Exception: whatever math-verify, or sympy below it, raises on the prediction.
    """
    from math_verify import verify

    gold = [reading for answer in answers for reading in parse_gold(answer)]
    # verify is not symmetric: the gold answer comes first.
    return verify(gold, parse_prediction(text), timeout_seconds=None, raise_on_error=True)


def parse_prediction(text: str) -> list:
    """What math-verify reads in the answer of a completion; any of its readings may be right.

    The answer is what stands in the last <answer> </answer> pair, else in the last \\boxed{}, else
    what math-verify finds in the whole text. In the first two cases it is read as a formula, and if
    there are words in it also as a sentence that may hold a formula.
    """
    from math_verify import parse

    answer = marked_answer(text)
    if answer is None:
        return parse(text, **OPTIONS)
    readings = parse_formula(answer)
    return readings + parse(answer, **OPTIONS) if WORD.search(answer) else readings


def marked_answer(text: str) -> str | None:
    """What stands in the last <answer> </answer> pair, else in the last \\boxed{}; None without."""
    tagged = ANSWER.findall(text)
    return tagged[-1] if tagged else last_boxed(text)


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} (or \\fbox{}), in braces or not; None if there is none."""
    starts = [match.end() for match in BOXED.finditer(text)]
    rest = text[starts[-1] :] if starts else ""
    if not rest.startswith("{"):
        bare = BARE.match(rest)
        return bare.group() if bare else None
    depth = 0
    for end, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[1:end].strip() or None
    return None


def parse_formula(answer: str) -> list:
    """What math-verify reads in an answer. Powers of ten are written out first: math-verify takes
    the e of 1e-5 for Euler's number."""
    from math_verify import parse

    return parse(f"\\boxed{{{SCIENTIFIC.sub(POWER, answer)}}}", **OPTIONS)


@lru_cache(maxsize=1024)
def parse_gold(answer: str) -> list:
    """What math-verify reads in a gold answer: a sympy expression, or only its text.

    Raises:
        ValueError: math-verify reads nothing.
    """
    readings = parse_formula(answer)
    if not readings:
        raise ValueError(f"math-verify finds nothing in the gold answer {answer!r}")
    return readings


def is_only_text(answer: str) -> bool:
    """Whether a gold answer is no mathematics, so that only the same text is right."""
    return all(isinstance(reading, str) for reading in parse_gold(answer))


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

    def check_golds(self, key: str, path: Path, golds: Sequence[Sequence[str]]) -> None:
        """Refuse gold answers that no completion can be graded against; warn of mere text.

        key, path: the key of the configuration and the file that the answers come from.
        golds: the answers of each row. An answer that is not a plain number takes about 4 ms.

        Raises:
            ConfigError: math-verify finds nothing in an answer, fails or exceeds the time limit.
        """
        rows: dict[str, int] = {}
        for number, answers in enumerate(golds, start=1):
            for answer in answers:
                if not NUMBER.fullmatch(answer):
                    rows.setdefault(answer, number)
        texts = []
        outcomes = self.call(is_only_text, [(answer,) for answer in rows])
        for answer, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, Exception):  # from math-verify, sympy or the time limit
                where = f"expected an answer in row {rows[answer]} that math-verify can read"
                reason = f"{answer!r}: {type(outcome).__name__}: {outcome}"
                raise ConfigError(f"{key} = {str(path)!r}: {where}, found {reason}") from outcome
            if outcome:
                texts.append(answer)
        if texts:
            logging.getLogger(__name__).warning(
                "%s: to math-verify %d answers are mere text: only the same text is right "
                "(first in row %d: %r)",
                *(key, len(texts), rows[texts[0]], texts[0]),
            )


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
