"""OpenRLHF's actor log-probabilities and policy loss by these kernels.

Signatures are those of OpenRLHF in August 2026; nothing of it is imported.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codistill_kernels._checks import require
from codistill_kernels.importance_weights import importance_weights
from codistill_kernels.integrations._batches import (
    clipped_share,
    counts,
    masked_mean,
    sequence_means,
)
from codistill_kernels.linear_logps import linear_logps
from codistill_kernels.policy_loss import PolicyLoss as Settings
from codistill_kernels.policy_loss import policy_loss
from codistill_kernels.selective_logps import selective_logps


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """openrlhf.models.utils.log_probs_from_logits: log softmax(logits / temperature) at the labels.

    logits [..., V], labels [...] int64. Returns [...] fp32 nats, where OpenRLHF keeps the dtype of
    the logits and divides the caller's logits in place.
    """
    return selective_logps(logits, labels, temperature=temperature)


def linear_log_probs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities and entropy as OpenRLHF's Actor.forward computes them, without its logits.

    As in OpenRLHF, the log-probabilities are those of softmax(logits / temperature) and the entropy
    that of softmax(logits): at a temperature other than 1 it takes a second pass over the head.

    Args:
        hidden_states: [B, T, H]; lm_head_weight: [V, H]. Differentiable.
        labels: [B, T] int64: the sequences rolled by one. The caller drops the last position.

    Returns:
        log-probabilities [B, T], or (log-probabilities, entropy): fp32 nats.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names it.
    """
    inputs = (hidden_states, lm_head_weight, labels)
    if not return_entropy:
        return linear_logps(*inputs, temperature=temperature)
    if temperature == 1:
        return linear_logps(*inputs, return_entropy=True)
    _, entropy = linear_logps(*inputs, return_entropy=True)
    return linear_logps(*inputs, temperature=temperature), entropy


class PolicyLoss(nn.Module):
    """openrlhf.models.PolicyLoss, with its arguments.

    ppo clips the ratio of each token (log-ratios are clamped to 20 nats); gspo clips the ratio of
    each sequence and always takes the mean over sequences of means over tokens.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: Sequence[float] | None = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        super().__init__()
        kind, correction = policy_loss_type, vllm_is_correction_type
        require(kind in ("ppo", "gspo"), "policy_loss_type", "ppo or gspo", repr(kind))
        corrections = ("tis", "icepop", "seq-mask-tis")
        expected = f"one of {', '.join(corrections)}"
        require(correction in corrections, "vllm_is_correction_type", expected, repr(correction))
        self.of_sequence = kind == "gspo"
        self.corrects = enable_vllm_is_correction
        self.correction = correction
        if self.corrects and not self.of_sequence:
            given = vllm_is_truncated_threshold
            is_pair = given is not None and len(given) == 2
            require(is_pair, "vllm_is_truncated_threshold", "(low, high)", given)
        self.thresholds = vllm_is_truncated_threshold
        self.token_level_loss = token_level_loss and not self.of_sequence
        self.settings = Settings(
            "gspo" if self.of_sequence else "clip",
            clip_eps_low,
            clip_eps_high,
            dual_clip=dual_clip,
            log_ratio_clamp=None if self.of_sequence else 20.0,
        )
        self.bounds = (1 - clip_eps_low, 1 + clip_eps_high)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(loss, clip_ratio, ppo_kl, vllm_kl) of tensors [B, T]; log_probs is differentiable.

        action_mask: [B, T] of 0 and 1 in any dtype, None: all. The other arguments are as in
        OpenRLHF; batch_num_tokens and global_batch_size count over all processes. vllm_kl is None
        unless ppo corrects for the engine's rollout_log_probs. Masked values have no effect, not
        even NaN, and a batch without a token has loss 0.

        Raises:
            ValueError: an argument has a wrong shape, dtype, device or value. The message names it.
        """
        mask = torch.ones_like(log_probs, dtype=torch.bool)
        mask = mask if action_mask is None else action_mask.bool()
        has_rollout = not self.corrects or rollout_log_probs is not None
        require(has_rollout, "rollout_log_probs", "given with enable_vllm_is_correction", None)
        weights, vllm_kl, old = None, None, old_log_probs
        if self.corrects and self.of_sequence:
            assert rollout_log_probs is not None
            old = rollout_log_probs
        elif self.corrects:
            assert rollout_log_probs is not None
            weights = self.importance_weights(old_log_probs, rollout_log_probs, mask)
            vllm_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
        total, local = (
            (batch_num_tokens, mask.sum())
            if self.token_level_loss
            else (global_batch_size, mask.any(-1).sum())
        )
        normalizer = local if total is None else total / dp_size
        scaled = advantages if self.token_level_loss else advantages / counts(mask)[:, None]
        terms: dict = dict(loss=self.settings, normalizer=normalizer, importance_weights=weights)
        if self.of_sequence:
            loss = self.of_sequences(log_probs, old, scaled, mask, terms)
            ratio = sequence_means(log_probs.detach() - old, mask).exp()[:, None]
        else:
            loss, _ = policy_loss(log_probs, old, scaled, mask, **terms)
            ratio = (log_probs.detach() - old).exp()
        ppo_kl = masked_mean(old_log_probs - log_probs.detach(), mask)
        return loss, clipped_share(ratio, advantages, mask, self.bounds), ppo_kl, vllm_kl

    def of_sequences(
        self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, terms: dict
    ) -> Tensor:
        """The loss with one ratio per sequence and one advantage per token. Advantages of one sign
        are clipped alike, so their sum over a sequence stands for all of them."""
        advantages = torch.where(mask, advantages, 0.0)
        sums = (advantages.clamp(min=0).sum(-1), advantages.clamp(max=0).sum(-1))
        parts = [policy_loss(log_probs, old, a / counts(mask), mask, **terms)[0] for a in sums]
        return parts[0] + parts[1]

    def importance_weights(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """Weights [B, T] that correct for the engine, detached."""
        assert self.thresholds is not None
        low, high = self.thresholds
        if self.correction == "icepop":
            return importance_weights(old, rollout, mask, drop=(low, high))
        weights = importance_weights(old, rollout, mask)
        if self.correction == "tis":
            return weights.clamp(low, high)
        # A sequence counts if its tokens' geometric mean is within the thresholds.
        mean = sequence_means(old.detach() - rollout, mask).exp()[:, None]
        return torch.where((mean >= low) & (mean <= high), weights, 0.0)
