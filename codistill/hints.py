"""Hints: the first T tokens of a rollout, written by the large model as it is now (section 3.1)."""

from collections.abc import Sequence

import numpy as np

from codistill.config import Config
from codistill.engine import cut_at_end
from codistill.model.policy import Policy
from codistill.texts import StopStrings

HINT_STREAM = 2**32
"""Beside the seeds of a step's rollouts, which are below."""
ROWS = 64
"""Rollouts whose hints are sampled at once; chosen, untested."""


def hint_length(config: Config, step: int, problems: int) -> int:
    """T in step `step`, from 1: that of the configuration in the first epochs, then 0."""
    begun = (step - 1) * config.rollout.prompts_per_step < config.hint.epochs * problems
    return config.hint.tokens if begun else 0


def write_hints(
    policy: Policy,
    prompts: Sequence[list[int]],
    uniforms: np.ndarray,
    *,
    temperature: float,
    end_token_ids: tuple[int, ...],
    stop: StopStrings | None = None,
) -> list[list[int]]:
    """A hint for each prompt: T tokens, fewer where an end token or a stop string ends it.

    uniforms: [S, T] in [0, 1), all that is random. Every process must call, with as many prompts:
    each forward pass of a sharded model is a collective.
    """
    hints: list[list[int]] = []
    for start in range(0, len(prompts), ROWS):
        rows = slice(start, start + ROWS)
        tokens, _ = policy.sample(prompts[rows], uniforms[rows], temperature)
        hints += [cut_at_end(row, end_token_ids, stop)[0] for row in tokens]
    return hints


def hint_uniforms(
    seed: int, step: int, draws: Sequence[tuple[int, int]], count: int, tokens: int
) -> np.ndarray:
    """[len(draws) * count, tokens]: fixed by problem and place in its group, not by process.

    draws: the index of each problem, and how often the step has drawn it before.
    """
    return np.stack(
        [
            np.random.default_rng([seed, HINT_STREAM + step, index, member]).random(tokens)
            for index, before in draws
            for member in range(before * count, (before + 1) * count)
        ]
    )
