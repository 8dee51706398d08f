"""The clipped importance-ratio loss, from log-probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from codistill_kernels._checks import (
    can_look,
    require,
    require_float,
    require_mask,
    require_sequences,
    require_shape,
)

KINDS = ("clip",)


@dataclass(frozen=True)
class PolicyLoss:
    """Which surrogate, and its bounds.

    kind: "clip", the token-level surrogate of Eq. 2, 5 and 10.
    epsilon_low, epsilon_high: the ratio stops pushing below 1 - epsilon_low (negative advantage)
        and above 1 + epsilon_high (positive advantage).
    dual_clip: > 1; with a negative advantage the surrogate is at least dual_clip * advantage
        (Ye et al. 2020, arXiv:1912.09729). None: no such bound.

    Raises:
        ValueError: a field is out of range.
    """

    kind: str = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", repr(self.kind))
        require(0 <= self.epsilon_low < 1, "epsilon_low", "in [0, 1)", self.epsilon_low)
        require(self.epsilon_high >= 0, "epsilon_high", ">= 0", self.epsilon_high)
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "> 1", self.dual_clip)

    def bounds(self) -> list[float]:
        """epsilon_low, epsilon_high and dual_clip, if there is one: arguments of a custom op."""
        bounds = [self.epsilon_low, self.epsilon_high]
        return bounds if self.dual_clip is None else [*bounds, self.dual_clip]


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    loss: PolicyLoss = PolicyLoss(),  # noqa: B008  (frozen)
    normalizer: float | Tensor,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate over flat tokens: a sum, divided once.

    r[n] = exp(logps[n] - old_logps[n])
    c[n] = clip(r[n], 1 - epsilon_low, 1 + epsilon_high)
    loss = -(1/normalizer) sum_n w[n] min(r[n] A[n], c[n] A[n])

    Args:
        logps: [N] log-probabilities of the policy in training, nats. Differentiable.
        old_logps: [N] those of the policy that wrote the tokens; in Eq. 5 and Eq. 10 alike the
            small model's. None: the policy itself, so r = 1, and the gradient is that of r.
        advantages: [N], or [S] with `cu_seqlens`. No gradient flows into it.
        mask: [N] bool; False takes a token out of everything, whatever its other values are.
        loss: which surrogate.
        normalizer: > 0; the count that the sum is divided by, over all processes and micro-batches:
            Eq. 5 has prompts * G * max completion tokens.
        importance_weights: [N] w, e.g. the truncated ratio of trainer to engine. No gradient.
        cu_seqlens: [S + 1]; tokens of sequence s are cu_seqlens[s] : cu_seqlens[s + 1].

    Returns:
        loss, a scalar (fp32; fp64 for fp64 logps), and statistics over unmasked tokens, tensors on
        the device of logps: `tokens`, `ratio_mean`, `ratio_max`, `clip_fraction_low` and
        `clip_fraction_high` (share of tokens whose gradient a bound cuts), `approx_kl` (mean of
        r - 1 - log r, nats), `ess` (effective sample size, (sum r)^2 / (tokens sum r^2), in (0, 1])
        and `logps`, detached. Without a token all are 0.

    A ratio exactly on a bound is not clipped: the gradient there is that of r A.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value. The message names it.

    Source: Eq. 5 and Eq. 10. Definition: codistill_kernels.reference.policy_loss.
    """
    check_inputs(logps, old_logps, advantages, mask, normalizer, importance_weights, cu_seqlens)
    logps = logps if logps.dtype == torch.float64 else logps.float()
    keep = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    if cu_seqlens is not None:
        advantages = advantages.repeat_interleave(cu_seqlens.diff(), output_size=len(logps))
    old = logps if old_logps is None else old_logps
    weights = torch.ones_like(logps) if importance_weights is None else importance_weights
    # Select before exp: NaN behind the mask must reach neither the loss nor its gradient.
    log_ratio = torch.where(keep, logps - old.detach(), 0.0)
    advantages = torch.where(keep, advantages.detach().to(logps.dtype), 0.0)
    weights = torch.where(keep, weights.detach().to(logps.dtype), 0.0)
    surrogate, low, high = clipped_surrogate(log_ratio, advantages, loss)
    statistics = summarize(log_ratio.detach(), keep, low, high)
    return -(weights * surrogate).sum() / normalizer, statistics | {"logps": logps.detach()}


