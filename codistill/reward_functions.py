"""The user's own reward functions: found by import path, called with a batch.

    def brevity(prompts, completions, completion_ids, **columns):
        return [-len(ids) / 1000 for ids in completion_ids]

All arguments are lists with one item per completion: the text of the prompt, the text of the
completion, its token ids, and every column of the training data. None for a completion means that
the reward does not apply to it: it adds 0 and is left out of the mean in the metrics.
"""

import importlib
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from codistill.config.base import ConfigError
from codistill.config.data import RewardConfig
from codistill.failures import RunError
from codistill.watching import watched

LARGEST_REWARD = 1e15  # float32 holds its square, which advantages take; chosen, untested
OWN_ARGUMENTS = ("prompts", "completions", "completion_ids", "prompt", "completion")
"""Columns of these names are not passed on, because arguments have these names."""


class RewardError(RunError):
    """A reward function failed, or returned something that is no reward."""


class OutOfTime(BaseException):
    """A reward function took too long. No Exception, so that no function handles it as its own."""


@dataclass(frozen=True)
class RewardFunction:
    """One of the user's functions and its weight in r."""

    path: str
    weight: float
    function: Callable[..., Any]
    timeout: float
    """Seconds that a call may take."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        rows: list[dict[str, Any]],
    ) -> list[float | None]:
        """One reward per completion, weight not included.

        rows: the row of the training data that each completion belongs to.

        Raises:
            RewardError: the function raised, took too long or tried to end the process, or did not
                return a number or None per completion.
        """
        columns = {name: [row[name] for row in rows] for name in columns_of(rows[0])}
        try:
            with watched(described(self.path), self.timeout), time_limit(self.timeout):
                values = self.function(  # gets copies, as training goes on with the originals
                    prompts=list(prompts),
                    completions=list(completions),
                    completion_ids=[list(ids) for ids in completion_ids],
                    **columns,
                )
                if isinstance(values, Iterator):  # a generator, whose code runs only now
                    values = list(values)
        except BaseException as error:  # the user's code may raise anything, SystemExit included
            frames = traceback.extract_tb(error.__traceback__)
            frame = ([f for f in frames if f.filename != __file__] or frames)[-1]
            where = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
            raise self.failed(f"raised {type(error).__name__}: {error} ({where})") from error
        try:
            rewards = numbers(values)
        except Exception as error:
            raise self.failed(f"returned no list of numbers: {error}") from error
        if len(rewards) != len(completions):
            raise self.failed(f"returned {len(rewards)} rewards for {len(completions)} completions")
        for number, reward in enumerate(rewards):
            if reward is None:
                continue
            if not math.isfinite(reward):
                raise self.failed(f"returned {reward} for completion {number}")
            if abs(reward) * max(1, abs(self.weight)) > LARGEST_REWARD:
                raise self.failed(
                    f"returned {reward} for completion {number}, more than {LARGEST_REWARD:g} with "
                    f"its weight {self.weight}"
                )
        return rewards

    def failed(self, how: str) -> RewardError:
        return RewardError(f"{described(self.path)} {how}")


def numbers(values: Any) -> list[float | None]:
    """Rewards as floats.

    Raises:
        TypeError, ValueError: `values` holds something else than numbers and None, or has no order
            of completions: a dictionary would give its keys, a set its members in any order.
    """
    if isinstance(values, Mapping | Set):
        raise TypeError(f"found a {type(values).__name__}")
    text = next((value for value in values if isinstance(value, str | bytes)), None)
    if text is not None:
        raise TypeError(f"found the text {text!r}")
    return [None if value is None else float(value) for value in values]


def described(path: str) -> str:
    return f"reward function {path}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when it takes longer. In the main thread only, and only where
    Python code runs: a call into C is not interrupted, but ended by `watched`."""

    def expire(number: int, frame: object) -> None:
        raise OutOfTime(f"it may take {seconds:g} s (reward.function_timeout)")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def columns_of(row: dict[str, Any]) -> list[str]:
    return [name for name in row if name not in OWN_ARGUMENTS]


def load_functions(config: RewardConfig, row: dict[str, Any]) -> list[RewardFunction]:
    """Import the functions of `reward.functions`; modules in the current folder are found too.

    row: any row of the training data, whose columns will be arguments.

    Raises:
        ConfigError: no such function, or it does not take the arguments it will be given.
    """
    if config.functions and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return [
        RewardFunction(path, weight, load_function(path, columns_of(row)), config.function_timeout)
        for path, weight in config.functions.items()
    ]


def load_function(path: str, columns: Iterable[str]) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        with watched(f"the import of {described(path)}"):
            function = getattr(importlib.import_module(module), name)
    except BaseException as error:  # importing runs the user's module, which may raise anything
        message = f"{type(error).__name__}: {error}"
        raise wrong(path, f"the import path of a function; {message}") from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise wrong(path, f"a plain function, found {function!r}")
    arguments = dict.fromkeys(["prompts", "completions", "completion_ids", *columns])
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(arguments)
        raise wrong(path, f"a function that takes {takes} (or **columns); {error}") from error
    return function


def wrong(path: str, expected: str) -> ConfigError:
    return ConfigError(f"reward.functions = {path!r}: expected {expected}")
