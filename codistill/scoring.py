"""What happens to rollouts between generation and training (section 3 of the paper).

engine -> Rollouts -> log-probabilities of both models -> effective reward (Eq. 6)
       -> top and bottom G/2 of M (section 3.3) -> advantages of both models (Eq. 7)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codistill.batching import TokenBatch
from codistill.config import Config
from codistill.data import Problem
from codistill.model import Policy
from codistill.rollout import Completion
from codistill_kernels import Scores, codistill_scores


@dataclass(frozen=True)
class Rollouts:
    """S = prompts x M graded completions of the small model, prompt after prompt."""

    problems: list[Problem]
    """[S] each problem M times."""
    completions: list[Completion]
    texts: list[str]
    accuracy: Tensor
    """[S] 1.0 where the answer is right, else 0.0."""
    format: Tensor
    """[S] format reward; zeros where the run has none."""
    functions: dict[str, Tensor] = field(default_factory=dict)
    """[S] what each reward function of the user's adds, weight included."""

    @property
    def rewards(self) -> Tensor:
        """r of Eq. 6, [S]."""
        return self.accuracy + self.format + sum(self.functions.values())

    def batch(self, rows: Sequence[int], device: torch.device) -> TokenBatch:
        prompts = [self.problems[row].prompt_ids for row in rows]
        return TokenBatch.build(prompts, [self.completions[row].token_ids for row in rows], device)


@dataclass(frozen=True)
class Scored:
    """What both models make of the rollouts: all that training needs."""

    small_logps: list[Tensor]
    """[S] tensors [tokens of s]: the small model that wrote them, pi_phi_old."""
    scores: Scores
    """Rewards, the rollouts kept, and the advantages of both models."""


@torch.no_grad()
def rollout_logps(
    policy: Policy, rollouts: Rollouts, *, temperature: float, batch_size: int, device: torch.device
) -> list[Tensor]:
    """Log-probabilities of every completion under `policy`, one tensor a completion."""
    logps: list[Tensor] = []
    for start in range(0, len(rollouts.completions), batch_size):
        rows = range(start, min(start + batch_size, len(rollouts.completions)))
        batch = rollouts.batch(rows, device)
        logps += batch.split(policy(batch, temperature))
    return logps


def score(
    config: Config, rollouts: Rollouts, small_logps: list[Tensor], large_logps: list[Tensor]
) -> Scored:
    lengths = torch.tensor([0] + [len(logps) for logps in small_logps])
    scores = codistill_scores(
        rollouts.rewards,
        torch.cat(small_logps),
        torch.cat(large_logps),
        lengths.cumsum(0).to(rollouts.rewards.device),
        group_size=config.rollout.num_generations,
        keep=config.downsample.keep,
        alpha=config.kd.alpha,
        max_completion_tokens=config.rollout.max_completion_tokens,
    )
    return Scored(small_logps, scores)
