"""What the update of one model maximizes, over all of this process's rollouts."""

from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.batch import TokenBatch
from codistill.config import Config
from codistill.config.algorithm import KDEstimator
from codistill.rollout import Rollouts
from codistill.scoring import Scored


@dataclass(frozen=True)
class Penalty:
    """coefficient * KL(model in training || another one), subtracted from the objective (Eq. 2)."""

    name: str
    coefficient: float
    estimator: KDEstimator
    logps: Tensor
    """[N] of the other model."""


@dataclass(frozen=True)
class Objective:
    """Terms of `policy_loss` and `kl_penalty` for S rollouts of N tokens.

    1/normalizer sum over tokens in `mask` of weight * surrogate(ratio to old_logps, advantage)
    """

    old_logps: Tensor
    """[N] under the policy that wrote the rollouts: in codistill the small model's, for both."""
    advantages: Tensor
    """[S]"""
    mask: Tensor
    """[N] bool: the tokens in the loss."""
    normalizer: float | Tensor
    """Counts all processes."""
    weights: Tensor | None = None
    """[S] of each token of a rollout; None: 1."""
    importance_weights: Tensor | None = None
    """[N] correction for an engine that is not the trainer; None: 1."""
    penalties: tuple[Penalty, ...] = ()

    def terms(self, batch: TokenBatch) -> dict[str, Any]:
        """Arguments of `policy_loss` for the tokens of a batch.

        Every surrogate is positively homogeneous in the advantage: a weight may go there.
        """
        advantages, weights = self.advantages, self.importance_weights
        if self.weights is not None:
            advantages = advantages * self.weights
        return dict(
            old_logps=self.old_logps[batch.index],
            advantages=advantages[batch.rows],
            mask=self.mask[batch.index],
            normalizer=self.normalizer,
            importance_weights=None if weights is None else weights[batch.index],
        )

    def penalty_terms(self, penalty: Penalty, batch: TokenBatch) -> dict[str, Any]:
        """Arguments of `kl_penalty` for the tokens of a batch."""
        by_rollout = None if self.weights is None else self.weights[batch.rows]
        return dict(
            reference_logps=penalty.logps[batch.index],
            mask=self.mask[batch.index],
            estimator=penalty.estimator,
            normalizer=self.normalizer,
            weights=by_rollout,
            cu_seqlens=None if by_rollout is None else batch.cu_seqlens,
        )


def make_objectives(
    config: Config, name: str, rollouts: Rollouts, scored: Scored, *, alpha: float = 0.0
) -> list[Objective]:
    """The objective of the model `name` on the rollouts kept of each mini-batch. Collective.

    alpha: weight of the KD term where it is in the objective.
    """
    advantages = scored.credit.advantages[name]
    mask = loss_mask(config, name, rollouts)
    lengths = rollouts.completions.lengths
    in_loss = torch.segment_reduce(mask.float(), "sum", lengths=lengths).to(advantages)
    weights = None
    if config.loss.normalization == "sequence":  # 1/|o| of Eq. 2, tokens in the loss counted
        weights = 1 / in_loss.clamp(min=1)
    parts = scored.credit.kept.chunk(config.training.mini_batches)
    tokens = torch.stack([in_loss[part].sum() for part in parts])
    whole = Objective(
        old_logps=old_logps(config, name, rollouts, scored),
        advantages=advantages,
        mask=mask.to(advantages.device),
        normalizer=0.0,
        weights=weights,
        importance_weights=scored.importance_weights,
        penalties=penalties(config, name, scored, alpha),
    )
    return [replace(whole, normalizer=number) for number in normalizers(config, tokens)]


def normalizers(config: Config, tokens: Tensor) -> list[float] | list[Tensor]:
    """What the sum over the tokens of each mini-batch, of all processes, is divided by.

    tokens: of each mini-batch in this process's loss.
    """
    parts = len(tokens)
    # 1/prompts * 1/G of Eq. 2, Eq. 5 and Eq. 10, prompts counted over all processes.
    kept = config.rollout.prompts_per_step * config.kept / parts
    match config.loss.normalization:
        case "constant":
            return [kept * config.rollout.max_completion_tokens] * parts
        case "sequence":
            return [kept] * parts
        case "tokens":
            tokens = tokens.double()
            if dist.is_initialized():
                dist.all_reduce(tokens)
            return list(tokens.clamp(min=1))
        case _:
            assert_never(config.loss.normalization)


def old_logps(config: Config, name: str, rollouts: Rollouts, scored: Scored) -> Tensor:
    """[N] the denominator of the importance ratio.

    The writer's, of every token (Eq. 5, Eq. 10); in Eq. 8 those of the large model, where it wrote.
    """
    old = scored.logps[config.writer]
    is_hint = rollouts.is_hint.to(old.device)
    if config.loss.old_logps == "engine":
        old = torch.where(is_hint, old, rollouts.engine_logps.to(old))
    if name == "small" and config.hint.loss == "importance":
        old = torch.where(is_hint, scored.logps["large"], old)
    return old


def loss_mask(config: Config, name: str, rollouts: Rollouts) -> Tensor:
    """[N] bool: which tokens are in the loss of a rollout that is kept."""
    mask = torch.ones_like(rollouts.is_hint)
    if name == "small" and config.hint.loss == "masked":
        mask = ~rollouts.is_hint
    if config.rollout.truncated == "mask":
        mask = mask & ~rollouts.truncated.repeat_interleave(rollouts.completions.lengths)
    return mask


def penalties(config: Config, name: str, scored: Scored, alpha: float) -> tuple[Penalty, ...]:
    """The KL terms of the objective: beta's of Eq. 2, and the KD term where it is one."""
    found = []
    if config.loss.beta:
        reference = scored.reference_logps[name]
        found.append(Penalty("reference", config.loss.beta, "k3", reference))
    in_objective = config.kd.placement == "objective"
    if name == "small" and scored.teacher_logps is not None and in_objective:
        found.append(Penalty("kd", alpha, config.kd.chosen_estimator, scored.teacher_logps))
    return tuple(found)
