"""Importance weights that correct for an engine whose probabilities differ from the trainer's."""

import torch
from torch import Tensor

from codistill_kernels._checks import (
    require,
    require_logps,
    require_mask,
    require_sequences,
    require_shape,
    require_tensor,
)
from codistill_kernels._sequences import sequence_sums, to_tokens
from codistill_kernels._tokens import TokenShape


def importance_weights(
    trainer_logps: Tensor,
    engine_logps: Tensor,
    mask: Tensor | None = None,
    *,
    truncate: float | None = None,
    drop: tuple[float, float] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weights that correct for an engine whose probabilities differ from the trainer's.

    ratio[n] = exp(trainer_logps[n] - engine_logps[n])
    out[n] = 0 if ratio[n] is outside `drop`, else min(ratio[n], truncate)

    Args:
        trainer_logps, engine_logps: [N] or [B, T] log-probabilities (nats) of the same tokens under
            the same weights, as the trainer and as the engine computed them.
        mask: [N] or [B, T] bool; where False the weight is 0, whatever the values are.
        truncate: > 0, largest weight: truncated importance sampling (Yao et al. 2025). None: no
            bound, and a ratio that overflows is inf.
        drop: (low, high), 0 <= low <= high: a ratio outside has weight 0, on a bound it is kept
            (masked importance sampling; token by token IcePop, Ling Team 2025). None: all stay.
        cu_seqlens: [S + 1]; the ratio is that of the whole sequence, exp of the sum over its
            unmasked tokens, and all its tokens have the same weight. For flat tokens [N] only.

    Returns:
        [N] or [B, T] >= 0, detached, fp32 (fp64 for fp64 trainer_logps). NaN logps give NaN, never
        0.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value. The message names
            it.

    Definition: codistill_kernels.reference.importance_weights.
    """
    shape = TokenShape.of("trainer_logps", trainer_logps)
    trainer_logps, engine_logps, mask = shape.flat(
        trainer_logps=trainer_logps, engine_logps=engine_logps, mask=mask
    )
    expected = "None with tokens [B, T]: flatten them for ratios of sequences"
    require(shape.is_flat or cu_seqlens is None, "cu_seqlens", expected, "one")
    require_logps("trainer_logps", trainer_logps)
    like = ("trainer_logps", trainer_logps)
    require_tensor("engine_logps", engine_logps, *like)
    require_shape("engine_logps", engine_logps, tuple(trainer_logps.shape), "[N]")
    require_mask(mask, len(trainer_logps), *like)
    require(truncate is None or truncate > 0, "truncate", "> 0", truncate)
    low, high = (0.0, float("inf")) if drop is None else drop
    require(0 <= low <= high, "drop", "(low, high) with 0 <= low <= high", drop)
    dtype = torch.float64 if trainer_logps.dtype == torch.float64 else torch.float32
    log_ratio = trainer_logps.detach().to(dtype) - engine_logps.detach().to(dtype)
    keep = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    log_ratio = torch.where(keep, log_ratio, 0.0)
    if cu_seqlens is not None:
        require_sequences(cu_seqlens, len(trainer_logps), *like)
        log_ratio = to_tokens(sequence_sums(log_ratio, cu_seqlens), cu_seqlens, len(log_ratio))
    ratio = log_ratio.exp()
    ratio = torch.where(keep & ~((ratio < low) | (ratio > high)), ratio, 0.0)
    return shape.rows(ratio if truncate is None else ratio.clamp(max=truncate))
