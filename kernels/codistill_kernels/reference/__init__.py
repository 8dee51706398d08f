"""Every public function from its formula, in plain PyTorch and any dtype. Imports nothing of ours.

These hold the [N, V] logits: they are the definition, not the product.
"""

from codistill_kernels.reference.both_models import codistill_losses, codistill_scores
from codistill_kernels.reference.divergences import (
    DIVERGENCES,
    linear_divergence,
    linear_reverse_kl,
)
from codistill_kernels.reference.logps import linear_logps, linear_token_loss, selective_logps
from codistill_kernels.reference.policy_losses import (
    KL_ESTIMATES,
    OF_SEQUENCES,
    OF_TOKENS,
    importance_weights,
    kl_penalty,
    policy_loss,
)
from codistill_kernels.reference.rewards import SPLITS, downsample, group_advantages, kd_rewards

__all__ = [
    "DIVERGENCES",
    "KL_ESTIMATES",
    "OF_SEQUENCES",
    "OF_TOKENS",
    "SPLITS",
    "codistill_losses",
    "codistill_scores",
    "downsample",
    "group_advantages",
    "importance_weights",
    "kd_rewards",
    "kl_penalty",
    "linear_divergence",
    "linear_logps",
    "linear_reverse_kl",
    "linear_token_loss",
    "policy_loss",
    "selective_logps",
]
