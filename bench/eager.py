"""The baseline without a kernel: every operation as one writes it in PyTorch.

Products are in the dtype of their operands, so that logits are rounded to it; the softmax is in
fp32. With fp64 operands everything is in fp64: the results that others are compared with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.batch import Batch
from bench.shapes import KEPT, ROLLOUTS_PER_PROMPT

EPSILON = 0.2  # clip bound, PolicyLoss's default
ALPHA = 1.0  # weight of the knowledge distillation reward
TRUNCATE = 2.0  # upper bound of an importance weight
MAX_COMPLETION_TOKENS = 3072  # Table 3 of the paper
JSD_WEIGHT = 0.5  # weight of the teacher in the mixture: the default of ours, TRL and Liger


def softmax_input(logits: Tensor) -> Tensor:
    """Logits in fp32, or fp64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def logps_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[N] log-probabilities of the tokens from logits [N, V]."""
    log_p = softmax_input(logits).log_softmax(-1)
    return log_p.gather(-1, token_ids[:, None]).squeeze(-1)


def clipped_loss(logps: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
    """PPO's clipped surrogate, summed over unmasked tokens; logps, advantages: [N]."""
    ratio = torch.where(batch.mask, logps - batch.old_logps, 0.0).exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return -torch.where(batch.mask, surrogate, 0.0).sum() / batch.normalizer


def linear_logps(batch: Batch) -> Tensor:
    return logps_of(batch.hidden_states @ batch.weight.T, batch.token_ids)


def linear_policy_loss(batch: Batch) -> Tensor:
    return clipped_loss(linear_logps(batch), batch.token_advantages, batch)


def linear_cross_entropy(batch: Batch) -> Tensor:
    logits = batch.hidden_states @ batch.weight.T
    return F.cross_entropy(softmax_input(logits), batch.targets)


def codistill_losses(batch: Batch) -> tuple[Tensor, Tensor]:
    small, large = (logps_of(x @ weight.T, batch.token_ids) for x, weight in batch.models)
    small_loss = clipped_loss(small, batch.token_advantages, batch)
    return small_loss, clipped_loss(large, -batch.token_advantages, batch)


def linear_reverse_kl(batch: Batch) -> Tensor:
    log_p, log_q = (softmax_input(x @ w.T).log_softmax(-1) for x, w in batch.models)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def linear_divergence(batch: Batch) -> Tensor:
    """Generalized Jensen-Shannon divergence of student and teacher, mean over unmasked tokens."""
    log_p, log_q = (softmax_input(x @ w.T).log_softmax(-1) for x, w in batch.models)
    log_m = torch.logaddexp(log_p + math.log(1 - JSD_WEIGHT), log_q + math.log(JSD_WEIGHT))
    of_student = (log_p.exp() * (log_p - log_m)).sum(-1)
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    values = JSD_WEIGHT * of_teacher + (1 - JSD_WEIGHT) * of_student
    return torch.where(batch.mask, values, 0.0).sum() / batch.mask.sum()


def selective_logps(batch: Batch) -> Tensor:
    return logps_of(batch.logits, batch.token_ids)


def policy_loss(batch: Batch) -> Tensor:
    return clipped_loss(batch.other_logps, batch.token_advantages, batch)


def importance_weights(batch: Batch) -> Tensor:
    ratio = (batch.other_logps - batch.old_logps).exp().clamp(max=TRUNCATE)
    return torch.where(batch.mask, ratio, 0.0)


def kd_rewards(batch: Batch) -> Tensor:
    log_ratio = batch.other_logps - batch.old_logps
    sums = torch.segment_reduce(log_ratio, "sum", lengths=batch.cu_seqlens.diff())
    return batch.rewards + ALPHA * sums / MAX_COMPLETION_TOKENS


def group_advantages(batch: Batch) -> Tensor:
    return centred(batch.rewards, ROLLOUTS_PER_PROMPT)


def downsample(batch: Batch) -> Tensor:
    return kept_rows(batch.rewards)


def codistill_scores(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    effective = kd_rewards(batch)
    kept = kept_rows(effective)
    return kept, centred(effective[kept], KEPT), centred(batch.rewards[kept], KEPT)


def centred(rewards: Tensor, size: int) -> Tensor:
    """Rewards less the mean of their group; groups are so many neighbours."""
    groups = rewards.view(-1, size)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def kept_rows(scores: Tensor) -> Tensor:
    """Indices of the best and the worst rollouts of each prompt, half of `KEPT` each."""
    groups = scores.view(-1, ROLLOUTS_PER_PROMPT)
    order = groups.argsort(dim=1, descending=True, stable=True)
    columns = torch.cat((order[:, : KEPT // 2], order[:, -(KEPT // 2) :]), dim=1).sort(dim=1).values
    first = torch.arange(len(groups), device=scores.device) * ROLLOUTS_PER_PROMPT
    return (first[:, None] + columns).flatten()
