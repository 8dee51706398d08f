"""From rollouts to what training needs of them (section 3 of the paper).

log-probabilities of the models -> effective reward (Eq. 6) -> top and bottom G/2 of M (section 3.3)
-> advantages of those that learn (Eq. 7)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codistill.advantages import advantages
from codistill.batch import TokenBatch
from codistill.config import Config
from codistill.engine import SyncError
from codistill.model.policy import Policy
from codistill.output.metrics import StepMetrics
from codistill.rollout import Rollouts
from codistill_kernels import downsample, importance_weights, kd_rewards, linear_reverse_kl

CHOICE_STREAM = 2**33  # beside the seeds of rollouts and hints
# Nats; rounding makes 2e-7 on average, 1e-4 on one of a million tokens.
FLOAT32_GAP_LIMIT = 1e-3
# Nats. An engine and a trainer that round each in its own way: 1e-2 on average, 0.1 on one of a
# thousand tokens (tiny models), a few times that where a model is large. A wrong head: 0.9, 3.7.
BFLOAT16_MEAN_GAP_LIMIT, BFLOAT16_QUANTILE_GAP_LIMIT = 0.1, 1.0
QUANTILE = 0.99


class Credit(NamedTuple):
    """What S = prompts x M rollouts are worth, and who learns how much from them."""

    kd_rewards: Tensor | None
    """[S] alpha-weighted KD reward; None in grpo, which has no teacher."""
    effective_rewards: Tensor
    """[S] r~ of Eq. 6; r where there is no KD reward."""
    kept: Tensor
    """[K] int64, K = prompts x G: the rollouts to train on, rising."""
    advantages: dict[str, Tensor]
    """[S] of each model that learns, 0 where a rollout is not kept: the large one of codistill from
    r, any other from r~."""


@dataclass(frozen=True)
class Scored:
    """What the models make of the rollouts: all that training needs, on its device.

    [N] tensors are 0 where a token was not asked for.
    """

    credit: Credit
    mini_batches: list[list[TokenBatch]]
    """The rollouts kept: what the forward passes of each optimizer step of an inner epoch take."""
    logps: dict[str, Tensor]
    """[N] of each model loaded, before it is trained on them (nats)."""
    teacher_logps: Tensor | None = None
    """[N] those of the large model that the KD term takes; None in grpo."""
    reference_logps: dict[str, Tensor] = field(default_factory=dict)
    """[N] of the rollouts kept, of each model that learns under what it was at the start, with
    loss.beta > 0."""
    importance_weights: Tensor | None = None
    """[N] trainer over engine, truncated, with loss.importance_cap."""


@torch.no_grad()
def token_logps(
    policy: Policy, batches: Sequence[TokenBatch], tokens: int, temperature: float
) -> Tensor:
    """[tokens] log-probabilities under `policy` (nats) where the batches have a token, else 0."""
    logps = torch.zeros(tokens, device=batches[0].token_ids.device)
    for batch in batches:
        logps[batch.index] = policy(batch, temperature)
    return logps


@torch.no_grad()
def divergences(
    small: Policy, large: Policy, batches: Sequence[TokenBatch], tokens: int, temperature: float
) -> Tensor:
    """[tokens] KL(small || large) of the next token before each, whole vocabulary (nats)."""
    found = torch.zeros(tokens, device=batches[0].token_ids.device)
    for batch in batches:
        student, small_head = small.head_inputs(batch)
        teacher, large_head = large.head_inputs(batch)
        found[batch.index] = linear_reverse_kl(
            (student, small_head["lm_head_weight"]),
            (teacher, large_head["lm_head_weight"]),
            temperature=temperature,
            softcap=(small_head["softcap"], large_head["softcap"]),
            logit_scale=(small_head["logit_scale"], large_head["logit_scale"]),
            vocab_size=small.vocab_size,
        )
    return found


def alpha_at(config: Config, step: int, total_steps: int) -> float:
    """alpha of Eq. 6 in step `step`, from 1: constant, or on a straight line to kd.alpha_end."""
    start, end = config.kd.alpha, config.kd.alpha_end
    if end is None:
        return start
    return start + (end - start) * (step - 1) / max(1, total_steps - 1)


def assign_credit(
    config: Config,
    rollouts: Rollouts,
    logps: dict[str, Tensor],
    *,
    step: int = 1,
    total_steps: int = 1,
    kl: Tensor | None = None,
    kept: Tensor | None = None,
) -> Credit:
    """Effective rewards, the rollouts kept, and advantages. Collective.

    logps: [N] of each model that the algorithm loads. kl: [N] what `divergences` gives, for the
    estimator "exact". step: of total_steps, where alpha or a random choice changes. kept: those
    that an earlier call has chosen.
    """
    device = logps[config.writer].device
    rewards = credited(config, rollouts, rollouts.rewards).to(device)
    accuracy = credited(config, rollouts, rollouts.accuracy).to(device)
    effective, kd = rewards, None
    if config.has_teacher:
        alpha = alpha_at(config, step, total_steps)
        cu_seqlens = rollouts.completions.cu_seqlens.to(device)
        effective = effective_rewards(config, rewards, cu_seqlens, logps, kl, alpha)
        kd = effective - rewards
    if kept is None:
        kept = choose(config, rollouts, effective, step)
    learned = {}
    for name in config.trained:
        # Eq. 10: the large model is the teacher, it learns from the reward alone.
        source = effective if name == config.writer else rewards
        learned[name] = torch.zeros_like(source)
        learned[name][kept] = advantages(config, source, accuracy, kept)
    return Credit(kd, effective, kept, learned)


def credited(config: Config, rollouts: Rollouts, values: Tensor) -> Tensor:
    """[S] values; 0 where a rollout was cut off and the run gives no reward for that."""
    if config.rollout.truncated != "zero_reward":
        return values
    return torch.where(rollouts.truncated, 0.0, values)


def effective_rewards(
    config: Config,
    rewards: Tensor,
    cu_seqlens: Tensor,
    logps: dict[str, Tensor],
    kl: Tensor | None,
    alpha: float,
) -> Tensor:
    """r~ of Eq. 6, [S]; r where the KD term is in the objective. Arguments: see `assign_credit`."""
    if config.kd.placement == "objective":
        return rewards
    student, teacher, estimator = logps["small"], logps["large"], config.kd.chosen_estimator
    if estimator == "exact":
        assert kl is not None, "of `divergences`"
        # k1 sums log-ratios, whose expectation is minus the divergence: here it is itself.
        student, teacher, estimator = torch.zeros_like(kl), -kl, "k1"
    return kd_rewards(
        rewards,
        teacher,
        student,
        cu_seqlens,
        alpha=alpha,
        max_completion_tokens=config.rollout.max_completion_tokens,
        estimator=estimator,
    )


def choose(config: Config, rollouts: Rollouts, effective: Tensor, step: int) -> Tensor:
    """[K] int64: G of each prompt's M rollouts (section 3.3), rows rising."""
    method, by = config.downsample.method, config.downsample.by
    if method == "none":
        return torch.arange(len(effective), device=effective.device)
    lengths = rollouts.completions.lengths.to(effective)
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


