"""Logits of a linear head in C++ (csrc/linear.cpp): tiles that stay in cache."""

import math

import torch
from torch import Tensor

from codistill_kernels._head import Head, Plan

ROWS = 4096  # of a chunk whose logits need not be held: a copy of this many hidden states


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


class CpuChunks:
    """Raw logits x . w + bias of one chunk of rows at a time."""

    HAS_BIAS_GRADIENT = True
    BUFFERS = 1  # [R, V] tensors alive at once: the gradient takes the place of the raw logits
    FEW_ROWS = 256  # below, a chunk is not worth packing the weight for

    def __init__(
        self,
        hidden_states: Tensor,
        head: Head,
        token_ids: Tensor,
        workspace: Tensor | None = None,
    ) -> None:
        """workspace: of other chunks that are done with theirs, to be used again."""
        self.hidden_states, self.token_ids, self.head = hidden_states, token_ids, head
        self.weight = head.weight.contiguous()
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        self.tile_rows, self.panel, self.slice = torch.ops.codistill_cpu.tile_shape()
        self.dtype = operand_dtype(hidden_states, head.weight)
        self.workspace = empty(0) if workspace is None else workspace
        self.is_filled = False

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        """workspace: bytes. A chunk has at least a tile of rows."""
        most = max(64, workspace // (4 * cls.BUFFERS * max(1, vocab)))
        return Plan("columns" if most < min(cls.FEW_ROWS, rows) else "chunks", most)

    @classmethod
    def write_gradients(
        cls,
        hidden_states: Tensor,
        head: Head,
        token_ids: Tensor,
        coefficients: Tensor,
        log_softmax: Tensor,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
        workspace: int,
    ) -> None:
        """Gradients [N, H], [>= V, H], [>= V], of whose rows the first V are written, from logits
        that are computed again, as many vocabulary rows at a time as fit into so many bytes."""
        every = torch.arange(len(hidden_states))
        width = max(256, workspace // (4 * len(hidden_states)) // 256 * 256)  # whole panels
        memory = None
        for first in range(0, len(head.weight), width):
            columns = slice(first, min(first + width, len(head.weight)))
            chunks = cls(hidden_states, head.columns(columns), token_ids - first, memory)
            chunks.hold(every)
            memory = chunks.workspace
            part_dw = None if dw is None else chunks.weight_gradients()
            part_db = None if db is None else db[columns]
            part_dx = chunks.gradients(
                every, coefficients, log_softmax, dx is not None, part_dw, part_db
            )
            if dx is not None:
                dx += part_dx
            if dw is not None and part_dw is not None:
                rows = dw[columns]
                rows.copy_(part_dw[: len(rows), : dw.shape[1]])

    def statistics(self, has_entropy: bool = False) -> Tensor:
        """[4, N] of all rows, none of them held; with an entropy or not, it costs the same."""
        every = torch.arange(len(self.token_ids))
        return torch.cat([self._forward(rows, None) for rows in every.split(ROWS)], dim=1)

    def hold(self, rows: Tensor) -> Tensor:
        """Keep the raw logits of these rows; their statistics [4, R]."""
        self.rows = rows
        panels = -(-len(self.weight) // self.panel)
        shape = (panels, round_up(len(rows), self.tile_rows), self.panel)
        size = math.prod(shape)
        if self.workspace.numel() < size:
            self.workspace = empty(size)
        self.raw = self.workspace[:size].view(shape)
        return self._forward(rows, self.raw)

    def _forward(self, rows: Tensor, raw: Tensor | None) -> Tensor:
        return torch.ops.codistill_cpu.linear_forward(
            operand(self.hidden_states[rows], self.dtype),
            self.weight,
            self.bias,
            self.token_ids[rows],
            self.head.temperature[rows],
            self.head.softcap,
            raw,
        )

    def weight_gradients(self) -> Tensor:
        """Memory that `gradients` fills at its first call and then adds to, in whole tiles; the
        first [V, H] count."""
        self.is_filled = False
        vocab, width = self.weight.shape
        return empty(round_up(vocab, self.panel), round_up(width, self.slice))

    def gradients(
        self,
        kept: Tensor,
        coefficients: Tensor,
        log_softmax: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor | None:
        """dx [K, H] of rows `kept` of those held, which ends their being held; adds to dw, db."""
        rows, width = self.rows[kept], self.weight.shape[1]
        x = operand(self.hidden_states[rows], self.dtype)
        dx = empty(len(x), round_up(width, self.slice)).zero_() if needs_hidden else None
        torch.ops.codistill_cpu.linear_backward(
            self.raw,
            x,
            self.weight,
            kept,
            self.token_ids[rows],
            self.head.temperature[rows],
            self.head.softcap,
            coefficients.contiguous(),
            log_softmax.contiguous(),
            dx,
            dw,
            self.is_filled,
            db,
        )
        self.raw, self.is_filled = None, True
        return None if dx is None else dx[: len(rows), :width]


def empty(*shape: int) -> Tensor:
    """As the extension computes: whatever the process's default dtype is."""
    return torch.empty(shape, dtype=torch.float32)


def operand_dtype(hidden_states: Tensor, weight: Tensor) -> torch.dtype:
    """Of products. Where it is not bf16, bf16 and fp16 become fp32 tile by tile: none is lost."""
    both_bf16 = hidden_states.dtype == weight.dtype == torch.bfloat16
    use_bf16 = both_bf16 and torch.ops.codistill_cpu.multiplies_bf16()
    return torch.bfloat16 if use_bf16 else torch.float32


def operand(hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states [R, H] in whole tiles of rows and of columns, zeros beyond."""
    rows, width = hidden_states.shape
    tile_rows, _, _ = torch.ops.codistill_cpu.tile_shape()
    out = torch.zeros((round_up(rows, tile_rows), round_up(width, 16)), dtype=dtype)
    out[:rows, :width] = hidden_states
    return out
