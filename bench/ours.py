"""Every operation as codistill_kernels implements it."""

from torch import Tensor

import codistill_kernels as kernels
from bench.batch import Batch
from bench.eager import ALPHA, JSD_WEIGHT, MAX_COMPLETION_TOKENS, TRUNCATE
from bench.shapes import KEPT, ROLLOUTS_PER_PROMPT

KD = dict(alpha=ALPHA, max_completion_tokens=MAX_COMPLETION_TOKENS)


def loss_terms(batch: Batch) -> dict[str, Tensor | float]:
    """Arguments of a policy loss besides the log-probabilities."""
    return dict(
        old_logps=batch.old_logps,
        advantages=batch.advantages,
        mask=batch.mask,
        normalizer=batch.normalizer,
        cu_seqlens=batch.cu_seqlens,
    )


def linear_logps(batch: Batch) -> Tensor:
    return kernels.linear_logps(*batch.models[0], batch.token_ids, vocab_size=batch.vocab_size)


def linear_policy_loss(batch: Batch) -> Tensor:
    return kernels.linear_policy_loss(
        *batch.models[0], batch.token_ids, vocab_size=batch.vocab_size, **loss_terms(batch)
    )[0]


def linear_logps_and_policy_loss(batch: Batch) -> Tensor:
    """The loss from two functions, for those who write the second one themselves."""
    logps = kernels.linear_logps(*batch.models[0], batch.targets, vocab_size=batch.vocab_size)
    return kernels.policy_loss(logps, **loss_terms(batch))[0]


def linear_cross_entropy(batch: Batch) -> Tensor:
    """The policy loss with ratios of 1 and advantages of 1: its gradient is the cross entropy's."""
    ones = batch.upstream.new_ones(len(batch.mask))
    tokens = batch.mask.sum()
    return kernels.linear_policy_loss(
        *batch.models[0],
        batch.token_ids,
        None,
        ones,
        batch.mask,
        normalizer=tokens,
        vocab_size=batch.vocab_size,
    )[0]


def codistill_losses(batch: Batch) -> tuple[Tensor, Tensor]:
    terms = loss_terms(batch)
    advantages = terms.pop("advantages")
    (small, _), (large, _) = kernels.codistill_losses(
        *batch.models,
        batch.token_ids,
        terms.pop("old_logps"),
        advantages,
        -advantages,
        **terms,
    )
    return small, large


def linear_reverse_kl(batch: Batch) -> Tensor:
    return kernels.linear_reverse_kl(*batch.models)


def linear_divergence(batch: Batch) -> Tensor:
    return kernels.linear_divergence(
        *batch.models, batch.mask, kind="jsd", jsd_weight=JSD_WEIGHT, normalizer=batch.mask.sum()
    )[0]


def selective_logps(batch: Batch) -> Tensor:
    return kernels.selective_logps(batch.logits, batch.token_ids)


def policy_loss(batch: Batch) -> Tensor:
    return kernels.policy_loss(batch.other_logps, **loss_terms(batch))[0]


def importance_weights(batch: Batch) -> Tensor:
    return kernels.importance_weights(
        batch.other_logps, batch.old_logps, batch.mask, truncate=TRUNCATE
    )


def kd_rewards(batch: Batch) -> Tensor:
    logps = (batch.other_logps, batch.old_logps)
    return kernels.kd_rewards(batch.rewards, *logps, batch.cu_seqlens, **KD)


def group_advantages(batch: Batch) -> Tensor:
    return kernels.group_advantages(batch.rewards, ROLLOUTS_PER_PROMPT)


def downsample(batch: Batch) -> Tensor:
    return kernels.downsample(batch.rewards, ROLLOUTS_PER_PROMPT, KEPT)


def codistill_scores(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    scores = kernels.codistill_scores(
        batch.rewards,
        batch.old_logps,
        batch.other_logps,
        batch.cu_seqlens,
        group_size=ROLLOUTS_PER_PROMPT,
        keep=KEPT,
        **KD,
    )
    return scores.kept, scores.small_advantages, scores.large_advantages
