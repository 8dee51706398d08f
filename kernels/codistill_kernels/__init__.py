"""Fused kernels of CoDistill-GRPO: log-probabilities, rewards and losses without [N, V] logits.

Importing does no work: no GPU is asked for, no compiled library is loaded.
"""

from codistill_kernels._version import __version__
from codistill_kernels.codistill import Scores, codistill_losses, codistill_scores
from codistill_kernels.importance_weights import importance_weights
from codistill_kernels.kl_penalty import kl_penalty
from codistill_kernels.linear_divergence import linear_divergence
from codistill_kernels.linear_logps import linear_logps
from codistill_kernels.linear_policy_loss import linear_policy_loss
from codistill_kernels.linear_reverse_kl import linear_reverse_kl
from codistill_kernels.linear_token_loss import linear_token_loss
from codistill_kernels.policy_loss import PolicyLoss, policy_loss
from codistill_kernels.rewards import downsample, group_advantages, kd_rewards
from codistill_kernels.selective_logps import selective_logps

__all__ = [
    "PolicyLoss",
    "Scores",
    "__version__",
    "codistill_losses",
    "codistill_scores",
    "downsample",
    "group_advantages",
    "importance_weights",
    "kd_rewards",
    "kl_penalty",
    "linear_divergence",
    "linear_logps",
    "linear_policy_loss",
    "linear_reverse_kl",
    "linear_token_loss",
    "policy_loss",
    "selective_logps",
]
