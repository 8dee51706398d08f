"""What happens to rollouts between generation and training (section 3 of the paper).

engine -> Rollouts -> log-probabilities of the models -> effective reward (Eq. 6)
       -> top and bottom G/2 of M (section 3.3) -> advantages of those that learn (Eq. 7)
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
from codistill_kernels import downsample, group_advantages, kd_rewards


@dataclass(frozen=True)
class Rollouts:
    """S = prompts x M graded completions of the writer, prompt after prompt."""

    problems: list[Problem]
    """[S] each problem M times."""
    completions: list[Completion]
    hints: list[int]
    """[S] how many of a rollout's first tokens the large model wrote."""
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
    """What the models make of the rollouts: all that training needs. K = prompts x G."""

    logps: dict[str, list[Tensor]]
    """[S] tensors [tokens of s] of each model loaded, before it is trained on them (nats)."""
    old_logps: list[Tensor]
    """[S] tensors [tokens of s]: those of the writer."""
    kd_rewards: Tensor | None
    """[S] alpha-weighted KD reward; None in grpo, which has no teacher."""
    effective_rewards: Tensor
    """[S] r~ of Eq. 6; r where there is no KD reward."""
    kept: Tensor
    """[K] int64, rows of the rollouts to train on, rising."""
    advantages: dict[str, Tensor]
    """[K] of each model that learns: the large one of codistill from r, any other from r~."""


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


def score(config: Config, rollouts: Rollouts, logps: dict[str, list[Tensor]]) -> Scored:
    """logps: of each model that the algorithm loads, one tensor a rollout."""
    rewards, keep = rollouts.rewards, config.downsample.keep
    old = logps[config.writer]
    effective, kd = rewards, None
    if config.algorithm != "grpo":
        lengths = torch.tensor([0] + [len(part) for part in old])
        effective = kd_rewards(
            rewards,
            torch.cat(logps["large"]),
            torch.cat(old),
            lengths.cumsum(0).to(rewards.device),
            alpha=config.kd.alpha,
            max_completion_tokens=config.rollout.max_completion_tokens,
        )
        kd = effective - rewards
    kept = downsample(effective, config.rollout.num_generations, keep)
    advantages = {}
    for name in config.trained:
        # Eq. 10: the large model learns from the reward alone, it is the one to be like.
        learned = effective if name == config.writer else rewards
        advantages[name] = group_advantages(learned[kept], keep)
    return Scored(logps, old, kd, effective, kept, advantages)
