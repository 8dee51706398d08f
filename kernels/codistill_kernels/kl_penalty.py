"""A KL divergence as a term of the objective, from log-probabilities of sampled tokens."""

import torch
from torch import Tensor

from codistill_kernels._checks import (
    require,
    require_logps,
    require_mask,
    require_normalizer,
    require_sequences,
    require_shape,
    require_tensor,
)
from codistill_kernels._estimators import ESTIMATORS, OF_OBJECTIVES, Estimate
from codistill_kernels._scaling import divisor
from codistill_kernels._sequences import to_tokens
from codistill_kernels._tokens import TokenShape


def token_weights(
    weights: Tensor | None, logps: Tensor, keep: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """[N] in the dtype of logps, 0 where not `keep`."""
    tokens = logps.shape[0]
    if cu_seqlens is not None:
        require_sequences(cu_seqlens, tokens, "logps", logps)
    if weights is None:
        return keep.to(logps.dtype)
    require_tensor("weights", weights, "logps", logps)
    if cu_seqlens is None:
        require_shape("weights", weights, (tokens,), "[N]")
    else:
        require_shape("weights", weights, (cu_seqlens.shape[0] - 1,), "[S]")
        weights = to_tokens(weights, cu_seqlens, tokens)
    return torch.where(keep, weights.detach().to(logps.dtype), 0.0)


# --- public function ---------------------------------------------------------------------------


def kl_penalty(
    logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: str = "k3",
    normalizer: float | Tensor,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Estimate of KL(policy || reference) over tokens that the policy sampled: a sum, divided once.

    d[n] = reference_logps[n] - logps[n]
    k2[n] = d[n]^2 / 2
    k3[n] = exp(d[n]) - 1 - d[n]
    abs[n] = |d[n]|
    loss = (1/normalizer) sum_n w[n] k[n] over unmasked tokens

    Tokens are flat, [N], or rows of sequences: every [N] below is then [B, T], S is B, and
    `cu_seqlens` is left out.

    Args:
        logps: [N] log-probabilities of the policy in training, nats; fp32, bf16, fp16 or fp64.
            Differentiable. All else is brought to its precision, fp32 or fp64, whatever its own is.
        reference_logps: [N] those of the model to stay near to. No gradient.
        mask: [N] bool; False takes a token out of everything, whatever its other values are.
        estimator: "k3" is Eq. 4: unbiased in value; its gradient is that of the forward divergence
            KL(reference || policy) in expectation. "k2" has the gradient d log p, which is that of
            the reverse divergence KL(policy || reference) in expectation. "abs", as verl has it, is
            no estimate of a divergence but a bound on it; its gradient -sign(d) d log p is that of
            the distance sum_v |policy - reference| in expectation, and no token pulls harder than
            another. There is no "k1": the gradient of -d is that of log p alone, zero in
            expectation, whatever the reference is.
        normalizer: >= 0; the count that the sum is divided by, over all processes and
            micro-batches. A sum of 0 over 0, where nothing is unmasked, is 0 with gradient 0.
        weights: w, [N], or [S] with `cu_seqlens` or tokens [B, T]: 1/|o_i| for Eq. 2. None: 1.
            Weight 0 adds exactly 0, whatever d is.
        cu_seqlens: [S + 1]; tokens of sequence s are cu_seqlens[s] : cu_seqlens[s + 1].

    Returns:
        loss, a scalar (fp32; fp64 for fp64 logps) to add to `policy_loss`, times a coefficient, and
        statistics over unmasked tokens: `tokens`, `kl` (mean of k, nats; 0 without a token).

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value. The message names
            it. Values of tensors are looked at on the CPU outside torch.compile only.

    One token that the reference likes far better weighs exp(d) with k3 (fp32: inf from d = 89).
    Source: Eq. 2, Eq. 4; Schulman 2020, "Approximating KL divergence"; "abs": kl_penalty of verl.
    Definition: codistill_kernels.reference.kl_penalty.
    """
    shape = TokenShape.of("logps", logps)
    logps, reference_logps, mask = shape.flat(
        logps=logps, reference_logps=reference_logps, mask=mask
    )
    weights, cu_seqlens = shape.sequences("weights", weights, cu_seqlens)
    require_logps("logps", logps)
    require_tensor("reference_logps", reference_logps, "logps", logps)
    require_shape("reference_logps", reference_logps, tuple(logps.shape), "[N]")
    require_mask(mask, len(logps), "logps", logps)
    expected = f"one of {', '.join(OF_OBJECTIVES)} (the gradient of k1 ignores the reference)"
    require(estimator in OF_OBJECTIVES, "estimator", expected, repr(estimator))
    require_normalizer(normalizer)
    logps = logps if logps.dtype == torch.float64 else logps.float()
    keep = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    factors = token_weights(weights, logps, keep, cu_seqlens)
    # Select before exp: NaN behind the mask, or an overflow under weight 0, must reach neither the
    # loss nor its gradient.
    d = torch.where(keep, reference_logps.detach().to(logps.dtype) - logps, 0.0)
    total = (factors * Estimate.apply(torch.where(factors != 0, d, 0.0), estimator)).sum()
    tokens = keep.sum().to(logps.dtype)
    mean = ESTIMATORS[estimator].value(d.detach()).sum() / tokens.clamp(min=1)
    return total / divisor(total, normalizer), {"tokens": tokens, "kl": mean}
