"""Passes over the logits of a linear head, a chunk of them in memory at a time.

A backend's chunk class (`TorchChunks`, `CpuChunks`, `TritonChunks`) makes the logits of a chunk,
holds what it needs of them and turns that into gradients; here is the order of the chunks.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from codistill_kernels import _backends, _slabs
from codistill_kernels._head import Head, Plan, compute_dtype
from codistill_kernels._linear_cpu import CpuChunks
from codistill_kernels._linear_torch import TorchChunks
from codistill_kernels._softmax_torch import normalizers

if TYPE_CHECKING:
    from codistill_kernels._linear_inputs import LinearInputs
    from codistill_kernels._linear_triton import TritonChunks

    Chunks: TypeAlias = TorchChunks | CpuChunks | TritonChunks

WORKSPACE_MIB = 128  # on a CPU: exponentials of 1024 rows of 65536 logits in bf16


def workspace_bytes(
    workspace_mib: int | None, device: torch.device, vocab: int, *, is_shard: bool = False
) -> int:
    """The caller's choice; else the device's default: on a GPU at most half of what is free, on
    a CPU never so little that logits of a chunk would be computed twice.

    is_shard: all processes must choose alike, however much each has free.
    """
    if workspace_mib is not None:
        return workspace_mib * 2**20
    if device.type != "cuda":
        return max(WORKSPACE_MIB * 2**20, 4 * CpuChunks.FEW_ROWS * vocab)
    if is_shard:
        return _slabs.WORKSPACE_MIB * 2**20
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_slabs.WORKSPACE_MIB * 2**20, free // 2)


def kind_of_chunks(hidden_states: Tensor, backend: str) -> "type[Chunks]":
    # Chosen here, where torch.compile does not look: the library is loaded at the first call.
    chosen = _backends.choose(backend, hidden_states.device, hidden_states.dtype)
    if chosen == "triton":  # imported here: `import codistill_kernels` must not need Triton
        from codistill_kernels._linear_triton import TritonChunks

        return TritonChunks
    return CpuChunks if chosen == "cpu" else TorchChunks


def make_chunks(hidden_states: Tensor, head: Head, token_ids: Tensor, backend: str) -> "Chunks":
    return kind_for(hidden_states, head, backend)(hidden_states, head, token_ids)


def kind_for(hidden_states: Tensor, head: Head, backend: str) -> "type[Chunks]":
    kind = kind_of_chunks(hidden_states, backend)
    # Without a vocabulary row (the last shard may have none) there is nothing to fuse.
    return kind if len(head.weight) else TorchChunks


class Kept(Protocol):
    """What is kept of the logits of a call's active rows until its backward pass."""

    has_entropy_gradient: bool

    @property
    def statistics(self) -> Tensor:
        """[4, K] of the active rows."""

    def gradients(
        self,
        coefficients: Tensor,
        log_softmax: Tensor,
        needs: Sequence[bool],
        hidden_states: Tensor,
        dx_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """From [3, N] of all rows: the first in dx_dtype or fp32, the others in those of the head;
        rows of the head beyond the vocabulary are zeros. Once only."""


def keep_logits(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    rows: Tensor,
    head_rows: int,
    *,
    has_entropy: bool,
    has_entropy_gradient: bool,
    needs: Sequence[bool],
    backend: str,
    workspace: int,
) -> Kept | None:
    """Of these rows, all active, numbered `rows` in the call; None where they are not kept.

    head_rows: of the head's gradient, V or more. has_entropy: it is wanted, has_entropy_gradient:
    and it is sure to have a gradient.
    """
    kind = kind_for(hidden_states, head, backend)
    is_exact = kind.takes_logits(head.softcap, has_entropy_gradient, needs)
    plan = plan_for(kind, hidden_states, head.weight, len(head.weight), workspace, is_exact)
    if plan.way != "kept" or not len(rows):
        return None
    assert not issubclass(kind, TorchChunks)
    call = (hidden_states, head, token_ids, rows, head_rows)
    if is_exact:
        return kind.keep_logits(*call)
    return kind.keep_exponentials(*call, has_entropy, needs[1], workspace)


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
    head_rows: int,
    dw_dtype: torch.dtype,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from per-row coefficients [3, N]; rows whose coefficients are 0 are left out.

    log_softmax: [3, N], `normalizers` of the whole vocabulary. is_whole: so is the weight.
    head_rows: of the gradients of weight and bias, zeros from V on. workspace: bytes.
    """
    active = (coefficients.ne(0).any(dim=0) & any(needs)).nonzero().squeeze(1)
    kind = kind_for(hidden_states, head, backend)
    numbers = (coefficients, log_softmax)
    if not issubclass(kind, TorchChunks):
        shape = (head_rows, hidden_states.shape[1])
        return by_columns(
            kind,
            hidden_states,
            head,
            token_ids,
            active,
            *numbers,
            needs,
            shape,
            dw_dtype,
            workspace,
        )
    chunks = kind(hidden_states, head, token_ids)
    sums = GradientSums(chunks, needs)
    plan = plan_for(kind, hidden_states, head.weight, len(head.weight), workspace, is_exact=True)
    for rows in split_rows(active, plan.rows):
        if not len(rows):
            break
        statistics = chunks.hold(rows)
        # Of these very logits where they are all: no kernel promises a matrix product's bits, and a
        # peaked row's p - 1 is all rounding if its maximum is another number than in the forward.
        softmax = normalizers(statistics) if is_whole else log_softmax[:, rows]
        every = torch.arange(len(rows), device=rows.device)
        sums.add(rows, every, coefficients[:, rows], softmax)
    dx, dw, db = sums.results()
    extra = head_rows - len(head.weight)
    if needs[1] and extra:
        dw = torch.nn.functional.pad(dw, (0, 0, 0, extra))
    if needs[2]:
        db = torch.nn.functional.pad(db, (0, extra))
    return dx, dw.to(dw_dtype), db


def by_columns(
    kind: "type[CpuChunks | TritonChunks]",
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    active: Tensor,
    coefficients: Tensor,
    log_softmax: Tensor,
    needs: Sequence[bool],
    shape: tuple[int, int],
    dw_dtype: torch.dtype,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`recomputed_gradients` with vocabulary ranges outermost: needs no fp32 copy of all of dW.

    The logits come out as they were in the forward pass, bit for bit.
    """
    shapes = (hidden_states.shape, shape, shape[:1])
    dtypes = (torch.float32, dw_dtype, torch.float32)
    dx, dw, db = (
        torch.empty(shape if need else 0, dtype=dtype, device=hidden_states.device)
        for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
    )
    dx.zero_()
    db.zero_()
    dw[len(head.weight) if len(active) else 0 :] = 0  # the others are written
    if not len(active):
        return dx, dw, db
    is_all = len(active) == len(hidden_states)
    if not is_all:
        hidden_states, head, token_ids = (
            hidden_states[active],
            head.of_rows(active),
            token_ids[active],
        )
        coefficients, log_softmax = coefficients[:, active], log_softmax[:, active]
    part = dx if is_all or not needs[0] else dx.new_zeros(hidden_states.shape)
    part_dx, part_dw, part_db = (
        t if need else None for t, need in zip((part, dw, db), needs, strict=True)
    )
    numbers = (coefficients, log_softmax)
    kind.write_gradients(
        hidden_states, head, token_ids, *numbers, part_dx, part_dw, part_db, workspace
    )
    if part is not dx:
        dx[active] = part
    return dx, dw, db


def split_rows(rows: Tensor, most: int) -> Iterator[Tensor]:
    """Even parts of at most so many rows."""
    parts = max(1, -(-len(rows) // most))
    return iter(rows.split(max(1, -(-len(rows) // parts))))


def plan_for(
    kind: "type[Chunks]",
    hidden_states: Tensor,
    weight: Tensor,
    vocab: int,
    workspace: int,
    is_exact: bool,
    rows: int | None = None,
) -> Plan:
    """The way of `vocab` logits a row (of so many rows), within a workspace of so many bytes;
    is_exact: `takes_logits`, so that raw ones are kept."""
    dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
    if is_exact:
        dtype = torch.promote_types(dtype, torch.float32)
    return kind.plan(len(hidden_states) if rows is None else rows, vocab, dtype, workspace)


def plan_of_call(
    inputs: "LinearInputs",
    rows: int,
    workspace_mib: int | None,
    backend: str,
    has_entropy_gradient: bool,
    needs: Sequence[bool],
) -> "tuple[type[Chunks], Plan]":
    """The way of so many of the rows that count, over the largest shard: all processes alike."""
    hidden_states, weight, *_ = inputs.tensors
    vocab, is_shard = inputs.shard.most_rows, inputs.shard.group is not None
    workspace = workspace_bytes(workspace_mib, hidden_states.device, vocab, is_shard=is_shard)
    kind = kind_of_chunks(hidden_states, backend)
    is_exact = kind.takes_logits(inputs.softcap, has_entropy_gradient, needs)
    return kind, plan_for(kind, hidden_states, weight, vocab, workspace, is_exact, rows)
