"""Rewards of generated text: is the answer right, does it have the form asked for."""

import logging
import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from typing import Self

from pebble import ProcessPool

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def format_reward(text: str) -> float:
    """0.25 for each of the four tags that occurs exactly once; 1.0 at most (appendix B)."""
    return sum(0.25 for tag in TAGS if text.count(tag) == 1)


def is_correct(text: str, answer: str) -> bool:
    """Whether `text` gives the gold `answer`, as mathematics, not as a string.

    The prediction is what stands in the last <answer> </answer> pair, or without one whatever
    math-verify finds in the whole text (the last \\boxed{} first). No prediction is wrong.

    Raises:
        ValueError: the gold answer is not mathematics that math-verify can read.
        Exception: whatever math-verify, or sympy below it, raises on the prediction.
    """
    from math_verify import parse, verify

    options = dict(parsing_timeout=None, raise_on_error=True)
    gold = parse(f"\\boxed{{{answer}}}", **options)
    if not gold:
        raise ValueError(f"the gold answer {answer!r} cannot be parsed")
    tagged = ANSWER.findall(text)
    prediction = parse(tagged[-1] if tagged else text, **options)
    if not prediction and tagged:
        prediction = parse(f"\\boxed{{{tagged[-1]}}}", **options)
    return verify(gold, prediction, timeout_seconds=None, raise_on_error=True)


@dataclass(frozen=True)
class Grades:
    correct: list[bool]
    """False too where grading failed: those are counted below."""
    failures: int
    """Completions on which the grader raised an exception."""
    timeouts: int
    """Completions on which it ran into the time limit."""


class Grader:
    """`is_correct` in processes of its own: sympy can hang on what a model writes.

    timeout: seconds a completion may take; then its process is killed and replaced.
    """

    def __init__(self, *, timeout: float, processes: int = 1) -> None:
        self.timeout = timeout
        self.pool = ProcessPool(
            max_workers=processes,
            context=multiprocessing.get_context("spawn"),
            initializer=silence_math_verify,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.stop()
        self.pool.join()

    def grade(self, texts: Sequence[str], answers: Sequence[str]) -> Grades:
        assert len(texts) == len(answers)
        tasks = [
            self.pool.schedule(is_correct, args=pair, timeout=self.timeout)
            for pair in zip(texts, answers, strict=True)
        ]
        correct, failures, timeouts = [], 0, 0
        for task in tasks:
            try:
                correct.append(task.result())
            except TimeoutError:
                timeouts += 1
                correct.append(False)
            except Exception as error:  # the grader's, on any text a model may write: counted
                failures += 1
                correct.append(False)
                logging.getLogger(__name__).debug("grading failed: %r", error)
        return Grades(correct, failures, timeouts)


def silence_math_verify() -> None:
    """It warns on every call that its own time limit is off; ours is on."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
