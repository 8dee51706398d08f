"""Both models of CoDistill-GRPO at once: their advantages, and their losses."""

from torch import Tensor

from codistill_kernels.reference.logps import linear_logps
from codistill_kernels.reference.policy_losses import policy_loss
from codistill_kernels.reference.rewards import downsample, group_advantages, kd_rewards


def codistill_scores(
    rewards: Tensor,
    small_logps: Tensor,
    large_logps: Tensor,
    cu_seqlens: Tensor,
    *,
    group_size: int,
    keep: int,
    alpha: float,
    max_completion_tokens: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KD reward, effective reward (Eq. 6), rows kept (section 3.3), advantages (Eq. 7) of both."""
    effective = kd_rewards(
        rewards,
        large_logps,
        small_logps,
        cu_seqlens,
        alpha=alpha,
        max_completion_tokens=max_completion_tokens,
        mask=mask,
    )
    kept = downsample(effective, group_size, keep)
    small = group_advantages(effective[kept], keep)
    large = group_advantages(rewards[kept], keep)
    return effective - rewards, effective, kept, small, large


def codistill_losses(
    small: tuple[Tensor, ...],
    large: tuple[Tensor, ...],
    token_ids: Tensor,
    small_old_logps: Tensor,
    small_advantages: Tensor,
    large_advantages: Tensor,
    mask: Tensor | None = None,
    *,
    normalizer: float,
) -> tuple[Tensor, Tensor]:
    """Eq. 5 and Eq. 10: both ratios are over the small model's old policy. A model: hidden states,
    weight and, where its head has one, bias."""
    small_loss, large_loss = (
        policy_loss(
            linear_logps(hidden_states, weight, token_ids, bias=bias[0] if bias else None),
            small_old_logps,
            advantages,
            mask,
            normalizer=normalizer,
        )
        for (hidden_states, weight, *bias), advantages in (
            (small, small_advantages),
            (large, large_advantages),
        )
    )
    return small_loss, large_loss