def engine_weights(config: Config, rollouts: Rollouts, sampled: Tensor) -> Tensor | None:
    """[N] min(trainer/engine, cap) of each token, 1 in a hint; None without a cap.

    sampled: [N] the trainer's log-probabilities, at the temperature of sampling.
    """
    if config.loss.importance_cap is None:
        return None
    theirs = rollouts.engine_logps.to(sampled)
    theirs = torch.where(theirs.isnan(), sampled, theirs)
    return importance_weights(sampled, theirs, truncate=config.loss.importance_cap)


def check_numbers(logps: dict[str, Tensor]) -> None:
    """Find a model whose log-probabilities are no numbers. Collective.

    logps: [N] of each model, by name.

    Raises:
        FloatingPointError: on all processes, if one of them has a NaN or an infinity.
    """
    wrong = torch.stack([~values.isfinite().all() for values in logps.values()]).float()
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)  # of flags, as a maximum may lose a NaN
    names = [name for name, flag in zip(logps, wrong.tolist(), strict=True) if flag]
    if names:
        which = " and the ".join(names)
        raise FloatingPointError(f"the {which} model gives log-probabilities that are not finite")


def check_gap(
    config: Config, rollouts: Rollouts, sampled: Tensor, engine: str, metrics: StepMetrics
) -> None:
    """Compare the trainer with the engine, on the tokens that the engine wrote. Collective.

    sampled: [N] the trainer's log-probabilities, at the temperature of sampling.

    Raises:
        SyncError: on all processes, if on one of them they differ by more than a limit.
    """
    theirs = rollouts.engine_logps.to(sampled)
    gap = (sampled - theirs)[~rollouts.is_hint.to(sampled.device)].abs()
    found = sampled.new_zeros(3)
    if len(gap):
        quantile = gap.kthvalue(math.ceil(QUANTILE * len(gap))).values
        found = torch.stack([gap.max(), gap.mean(), quantile])
    metrics.mean_of("rollout/logp_gap_mean", gap)
    metrics.maximum("rollout/logp_gap_max", found[0])
    limit = config.rollout.logp_gap_limit
    limits = (limit or FLOAT32_GAP_LIMIT, math.inf, math.inf)
    if limit is None and config.training.dtype == "bfloat16":
        limits = (math.inf, BFLOAT16_MEAN_GAP_LIMIT, BFLOAT16_QUANTILE_GAP_LIMIT)
    # A maximum over processes may lose a NaN.
    found = found.nan_to_num(nan=math.inf)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)  # all processes stop, or none
    kinds = ("at most", "on average", f"on {QUANTILE:.0%} of the tokens, at most,")
    for value, most, kind in zip(found.tolist(), limits, kinds, strict=True):
        if value > most:
            raise SyncError(
                f"{engine} and the trainer differ by {value:.2e} nats {kind} in a token's "
                f"log-probability, more than {most:.0e} (rollout.logp_gap_limit)"
            )
