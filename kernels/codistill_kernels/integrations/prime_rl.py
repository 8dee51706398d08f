"""prime-rl's chunked output layer and its losses by these kernels.

Signatures are those of prime-rl in August 2026; nothing of it is imported.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from codistill_kernels._checks import require
from codistill_kernels.integrations._batches import masked_mean
from codistill_kernels.linear_logps import linear_logps


class FusedOutputLinear(nn.Linear):
    """prime_rl.trainer.models.layers.lm_head.FusedOutputLinear; with `softcap` Gemma's class.

    A head whose forward pass returns log-probabilities and entropies instead of logits. Unlike
    prime-rl's, the entropy is differentiable too. chunk_size is accepted and ignored: the kernels'
    workspace bounds the memory.
    """

    def __init__(
        self, in_features: int, out_features: int, chunk_size: int, softcap: float | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.softcap = softcap

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"logprobs": [b, s], "entropy": [b, s]}, fp32 nats.

        hidden_states [b, s, H] is differentiable; labels [b, s] int64, each the token that follows;
        temperature [b, s] > 0.

        Raises:
            ValueError: an argument is missing or has a wrong shape, dtype, device or value.
        """
        require(labels is not None, "labels", "given", None)
        require(temperature is not None, "temperature", "given, one per token", None)
        assert labels is not None and temperature is not None
        logprobs, entropy = linear_logps(
            hidden_states,
            self.weight,
            labels.long(),
            temperature=temperature,
            softcap=self.softcap,
            return_entropy=True,
        )
        return {"logprobs": logprobs, "entropy": entropy}


# --- losses ------------------------------------------------------------------------------------


class LossOutputs(NamedTuple):
    """The fields of prime_rl.trainer.rl.loss.LossOutputs."""

    loss: Tensor
    metrics: dict[str, Tensor]


def outside_trust(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask_low: float, mask_high: float
) -> Tensor:
    """DPPO's mask (arXiv:2602.04879): True if a token's probability rose by more than mask_high and
    A > 0, or fell by more than mask_low and A <= 0."""
    moved = logps.detach().exp() - old_logps.exp()
    return torch.where(advantages > 0, moved > mask_high, moved < -mask_low)


def dppo_token_losses(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    is_masked: Tensor,
    *,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> Tensor:
    """-adv_tau A r + kl_tau (log r)^2 of each token, the first term 0 where `is_masked`.

    r = exp(logps - old_logps). All tensors have one shape; log-probabilities are in nats. It is
    differentiable in logps, token by token, so that `linear_token_loss` can take it and start from
    hidden states in one pass.
    """
    log_ratio = logps - old_logps
    # Selected before exp: a masked ratio that overflows would make the gradient 0 * inf.
    ratio = torch.where(is_masked, 0.0, log_ratio).exp()
    gain = torch.where(is_masked, 0.0, adv_tau * advantages * ratio)
    return kl_tau * log_ratio.square() - gain


def default_loss_fn(inputs: Any, loss_config: Any) -> LossOutputs:
    """prime_rl.trainer.rl.loss.default_loss_fn: DPPO with a squared log-ratio (arXiv:2602.02276).

    inputs: prime-rl's LossInputs, tensors [seq]: trainer_logprobs (differentiable),
    inference_logprobs, advantages, loss_mask (bool) and loss_weights or None. loss_config:
    dppo_mask_low, dppo_mask_high, adv_tau, kl_tau. The loss is a sum: prime-rl divides by the
    global count. Masked values have no effect, not even NaN.
    """
    low, high = loss_config.dppo_mask_low, loss_config.dppo_mask_high
    masked = partial(outside_trust, mask_low=low, mask_high=high)
    return trust_region_loss(inputs, loss_config, masked, by_sign=True)


def ipo_loss_fn(inputs: Any, loss_config: Any) -> LossOutputs:
    """prime_rl.trainer.rl.loss.ipo_loss_fn: as `default_loss_fn`, but a token is masked if its
    probability rose or fell by more than loss_config.ipo_threshold."""

    def masked(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
        return (logps.detach().exp() - old_logps.exp()).abs() > loss_config.ipo_threshold

    return trust_region_loss(inputs, loss_config, masked, by_sign=False)


def trust_region_loss(
    inputs: Any, config: Any, masked: Callable[..., Tensor], *, by_sign: bool
) -> LossOutputs:
    """The loss and its metrics. masked(logps, old_logps, advantages): where the gain has no effect;
    by_sign: whether it depends on the advantage's sign, so that there are metrics for each."""
    mask, advantages = inputs.loss_mask, inputs.advantages
    # Select before exp: NaN behind the mask must reach neither the loss nor its gradient.
    logps, old_logps = (
        torch.where(mask, t, 0.0) for t in (inputs.trainer_logprobs, inputs.inference_logprobs)
    )
    is_masked = masked(logps, old_logps, advantages)
    losses = dppo_token_losses(
        logps, old_logps, advantages, is_masked, adv_tau=config.adv_tau, kl_tau=config.kl_tau
    )
    if inputs.loss_weights is not None:
        losses = losses * inputs.loss_weights
    loss = torch.where(mask, losses, 0.0).sum()
    with torch.no_grad():
        log_ratio = logps - old_logps
        mismatch = log_ratio.expm1() - log_ratio
        metrics = {
            "masked_mismatch_kl": masked_mean(mismatch, mask & is_masked),
            "unmasked_mismatch_kl": masked_mean(mismatch, mask & ~is_masked),
            "is_masked": masked_mean(is_masked, mask),
        }
        if by_sign:
            positive, negative = advantages > 0, advantages < 0
            metrics |= {
                "is_masked_low": masked_mean(negative & is_masked, mask),
                "is_masked_high": masked_mean(positive & is_masked, mask),
                "masked_advantage_positive": masked_mean(positive, mask & is_masked),
                "masked_advantage_negative": masked_mean(negative, mask & is_masked),
            }
    return LossOutputs(loss, metrics)
