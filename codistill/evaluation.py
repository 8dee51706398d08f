"""Held-out accuracy, from text that an engine generates."""

import logging
from collections.abc import Callable

import torch.distributed as dist

from codistill import distributed
from codistill.data import Problem
from codistill.engine import Sampler, Sampling, prompt_seeds
from codistill.grading import Grader

EVALUATION_STREAM = 2**31  # in place of a step number: evaluations draw none of a step's seeds


def evaluate(
    engine: Sampler,
    grader: Grader,
    text: Callable[[list[int]], str],
    problems: list[Problem],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> float:
    """Share of `problems` answered right, one completion each, work shared by all processes.

    text: of the tokens of a completion, as it is graded.
    """
    indices = range(dist.get_rank(), len(problems), dist.get_world_size())
    share = [problems[i] for i in indices]
    completions = engine.generate(
        [problem.prompt_ids for problem in share],
        prompt_seeds(seed, EVALUATION_STREAM, [(i, 0) for i in indices]),
        Sampling(num_generations=1, temperature=temperature, max_tokens=max_tokens),
    )
    texts = [text(completion.token_ids) for completion in completions]
    grades = grader.grade(texts, [problem.answers for problem in share])
    numbers = [sum(grades.correct), grades.failures, grades.timeouts]
    correct, failures, timeouts = distributed.totals(numbers)
    if failures or timeouts:
        logging.getLogger(__name__).warning(
            "grading failed on %d and timed out on %d of %d held-out completions: counted as wrong",
            *(failures, timeouts, len(problems)),
        )
    return correct / len(problems)
