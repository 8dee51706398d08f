"""Grading of generated text: whether the answer is right and the form is the one asked for.

Grading happens in processes that import this module and no torch.
"""

import logging
import math
import multiprocessing
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from pebble import ProcessPool

from codistill.config.base import ConfigError

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

    tagged = ANSWER.findall(text)
    answer = tagged[-1] if tagged else last_boxed(text)
    if answer is None:
        return parse(text, **OPTIONS)
    readings = parse_formula(answer)
    return readings + parse(answer, **OPTIONS) if WORD.search(answer) else readings


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


class Grader:
    """`is_correct` in processes of its own, because sympy can hang on what a model writes.

    timeout: seconds that a completion may take; after that its process is killed and replaced.
    """

    def __init__(self, *, timeout: float, processes: int = 1) -> None:
        self.timeout = timeout
        self.pool = ProcessPool(
            max_workers=processes,
            context=multiprocessing.get_context("spawn"),
            initializer=prepare_process,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.stop()
        self.pool.join()

    def schedule(self, function: Callable, *arguments: Any) -> Future:
        """Call function(*arguments) in a process of the pool, within the time limit."""
        task = (self.timeout, function, *arguments)
        return self.pool.schedule(with_alarm, args=task, timeout=self.timeout)

    def grade(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> Grades:
        """Grade each text against its gold answers, any of which is right."""
        assert len(texts) == len(answers)
        tasks = [
            self.schedule(is_correct, text, tuple(gold))
            for text, gold in zip(texts, answers, strict=True)
        ]
        correct, failures, timeouts = [], 0, 0
        for task in tasks:
            try:
                correct.append(task.result())
            except TimeoutError:
                timeouts += 1
                correct.append(False)
            except Exception as error:  # math-verify may raise anything on what a model writes
                failures += 1
                correct.append(False)
                logging.getLogger(__name__).debug("grading failed: %r", error)
        return Grades(correct, failures, timeouts)

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
        tasks = {answer: self.schedule(is_only_text, answer) for answer in rows}
        texts = []
        for answer, task in tasks.items():
            try:
                if task.result():
                    texts.append(answer)
            except Exception as error:  # from math-verify, sympy or the time limit
                where = f"expected an answer in row {rows[answer]} that math-verify can read"
                reason = f"{answer!r}: {type(error).__name__}: {error}"
                raise ConfigError(f"{key} = {str(path)!r}: {where}, found {reason}") from error
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
    """Prepare a process of the pool: load math-verify before the first time limit runs, and ignore
    Ctrl-C, which reaches every process of a terminal while the run still finishes its step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import math_verify  # noqa: F401

    # math-verify warns on every call that its own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
