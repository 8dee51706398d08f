"""What happens to rollouts between generation and training (section 3 of the paper).

engine -> Rollouts -> log-probabilities of the models -> effective reward (Eq. 6)
       -> top and bottom G/2 of M (section 3.3) -> advantages of those that learn (Eq. 7)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from codistill.advantages import advantages
from codistill.batch import TokenBatch
from codistill.config import Config
from codistill.data import Problem
from codistill.engine import Completion
from codistill.model import Policy
from codistill_kernels import downsample, importance_weights, kd_rewards, linear_reverse_kl

CHOICE_STREAM = 2**33  # beside the seeds of rollouts and hints


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
        """r of Eq. 6 as graded, [S]."""
        return self.accuracy + self.format + sum(self.functions.values())

    @property
    def lengths(self) -> Tensor:
        """[S] tokens of each rollout, its hint included."""
        return torch.tensor([len(c.token_ids) for c in self.completions])

    @property
    def truncated(self) -> Tensor:
        """[S] bool: cut off by max_completion_tokens."""
        return torch.tensor([completion.truncated for completion in self.completions])

    def batch(self, rows: Sequence[int], device: torch.device) -> TokenBatch:
        prompts = [self.problems[row].prompt_ids for row in rows]
        return TokenBatch.build(prompts, [self.completions[row].token_ids for row in rows], device)


@dataclass(frozen=True)
class Scored:
    """What the models make of the rollouts: all that training needs. K = prompts x G."""

    logps: dict[str, list[Tensor]]
    """[S] tensors [tokens of s] of each model loaded, before it is trained on them (nats)."""
    teacher_logps: list[Tensor] | None
    """[S] tensors: those of the large model that the KD term takes; None in grpo."""
    kd_rewards: Tensor | None
    """[S] alpha-weighted KD reward; None in grpo, which has no teacher."""
    effective_rewards: Tensor
    """[S] r~ of Eq. 6; r where there is no KD reward."""
    kept: Tensor
    """[K] int64, rows of the rollouts to train on, rising."""
    advantages: dict[str, Tensor]
    """[K] of each model that learns: the large one of codistill from r, any other from r~."""
    reference_logps: dict[str, list[Tensor]] = field(default_factory=dict)
    """[K] tensors of each model that learns under what it was at the start, with loss.beta > 0."""
    importance_weights: list[Tensor] | None = None
    """[S] tensors: trainer over engine, truncated, with loss.importance_cap."""


@torch.no_grad()
def rollout_logps(
    policy: Policy,
    rollouts: Rollouts,
    rows: Sequence[int],
    *,
    temperature: float,
    batch_size: int,
    device: torch.device,
) -> list[Tensor]:
    """Log-probabilities of these rollouts under `policy`, one tensor a rollout."""
    logps: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        batch = rollouts.batch(rows[start : start + batch_size], device)
        logps += batch.split(policy(batch, temperature))
    return logps


@torch.no_grad()
def divergences(
    small: Policy,
    large: Policy,
    rollouts: Rollouts,
    *,
    temperature: float,
    batch_size: int,
    device: torch.device,
) -> list[Tensor]:
    """KL(small || large) of the next token before each token of each rollout, whole vocabulary."""
    found: list[Tensor] = []
    for start in range(0, len(rollouts.completions), batch_size):
        rows = range(start, min(start + batch_size, len(rollouts.completions)))
        batch = rollouts.batch(rows, device)
        kl = linear_reverse_kl(
            small.head_inputs(batch),
            large.head_inputs(batch),
            temperature=temperature,
            vocab_size=small.vocab_size,
        )
        found += batch.split(kl)
    return found


def alpha_at(config: Config, step: int, total_steps: int) -> float:
    """alpha of Eq. 6 in step `step`, from 1: constant, or on a straight line to kd.alpha_end."""
    start, end = config.kd.alpha, config.kd.alpha_end
    if end is None:
        return start
    return start + (end - start) * (step - 1) / max(1, total_steps - 1)


def score(
    config: Config,
    rollouts: Rollouts,
    logps: dict[str, list[Tensor]],
    *,
    step: int = 1,
    total_steps: int = 1,
    kl: list[Tensor] | None = None,
) -> Scored:
    """Effective rewards, the rollouts kept, and advantages. Every process must call.

    logps: of each model that the algorithm loads, one tensor a rollout. kl: what `divergences`
    gives, for the estimator "exact". step: of total_steps, where alpha or a random choice changes.
    """
    rewards = task_rewards(config, rollouts)
    effective, kd, teacher = rewards, None, None
    if config.algorithm != "grpo":
        teacher, alpha = logps["large"], alpha_at(config, step, total_steps)
        effective = effective_rewards(config, rewards, logps["small"], teacher, kl, alpha)
        kd = effective - rewards
    kept = choose(config, rollouts, effective, step)
    scored = Scored(logps, teacher, kd, effective, kept, {})
    return with_advantages(config, rollouts, scored)


def task_rewards(config: Config, rollouts: Rollouts) -> Tensor:
    """r of Eq. 6, [S]."""
    return credited(config, rollouts, rollouts.rewards)


def credited(config: Config, rollouts: Rollouts, values: Tensor) -> Tensor:
    """[S] values; 0 where a rollout was cut off and the run gives no reward for that."""
    if config.rollout.truncated != "zero_reward":
        return values
    return torch.where(rollouts.truncated.to(values.device), 0.0, values)


def effective_rewards(
    config: Config,
    rewards: Tensor,
    small: list[Tensor],
    large: list[Tensor],
    kl: list[Tensor] | None,
    alpha: float,
) -> Tensor:
    """r~ of Eq. 6, [S]; r where the KD term is in the objective.

    small, large: log-probabilities, one tensor a rollout.
    """
    if config.kd.placement == "objective":
        return rewards
    lengths = torch.tensor([0] + [len(part) for part in small])
    student, teacher = torch.cat(small), torch.cat(large)
    estimator = config.kd.chosen_estimator
    if estimator == "exact":
        assert kl is not None, "of `divergences`"
        # k1 sums log-ratios, whose expectation is minus the divergence: here it is itself.
        student, teacher, estimator = torch.zeros_like(student), -torch.cat(kl), "k1"
    return kd_rewards(
        rewards,
        teacher,
        student,
        lengths.cumsum(0).to(rewards.device),
        alpha=alpha,
        max_completion_tokens=config.rollout.max_completion_tokens,
        estimator=estimator,
    )


def choose(config: Config, rollouts: Rollouts, effective: Tensor, step: int) -> Tensor:
    """[K] int64: G of each prompt's M rollouts (section 3.3), rows rising."""
    method, by = config.downsample.method, config.downsample.by
    if method == "none":
        return torch.arange(len(effective), device=effective.device)
    lengths = rollouts.lengths.to(effective)
    scores = {
        "effective_reward": effective,
        "shortness": -lengths,
        "reward_per_token": effective / lengths,
    }[by]
    generations = config.rollout.num_generations
    seed = None
    if method == "random":
        seed = int(np.random.default_rng([config.seed, CHOICE_STREAM, step]).integers(2**63))
    return downsample(scores, generations, config.kept, method=method, seed=seed)


def with_advantages(config: Config, rollouts: Rollouts, scored: Scored) -> Scored:
    """The same with the advantages that follow from its effective rewards."""
    rewards, found = task_rewards(config, rollouts), {}
    accuracy = credited(config, rollouts, rollouts.accuracy)
    for name in config.trained:
        # Eq. 10: the large model learns from the reward alone, it is the one to be like.
        learned = scored.effective_rewards if name == config.writer else rewards
        found[name] = advantages(config, learned, accuracy, scored.kept)
    return replace(scored, advantages=found)


def engine_weights(
    config: Config, rollouts: Rollouts, sampled: list[Tensor]
) -> list[Tensor] | None:
    """[S] tensors: min(trainer/engine, cap) of each token, 1 of a hint's; None without a cap."""
    if config.loss.importance_cap is None:
        return None
    found = []
    for ours, completion, hint in zip(sampled, rollouts.completions, rollouts.hints, strict=True):
        theirs = torch.cat([ours[:hint], ours.new_tensor(completion.logps)])
        found.append(importance_weights(ours, theirs, truncate=config.loss.importance_cap))
    return found
