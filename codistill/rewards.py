"""The reward r of Eq. 6 for the rollouts of a step: accuracy, format, the user's functions."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.config.data import RewardConfig
from codistill.data import Problem
from codistill.grading import Grader, format_reward
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
            RewardError: a reward function failed on one of the processes; all of them raise it.
        """
        with metrics.timer("time/grade"):
            grades = self.grader.grade(texts, [problem.answers for problem in problems])
            form = [format_reward(text) if self.config.format else 0.0 for text in texts]
            functions = self.call_functions(problems, texts, token_ids, metrics)
        terms = RewardTerms(floats(grades.correct), floats(form), functions)
        metrics.mean_of("reward/accuracy", terms.accuracy)
        metrics.mean_of("reward/format", terms.format)
        metrics.total("grade/failures", grades.failures)
        metrics.total("grade/timeouts", grades.timeouts)
        return terms

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
            stop_together(error)
            known = [value for value in values if value is not None]
            metrics.mean(f"reward/{function.name}", sum(known), len(known))
            terms[function.name] = function.weight * floats([v or 0.0 for v in values])
        return terms


def floats(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def stop_together(error: RewardError | None) -> None:
    """Raise on every process the first error that any has: a process that stops alone leaves the
    others waiting."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else str(error))
    message = next((message for message in errors if message is not None), None)
    if message is not None:
        raise RewardError(message) from error