def cuts(ratio: Tensor, advantages: Tensor, loss: PolicyLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Where the low and the high bound cut the gradient, and the ratio that stands there."""
    low = (advantages < 0) & (ratio < 1 - loss.epsilon_low)
    high = (advantages > 0) & (ratio > 1 + loss.epsilon_high)
    bound = torch.where(low, 1 - loss.epsilon_low, torch.full_like(ratio, 1 + loss.epsilon_high))
    if loss.dual_clip is not None:
        far = (advantages < 0) & (ratio > loss.dual_clip)
        bound, high = torch.where(far, loss.dual_clip, bound), high | far
    return low, high, bound


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, loss: PolicyLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """The surrogate of each token, and where the low and the high bound cut its gradient."""
    low, high, bound = cuts(log_ratio.detach().exp(), advantages, loss)
    # Chosen by comparison: torch.minimum would split the gradient of a tie. And before exp: a ratio
    # that overflows where nothing depends on it would make the gradient 0 * inf.
    free = ~(low | high)
    ratio = torch.where(free & (advantages != 0), log_ratio, 0.0).exp()
    return torch.where(free, ratio, bound) * advantages, low, high


def token_gradients(ratio: Tensor, advantages: Tensor, loss: PolicyLoss) -> Tensor:
    """d(-surrogate) / d logp of each token, [N]: -r A, and 0 where a bound cuts."""
    low, high, _ = cuts(ratio, advantages, loss)
    return torch.where(low | high | (advantages == 0), 0.0, -ratio * advantages)


def summarize(log_ratio: Tensor, keep: Tensor, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Statistics of `policy_loss`. Masked tokens have ratio 1 and are taken out again."""
    tokens = keep.sum().to(log_ratio.dtype)
    count = tokens.clamp(min=1)
    ratio = torch.where(keep, log_ratio.exp(), 0.0)
    # ess does not change when all ratios are scaled: by the largest, no square overflows.
    largest = torch.where(keep, log_ratio, -torch.inf).max() if len(keep) else tokens
    scaled = torch.where(keep, (log_ratio - largest).exp(), 0.0)
    kl = torch.where(keep, log_ratio.expm1() - log_ratio, 0.0)
    return {
        "tokens": tokens,
        "ratio_mean": ratio.sum() / count,
        "ratio_max": ratio.max() if ratio.numel() else tokens,
        "clip_fraction_low": low.sum() / count,
        "clip_fraction_high": high.sum() / count,
        "approx_kl": kl.sum() / count,
        "ess": torch.where(
            tokens > 0, scaled.sum().square() / (count * scaled.square().sum()), 0.0
        ),
    }


def check_inputs(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    normalizer: float | Tensor,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    require(logps.ndim == 1, "logps", "[N]", tuple(logps.shape))
    require_float("logps", logps)
    tokens = (len(logps),)
    for name, tensor in (("old_logps", old_logps), ("importance_weights", importance_weights)):
        if tensor is not None:
            require_shape(name, tensor, tokens, "[N]")
    require_mask(mask, len(logps))
    if cu_seqlens is None:
        require_shape("advantages", advantages, tokens, "[N]")
    else:
        require_sequences(cu_seqlens, len(logps))
        require_shape("advantages", advantages, (len(cu_seqlens) - 1,), "[S]")
    if isinstance(normalizer, Tensor):
        require_shape("normalizer", normalizer, (), "a scalar")
    if not isinstance(normalizer, Tensor) or can_look(normalizer):
        require(normalizer > 0, "normalizer", "> 0", normalizer)
