"""The reward r of Eq. 6 for the rollouts of a step: accuracy, format, the user's functions."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from codistill import distributed
from codistill.config.data import RewardConfig
from codistill.data import Problem
from codistill.grading import Grader, Grades, format_reward
from codistill.output.metrics import StepMetrics
from codistill.reward_functions import RewardError, RewardFunction


class RewardTerms(NamedTuple):
    """The terms of r, each [S] for S rollouts, on the host."""

    accuracy: Tensor
    """1.0 where the answer is right, else 0.0."""
    format: Tensor
    """Zeros where the run has no format reward."""
    functions: dict[str, Tensor]
    """What each reward function adds, weight included."""


class RolloutRewards:
    """Grades completions, calls the reward functions, and measures both."""

    def __init__(
        self,
        config: RewardConfig,
        grader: Grader,
        functions: list[RewardFunction],
    ) -> None:
        self.config, self.grader, self.functions = config, grader, functions

    def __call__(
        self,
        problems: list[Problem],
        texts: list[str],
        token_ids: list[list[int]],
        metrics: StepMetrics,
    ) -> RewardTerms:
        """The terms of r for this process's rollouts. Collective: every process must call.

        Raises:
            RewardError: a reward function failed on one of the processes, or all gradings failed on
                all of them; all raise it.
        """
        with metrics.timer("time/grade"):
            grades = self.grader.grade(texts, [problem.answers for problem in problems])
            self.check_grades(grades)
            form = [format_reward(text) if self.config.format else 0.0 for text in texts]
            functions = self.call_functions(problems, texts, token_ids, metrics)
        terms = RewardTerms(floats(grades.correct), floats(form), functions)
        metrics.mean_of("reward/accuracy", terms.accuracy)
        metrics.mean_of("reward/format", terms.format)
        metrics.total("grade/failures", grades.failures)
        metrics.total("grade/timeouts", grades.timeouts)
        return terms

    def check_grades(self, grades: Grades) -> None:
        """Say that some gradings failed, or stop if all did: then every answer would be wrong."""
        numbers = [grades.failures, grades.timeouts, len(grades.correct)]
        failures, timeouts, count = distributed.totals(numbers)
        text = f"grading failed on {failures} and timed out on {timeouts} of {count} rollouts"
        if 0 < count == failures + timeouts:
            raise RewardError(f"{text} (reward.timeout = {self.config.timeout:g} s)")
        if failures or timeouts:
            logging.getLogger(__name__).warning("%s: counted as wrong", text)

    def call_functions(
        self,
        problems: list[Problem],
        texts: list[str],
        token_ids: list[list[int]],
        metrics: StepMetrics,
    ) -> dict[str, Tensor]:
        prompts, rows = [p.prompt for p in problems], [p.columns for p in problems]
        terms = {}
        for function in self.functions:
            error, values = None, []
            try:
                values = function(prompts, texts, token_ids, rows)
            except RewardError as failure:
                error = failure
            message = distributed.first_error(error)
            if message is not None:
                raise RewardError(message) from error
            known = [value for value in values if value is not None]
            metrics.mean(f"reward/{function.name}", sum(known), len(known))
            terms[function.name] = function.weight * floats([v or 0.0 for v in values])
        return terms


def floats(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
