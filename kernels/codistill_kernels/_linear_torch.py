"""Logits of a linear head in plain PyTorch, a chunk of rows at a time: any device, any dtype.

`statistics` is the forward pass, `gradients` the backward pass of every op that goes through the
softmax of hidden_states @ lm_head_weight.T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS = 256  # fp32 logits of a chunk: 148 MiB at V = 151936; chosen, untested


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: z = softcap(x . w + bias) / temperature."""

    weight: Tensor
    """[V, H], cut to the vocabulary."""
    bias: Tensor | None
    """[V] or None."""
    temperature: Tensor
    """[N], in the compute dtype."""
    softcap: float
    """0: none."""


def compute_dtype(hidden_states: Tensor) -> torch.dtype:
    return torch.float64 if hidden_states.dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, operands as they are where the device sums them in fp32, else converted first."""
    if a.is_cuda and a.dtype == b.dtype and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def chunk_logits(hidden: Tensor, head: Head, rows: Tensor, dtype: torch.dtype) -> tuple:
    """Logits [R, V] of some rows, and d logits / d (x . w): a tensor [R, V], or [R, 1]."""
    temperature = head.temperature[rows][:, None]  # [R, 1]
    logits = matmul(hidden, head.weight.T, dtype)
    if head.bias is not None:
        logits += head.bias.to(dtype)
    if head.softcap == 0:
        return logits.div_(temperature), temperature.reciprocal()
    capped = logits.div_(head.softcap).tanh_()
    slope = (1 - capped.square()) / temperature
    return capped.mul_(head.softcap).div_(temperature), slope


def statistics(hidden_states: Tensor, head: Head, token_ids: Tensor) -> Tensor:
    """[4, N]: max m, rest of sum exp(z - m), sum exp(z - m) (z - m), target logit.

    rest is without the term of one maximum, which is 1: lse = m + log1p(rest) keeps the small
    log-probability of a token that has nearly all the mass. The target is 0 outside the rows.
    """
    dtype = compute_dtype(hidden_states)
    out = hidden_states.new_empty((4, len(token_ids)), dtype=dtype)
    every = torch.arange(len(token_ids), device=token_ids.device)
    for rows in every.split(CHUNK_ROWS):
        logits, _ = chunk_logits(hidden_states[rows], head, rows, dtype)
        here, owned = local_columns(token_ids[rows], logits.shape[1])
        target = torch.where(owned, logits.gather(1, here[:, None]).squeeze(1), 0.0)
        out[:, rows] = torch.stack((*softmax_state(logits), target))
    return out


def softmax_state(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, rest and sum exp(z - m) (z - m) of `statistics`, [R] each."""
    maximum, at = logits.max(dim=1, keepdim=True)
    shifted = logits - maximum
    exps = shifted.exp()
    weighted = (exps * shifted).sum(dim=1)
    return maximum.squeeze(1), exps.scatter_(1, at, 0.0).sum(dim=1), weighted


def normalizers(logits: Tensor) -> Tensor:
    """log_softmax of `gradients`, [3, R], from all logits of the rows."""
    maximum, rest, weighted = softmax_state(logits)
    return torch.stack((maximum, rest.log1p(), weighted / (1 + rest)))


def gradients(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    coefficients: Tensor,
    log_softmax: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden_states, weight and bias, fp32 (fp64 for fp64), from per-row coefficients:

    dz_j = c0 p_j - c1 [j = y] + c2 p_j (z_j - E_p z).

    coefficients: [3, N] c0, c1, c2. Rows where all three are zero are left out of the work.
    log_softmax: [3, N] m, log sum exp(z - m), E_p[z - m] over the whole vocabulary; None where the
        weight is the whole vocabulary: then they come from the recomputed logits themselves, and
        p sums to 1 whatever rounding the forward pass had.
    """
    dtype = compute_dtype(hidden_states)
    options = dict(dtype=dtype, device=hidden_states.device)
    dx = torch.zeros(hidden_states.shape, **options) if needs[0] else None
    dw = torch.zeros(head.weight.shape, **options) if needs[1] else None
    db = torch.zeros(len(head.weight), **options) if needs[2] else None
    active = coefficients.ne(0).any(dim=0).nonzero().squeeze(1)
    if not len(head.weight):  # a shard of nothing but rows outside the vocabulary
        return dx, dw, db
    for rows in active.split(CHUNK_ROWS):
        hidden = hidden_states[rows]
        logits, slope = chunk_logits(hidden, head, rows, dtype)
        softmax = normalizers(logits) if log_softmax is None else log_softmax[:, rows]
        dz = logit_gradients(logits, token_ids[rows], coefficients[:, rows], softmax)
        dz *= slope
        if dx is not None:
            dx[rows] = matmul(dz, head.weight, dtype)
        if dw is not None:
            dw += matmul(dz.T, hidden, dtype)
        if db is not None:
            db += dz.sum(dim=0)
    return dx, dw, db


def logit_gradients(
    logits: Tensor, token_ids: Tensor, coefficients: Tensor, log_softmax: Tensor
) -> Tensor:
    """dz of `gradients` for a chunk, [R, V]."""
    c0, c1, c2 = coefficients[:, :, None]  # [R, 1] each
    maximum, log_sum, mean = log_softmax[:, :, None]
    here, owned = local_columns(token_ids, logits.shape[1])
    here = here[:, None]
    shifted = logits - maximum
    logps = shifted - log_sum
    target_logp, target_shifted = logps.gather(1, here), shifted.gather(1, here)
    dz = logps.exp_() * (c0 + c2 * (shifted - mean))
    # c0 p_y - c1 loses all digits where p_y is near 1 and c0 = c1: expm1 keeps them.
    entropy_part = c2 * target_logp.exp() * (target_shifted - mean)
    at_target = c0 * target_logp.expm1() + (c0 - c1) + entropy_part
    return dz.scatter(1, here, torch.where(owned[:, None], at_target, dz.gather(1, here)))


def local_columns(token_ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each token, 0 where another process owns it or it is ignored, and whether ours."""
    owned = (token_ids >= 0) & (token_ids < columns)
    return torch.where(owned, token_ids, 0), owned
