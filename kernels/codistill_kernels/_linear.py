"""Passes over the logits of a linear head, a chunk of them in memory at a time.

A backend's chunk class (`TorchChunks`, `CpuChunks`, `TritonChunks`) makes the raw logits of a chunk
and turns them into gradients; here is the order in which chunks are gone through.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codistill_kernels import _backends
from codistill_kernels._head import Head, compute_dtype
from codistill_kernels._linear_cpu import CpuChunks
from codistill_kernels._linear_torch import TorchChunks
from codistill_kernels._softmax_torch import normalizers

if TYPE_CHECKING:
    from codistill_kernels._linear_triton import TritonChunks

    Chunks = TorchChunks | CpuChunks | TritonChunks

WORKSPACE_MIB = 128  # 512 rows of 65536 fp32 logits on a CPU; 256 MiB was a tenth faster there


def kind_of_chunks(hidden_states: Tensor, backend: str) -> "type[Chunks]":
    # Chosen here, where torch.compile does not look: the extension is loaded at the first call.
    chosen = _backends.choose(backend, hidden_states.device, hidden_states.dtype)
    if chosen == "triton":  # imported here: `import codistill_kernels` must not need Triton
        from codistill_kernels._linear_triton import TritonChunks

        return TritonChunks
    return {"cpu": CpuChunks, "torch": TorchChunks}[chosen]


def make_chunks(hidden_states: Tensor, head: Head, token_ids: Tensor, backend: str) -> "Chunks":
    return kind_for(hidden_states, head, backend)(hidden_states, head, token_ids)


def kind_for(hidden_states: Tensor, head: Head, backend: str) -> "type[Chunks]":
    kind = kind_of_chunks(hidden_states, backend)
    # Without a vocabulary row (the last shard may have none) there is nothing to fuse.
    return kind if len(head.weight) else TorchChunks


class GradientSums:
    """Gradients of hidden_states, weight and bias, summed over chunks in fp32 (fp64 for fp64)."""

    def __init__(self, chunks: "Chunks", needs: Sequence[bool]) -> None:
        self.chunks = chunks
        hidden, head = chunks.hidden_states, chunks.head
        options = dict(dtype=compute_dtype(hidden), device=hidden.device)
        self.dx = torch.zeros(hidden.shape, **options) if needs[0] else None
        self.needs_dw, self.dw = needs[1], None
        self.db = torch.zeros(len(head.weight), **options) if needs[2] else None

    def add(self, rows: Tensor, kept: Tensor, coefficients: Tensor, log_softmax: Tensor) -> None:
        """From `rows`, those the chunks hold, only the `kept` [K] with their [3, K] numbers."""
        if self.needs_dw and self.dw is None:
            self.dw = self.chunks.weight_gradients()
        dx = self.chunks.gradients(
            kept, coefficients, log_softmax, self.dx is not None, self.dw, self.db
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


def recomputed_gradients(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    coefficients: Tensor,
    log_softmax: Tensor,
    is_whole: bool,
    needs: Sequence[bool],
    backend: str,
    dw_dtype: torch.dtype,
    workspace_mib: int = WORKSPACE_MIB,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from per-row coefficients [3, N]; rows whose coefficients are 0 are left out.

    log_softmax: [3, N], `normalizers` of the whole vocabulary. is_whole: so is the weight.
    """
    active = (coefficients.ne(0).any(dim=0) & any(needs)).nonzero().squeeze(1)
    kind = kind_for(hidden_states, head, backend)
    if kind is CpuChunks:
        numbers = (coefficients, log_softmax)
        return by_columns(
            hidden_states, head, token_ids, active, *numbers, needs, dw_dtype, workspace_mib
        )
    chunks = kind(hidden_states, head, token_ids)
    sums = GradientSums(chunks, needs)
    size = bytes_per_logit(kind, hidden_states)
    most = rows_within(workspace_mib, len(head.weight), size)
    for rows in split_rows(active, most):
        statistics = chunks.hold(rows)
        # Of these very logits where they are all: no kernel promises a matrix product's bits, and a
        # peaked row's p - 1 is all rounding if its maximum is another number than in the forward.
        softmax = normalizers(statistics) if is_whole else log_softmax[:, rows]
        every = torch.arange(len(rows), device=rows.device)
        sums.add(rows, every, coefficients[:, rows], softmax)
    dx, dw, db = sums.results()
    return dx, dw.to(dw_dtype), db


def by_columns(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    active: Tensor,
    coefficients: Tensor,
    log_softmax: Tensor,
    needs: Sequence[bool],
    dw_dtype: torch.dtype,
    workspace_mib: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`recomputed_gradients` with vocabulary ranges outermost: needs no fp32 copy of all of dW.

    The logits come out as they were in the forward pass, bit for bit.
    """
    shapes = (hidden_states.shape, head.weight.shape, head.weight.shape[:1])
    dtypes = (torch.float32, dw_dtype, torch.float32)
    dx, dw, db = (
        torch.zeros(shape if need else 0, dtype=dtype)
        for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
    )
    if not len(active):
        return dx, dw, db
    hidden, ids, head = hidden_states[active], token_ids[active], head.of_rows(active)
    numbers = coefficients[:, active], log_softmax[:, active]
    every = torch.arange(len(active))
    width = columns_within(workspace_mib, len(active))
    workspace = None
    for first in range(0, len(head.weight), width):
        columns = slice(first, first + width)
        chunks = CpuChunks(hidden, head.columns(columns), ids - first, workspace)
        chunks.hold(every)
        workspace = chunks.workspace
        sums = GradientSums(chunks, needs)
        sums.add(every, every, *numbers)
        part_dx, part_dw, part_db = sums.results()
        if needs[0]:
            dx[active] += part_dx
        if needs[1]:
            dw[columns] = part_dw
        if needs[2]:
            db[columns] = part_db
    return dx, dw, db


def split_rows(rows: Tensor, most: int) -> Iterator[Tensor]:
    """Even parts of at most so many rows."""
    parts = max(1, -(-len(rows) // most))
    return iter(rows.split(max(1, -(-len(rows) // parts))))


def bytes_per_logit(kind: "type[Chunks]", hidden_states: Tensor) -> int:
    """Of what is alive at once."""
    return kind.BUFFERS * compute_dtype(hidden_states).itemsize


def rows_within(workspace_mib: int, vocab: int, bytes_per_logit: int) -> int:
    """Rows whose logits fit; at least a tile of them."""
    return max(64, workspace_mib * 2**20 // (bytes_per_logit * max(1, vocab)))


def columns_within(workspace_mib: int, rows: int) -> int:
    """Vocabulary rows of which the logits of all `rows` fit; whole panels of 256."""
    return max(256, workspace_mib * 2**20 // (4 * rows) // 256 * 256)
