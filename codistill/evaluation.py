"""Held-out accuracy, from text that an engine generates: in training and for the command eval."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from codistill import distributed
from codistill.data import Problem
from codistill.engine import Sampler, Sampling, prompt_seeds
from codistill.grading import Grader

EVALUATION_STREAM = 2**31  # in place of a step number: evaluations draw none of a step's seeds


@dataclass(frozen=True)
class Answers:
    """One graded completion of each problem that is this process's share of a set."""

    indices: list[int]
    """Numbers of the problems, in the set."""
    texts: list[str]
    tokens: list[int]
    truncated: list[bool]
    """The length limit ended the completion."""
    correct: list[bool]
    """False also where grading failed or took too long."""
    failures: int
    """How many completions grading failed on, on all processes; and how many took too long."""
    timeouts: int

    def accuracy(self, num_problems: int) -> float:
        """Share of all problems of the set that is answered right. Collective."""
        return distributed.totals([sum(self.correct)])[0] / num_problems


def answer(
    engine: Sampler,
    grader: Grader,
    text: Callable[[list[int]], str],
    problems: list[Problem],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> Answers:
    """Let the engine write one completion of each problem, and grade it; work shared by all
    processes.

    text: of the tokens of a completion, as it is graded.
    temperature: 0 is greedy. max_tokens: longest completion.
    seed: the same one gives the same completions, whatever else has been drawn.
    """
    indices = list(range(dist.get_rank(), len(problems), dist.get_world_size()))
    share = [problems[i] for i in indices]
    completions = engine.generate(
        [problem.prompt_ids for problem in share],
        prompt_seeds(seed, EVALUATION_STREAM, [(i, 0) for i in indices]),
        Sampling(num_generations=1, temperature=temperature, max_tokens=max_tokens),
    )
    texts = [text(completion.token_ids) for completion in completions]
    grades = grader.grade(texts, [problem.answers for problem in share])
    failures, timeouts = distributed.totals([grades.failures, grades.timeouts])
    if failures or timeouts:
        logging.getLogger(__name__).warning(
            "grading failed on %d and timed out on %d of %d held-out completions: counted as wrong",
            *(failures, timeouts, len(problems)),
        )
    return Answers(
        indices,
        texts,
        tokens=[len(completion.token_ids) for completion in completions],
        truncated=[completion.truncated for completion in completions],
        correct=grades.correct,
        failures=failures,
        timeouts=timeouts,
    )
