"""Logits of a linear head in plain PyTorch, a chunk of rows at a time: any device, any dtype.

`statistics` is the forward pass, `gradients` the backward pass of every op that goes through the
softmax of hidden_states @ lm_head_weight.T.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_ROWS = 256  # fp32 logits of a chunk: 148 MiB at V = 151936; chosen, untested
FAR = -1e4  # exp of it is 0 in fp64 too; a logit of -inf would give 0 * inf


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


def convert_once(head: Head, dtype: torch.dtype) -> Head:
    """The head as `matmul` would convert it for every chunk."""
    return head if head.weight.is_cuda else replace(head, weight=head.weight.to(dtype))


def statistics(hidden_states: Tensor, head: Head, token_ids: Tensor) -> Tensor:
    """[4, N]: max m, rest of sum exp(z - m), sum exp(z - m) (z - m), target logit.

    rest is without the term of one maximum, which is 1: lse = m + log1p(rest) keeps the small
    log-probability of a token that has nearly all the mass. The target is 0 outside the rows.
    """
    dtype = compute_dtype(hidden_states)
    head = convert_once(head, dtype)
    out = hidden_states.new_empty((4, len(token_ids)), dtype=dtype)
    every = torch.arange(len(token_ids), device=token_ids.device)
    for rows in every.split(CHUNK_ROWS):
        logits, _ = chunk_logits(hidden_states[rows], head, rows, dtype)
        out[:, rows] = chunk_statistics(logits, token_ids[rows])
    return out


def chunk_statistics(logits: Tensor, token_ids: Tensor) -> Tensor:
    """`statistics` of a chunk of rows, [4, R]."""
    if not logits.shape[1]:  # a shard of nothing but rows outside the vocabulary
        empty = logits.new_zeros((4, len(logits)))
        empty[0] = -torch.inf
        return empty
    here, owned = local_columns(token_ids, logits.shape[1])
    target = torch.where(owned, logits.gather(1, here[:, None]).squeeze(1), 0.0)
    maximum, at = logits.max(dim=1, keepdim=True)
    shifted = (logits - maximum).clamp_(min=FAR)
    exps = shifted.exp()
    weighted = shifted.mul_(exps).sum(dim=1)
    rest = exps.scatter_(1, at, 0.0).sum(dim=1)
    return torch.stack((maximum.squeeze(1), rest, weighted, target))


def normalizers(statistics: Tensor) -> Tensor:
    """[3, R]: m, log sum exp(z - m), E_p[z - m], from the statistics of the whole vocabulary."""
    maximum, rest, weighted, _ = statistics
    return torch.stack((maximum, rest.log1p(), weighted / (1 + rest)))


def gradients(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    coefficients: Tensor,
    log_softmax: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_states, weight and bias from per-row coefficients, by recomputation.

    log_softmax: [3, N], `normalizers` of the whole vocabulary; None where the weight is the whole
        vocabulary: then they come from the recomputed logits themselves, and p sums to 1 whatever
        rounding the forward pass had. Otherwise as in `Gradients`.
    """
    dtype = compute_dtype(hidden_states)
    head = convert_once(head, dtype)
    out = Gradients(hidden_states, head, needs)
    active = coefficients.ne(0).any(dim=0).nonzero().squeeze(1)
    for rows in active.split(CHUNK_ROWS):
        logits, slope = chunk_logits(hidden_states[rows], head, rows, dtype)
        if log_softmax is None:
            softmax = normalizers(chunk_statistics(logits, token_ids[rows]))
        else:
            softmax = log_softmax[:, rows]
        out.add(rows, logits, slope, token_ids[rows], coefficients[:, rows], softmax)
    return out.results()


class Gradients:
    """Gradients of hidden_states, weight and bias, summed over chunks in fp32 (fp64 for fp64):

    dz_j = c0 p_j - c1 [j = y] + c2 p_j (z_j - E_p z)

    with coefficients c0, c1, c2 of each row. What is not needed is not computed.
    """

    def __init__(self, hidden_states: Tensor, head: Head, needs: Sequence[bool]) -> None:
        self.hidden_states, self.head = hidden_states, head
        self.dtype = compute_dtype(hidden_states)
        shapes = (hidden_states.shape, head.weight.shape, head.weight.shape[:1])
        options = dict(dtype=self.dtype, device=hidden_states.device)
        self.dx, self.dw, self.db = (
            torch.zeros(shape, **options) if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )

    def add(
        self,
        rows: Tensor,
        logits: Tensor,
        slope: Tensor,
        token_ids: Tensor,
        coefficients: Tensor,
        log_softmax: Tensor,
    ) -> None:
        """Rows [R] with their logits and slope from `chunk_logits`; coefficients [3, R]."""
        if not logits.shape[1]:  # a shard of nothing but rows outside the vocabulary
            return
        dz = logit_gradients(logits, token_ids, coefficients, log_softmax)
        dz *= slope
        if self.dx is not None:
            self.dx[rows] = matmul(dz, self.head.weight, self.dtype)
        if self.dw is not None:
            self.dw.addmm_(dz.T, self.hidden_states[rows].to(self.dtype))
        if self.db is not None:
            self.db += dz.sum(dim=0)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """An empty tensor for each that is not needed."""
        empty = self.hidden_states.new_empty(0, dtype=self.dtype)
        dx, dw, db = (empty.clone() if g is None else g for g in (self.dx, self.dw, self.db))
        return dx, dw, db


def logit_gradients(
    logits: Tensor, token_ids: Tensor, coefficients: Tensor, log_softmax: Tensor
) -> Tensor:
    """dz of `Gradients` for a chunk, [R, V]."""
    c0, c1, c2 = coefficients[:, :, None]  # [R, 1] each
    maximum, log_sum, mean = log_softmax[:, :, None]
    here, owned = local_columns(token_ids, logits.shape[1])
    here = here[:, None]
    shifted = (logits - maximum).clamp_(min=FAR)
    logps = shifted - log_sum
    target_logp, target_shifted = logps.gather(1, here), shifted.gather(1, here)
    dz = logps.exp_().mul_(shifted.sub_(mean).mul_(c2).add_(c0))
    # c0 p_y - c1 loses all digits where p_y is near 1 and c0 = c1: expm1 keeps them.
    entropy_part = c2 * target_logp.exp() * (target_shifted - mean)
    at_target = c0 * target_logp.expm1() + (c0 - c1) + entropy_part
    return dz.scatter_(1, here, torch.where(owned[:, None], at_target, dz.gather(1, here)))


def local_columns(token_ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each token, 0 where another process owns it or it is ignored, and whether ours."""
    owned = (token_ids >= 0) & (token_ids < columns)
    return torch.where(owned, token_ids, 0), owned
