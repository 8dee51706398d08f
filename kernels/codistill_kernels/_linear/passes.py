"""Passes over chunks of the logits: in which order, and the sums of their gradients."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._linear.chunks import Chunks, split_rows
from codistill_kernels._linear.head import Head, compute_dtype
from codistill_kernels._linear.logps import as_coefficients, log_probabilities
from codistill_kernels._linear.planning import make_chunks

Slopes = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(rows, logps, entropy) [R] -> d loss / d logps and d loss / d entropy, None where it is 0."""


class GradientSums:
    """Gradients of hidden_states, weight and bias, summed over chunks in fp32 (fp64 for fp64)."""

    def __init__(self, chunks: Chunks, needs: Sequence[bool]) -> None:
        self.chunks = chunks
        hidden, head = chunks.hidden_states, chunks.head
        dtype = compute_dtype(hidden)
        self.dx = hidden.new_zeros(hidden.shape, dtype=dtype) if needs[0] else None
        self.needs_dw = needs[1]
        self.dw: Tensor | None = None
        self.db = hidden.new_zeros(len(head.weight), dtype=dtype) if needs[2] else None

    def add(self, rows: Tensor, kept: Tensor, coefficients: Tensor, lse_parts: Tensor) -> None:
        """From `rows`, those the chunks hold, only the `kept` [K] with their [3, K] numbers."""
        if self.needs_dw and self.dw is None:
            self.dw = self.chunks.weight_gradients()
        dx = self.chunks.gradients(
            kept, coefficients, lse_parts, self.dx is not None, self.dw, self.db
        )
        if self.dx is not None:
            self.dx[rows[kept]] = dx

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """An empty tensor for each that is not needed."""
        vocab, width = self.chunks.head.weight.shape
        none = self.chunks.head.temperature.new_empty
        dw = none(vocab, width).zero_() if self.needs_dw and self.dw is None else self.dw
        dw = None if dw is None else dw[:vocab, :width].contiguous()
        dx, dw, db = (none(0) if g is None else g for g in (self.dx, dw, self.db))
        return dx, dw, db


def gradients_by_chunks(
    chunks: Chunks,
    rows: Tensor,
    most: int,
    slopes: Slopes,
    needs: Sequence[bool],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """logps and entropy [N], 0 but for `rows`, and gradients, in one pass.

    The gradients come from the very logits that gave the log-probabilities, `most` rows at a time.
    """
    sums = GradientSums(chunks, needs)
    logps = torch.zeros_like(chunks.head.temperature)
    entropy = torch.zeros_like(logps)
    for part in split_rows(rows, most):
        logps[part], lse_parts = log_probabilities(chunks.hold(part), group)
        entropy[part] = lse_parts[1] - lse_parts[2]
        coefficients = as_coefficients(*slopes(part, logps[part], entropy[part]))
        kept = coefficients.ne(0).any(dim=0).nonzero().squeeze(1)  # exact: others would add zeros
        if len(kept):
            sums.add(part, kept, coefficients[:, kept], lse_parts[:, kept])
    return logps, entropy, sums.results()


def recomputed_gradients(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    coefficients: Tensor,
    lse_parts: Tensor,
    is_whole: bool,
    needs: Sequence[bool],
    backend: str,
    head_rows: int,
    dw_dtype: torch.dtype,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_states, weight and bias from logits that are computed again.

    Takes coefficients and lse_parts [3, N]; rows whose coefficients are 0 are left out. is_whole:
    the weight is the whole vocabulary. head_rows: rows of the gradients of weight and bias, zeros
    from V on. workspace: bytes. An empty tensor for each gradient that is not needed.
    """
    active = (coefficients.ne(0).any(dim=0) & any(needs)).nonzero().squeeze(1)
    dtype, width = compute_dtype(hidden_states), hidden_states.shape[1]
    shapes = (hidden_states.shape, (head_rows, width), (head_rows,))
    dx, dw, db = (
        hidden_states.new_empty(shape if need else 0, dtype=dtype)
        for need, shape, dtype in zip(needs, shapes, (dtype, dw_dtype, dtype), strict=True)
    )
    dx.zero_()
    db.zero_()
    dw[len(head.weight) if len(active) else 0 :] = 0  # the others are written
    if not len(active):
        return dx, dw, db
    is_all = len(active) == len(hidden_states)
    if not is_all:
        hidden_states, token_ids = hidden_states[active], token_ids[active]
        head = head.of_rows(active)
        coefficients, lse_parts = coefficients[:, active], lse_parts[:, active]
    part = dx if is_all or not needs[0] else dx.new_zeros(hidden_states.shape)
    out_dx, out_dw, out_db = (
        t if need else None for t, need in zip((part, dw, db), needs, strict=True)
    )
    chunks = make_chunks(hidden_states, head, token_ids, backend)
    chunks.write_gradients(coefficients, lse_parts, is_whole, out_dx, out_dw, out_db, workspace)
    if part is not dx:
        dx[active] = part
    return dx, dw, db
