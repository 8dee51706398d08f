"""The linear head in C++ (csrc/linear.cpp, csrc/gradients.cpp): tiles that stay in cache."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_kernels import _native
from codistill_kernels._linear.chunks import Chunks, Kept, Plan
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.slab_sizes import pieces, round_up

ROWS = 4096  # at once, where nothing is held of their logits


class HeldLogits:
    """Statistics [4, R] of rows, and what is held of their logits until their gradients are made.

    Where hidden states and weight are bf16, E = 2^-k e^z in bf16, k a multiple of 64 for each row
    and 256 columns: the gradient of the logits is f E with one number f per row. Else, and with
    is_exact, raw logits in fp32, for gradients that take those (`Chunks.takes_logits`).
    """

    def __init__(
        self,
        hidden_states: Tensor,
        head: Head,
        token_ids: Tensor,
        *,
        is_exact: bool,
        memory: Tensor | None = None,
    ) -> None:
        """memory: that of rows that are done with, to be used again."""
        self.head, self.token_ids = head, token_ids.contiguous()
        self.weight = head.weight.contiguous()
        self.dtype = operand_dtype(hidden_states, head.weight)
        self.x = operand(hidden_states, self.dtype)
        self.is_exact = is_exact or not both_bf16(hidden_states, head.weight)
        tile_rows, panel = _native.tile_shape()
        panels = -(-len(self.weight) // panel)
        shape = (panels, round_up(len(token_ids), tile_rows) * panel)
        size, dtype = math.prod(shape), torch.float32 if self.is_exact else torch.bfloat16
        if memory is None or memory.numel() < size:
            memory = _native.empty((size,), dtype)
        self.memory = memory
        self.held = memory[:size].view(shape)
        self.powers = None if self.is_exact else empty(panels, len(token_ids))
        self.statistics = statistics_of(
            self.x, self.weight, head, self.token_ids, self.held, self.powers
        )

    def finish(
        self, kept: Tensor, coefficients: Tensor, lse_parts: Tensor, db: Tensor | None = None
    ) -> None:
        """Make the gradients of the logits of rows `kept` [K] in the place of what is held.

        Once only. Takes coefficients and lse_parts [3, K]; db [>= V] is added to.
        """
        vocab, lse_parts = len(self.weight), lse_parts.contiguous()
        tokens = self.token_ids[kept], self.head.temperature[kept]
        self.kept = kept
        if self.powers is None:
            self.dz = self.held.view(self.dtype)
            self.factors = torch.ones(len(kept), dtype=torch.float32)
            _native.call(
                "finish_raw",
                self.held,
                self.dz,
                kept,
                *tokens,
                self.head.softcap,
                coefficients.contiguous(),
                lse_parts,
                vocab,
                db,
            )
            return
        assert db is None
        self.dz, (ids, temperature) = self.held, tokens
        self.factors = empty(len(kept))
        _native.call(
            "finish_exponentials",
            self.held,
            self.powers,
            kept,
            ids,
            self.statistics[3, kept],
            temperature,
            coefficients[0].contiguous(),
            lse_parts,
            vocab,
            self.factors,
        )

    def weight_gradient(self, dw: Tensor, *, add: bool = False) -> None:
        """Write the first V rows of dw [>= V, H], rounded once; with `add` add to them."""
        vocab = len(self.weight)
        _native.call("weight_gradient", self.dz, self.x, self.factors, self.kept, vocab, dw, add)

    def hidden_gradient(self, dx: Tensor, rows: Tensor, *, add: bool = False) -> None:
        """Write rows [K] of dx [N, H], rounded once; with `add` add to them."""
        product = _native.DTYPES[self.dtype]
        _native.call("hidden_gradient", self.dz, self.weight, self.factors, rows, product, dx, add)


class KeptRows(Kept):
    """Active rows of a call, and what is held of their logits."""

    def __init__(self, held: HeldLogits, rows: Tensor, head_rows: int) -> None:
        """rows, head_rows: as in `Chunks.keep`."""
        self.held, self.rows, self.head_rows = held, rows, head_rows
        self.has_entropy_gradient = held.is_exact

    @property
    def statistics(self) -> Tensor:
        return self.held.statistics

    def gradients(
        self,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs: Sequence[bool],
        hidden_states: Tensor,
        dx_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        held, width = self.held, hidden_states.shape[1]
        kept = coefficients[:, self.rows].ne(0).any(dim=0).nonzero().squeeze(1)
        rows, vocab = self.rows[kept], len(held.weight)
        db = empty(self.head_rows).zero_() if needs[2] else None
        if len(kept):
            held.finish(kept, coefficients[:, rows], lse_parts[:, rows], db)
        dw = dx = None
        if needs[1]:
            dw = _native.empty((self.head_rows, width), held.weight.dtype)
            dw[vocab if len(kept) else 0 :] = 0
            if len(kept):
                held.weight_gradient(dw)
        if needs[0]:
            make = torch.empty if len(rows) == len(hidden_states) else torch.zeros
            dx = make(hidden_states.shape, dtype=dx_dtype)
            if len(kept):
                held.hidden_gradient(dx, rows)
        bias = held.head.bias
        return dx, dw, db if db is None or bias is None else db.to(bias.dtype)


class CpuChunks(Chunks):
    """Raw logits x . w + bias of one chunk of rows at a time."""

    HOLDS_LOGITS = True
    FEW_ROWS = 256  # below, a chunk is not worth packing the weight for

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None:
        self.hidden_states, self.token_ids, self.head = hidden_states, token_ids, head
        self.memory: Tensor | None = None
        self.is_filled = False

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        """dtype: bf16 where exponentials can be held. A chunk, of raw logits, has at least one
        tile of rows."""
        if (2 if dtype == torch.bfloat16 else 4) * rows * vocab <= workspace:
            return Plan("kept", rows)
        most = max(64, workspace // (4 * max(1, vocab)))
        return Plan("columns" if most < cls.FEW_ROWS else "chunks", most)

    @staticmethod
    def takes_logits(softcap: float, has_entropy_gradient: bool, needs: Sequence[bool]) -> bool:
        return bool(softcap) or has_entropy_gradient or needs[2]

    def keep(
        self,
        rows: Tensor,
        head_rows: int,
        *,
        is_exact: bool,
        has_entropy: bool,
        needs_dw: bool,
        workspace: int,
    ) -> Kept:
        """With an entropy or not, it costs the same."""
        held = HeldLogits(self.hidden_states, self.head, self.token_ids, is_exact=is_exact)
        return KeptRows(held, rows, head_rows)

    def statistics(self, has_entropy: bool = False) -> Tensor:
        """With an entropy or not, they cost the same."""
        weight = self.head.weight.contiguous()
        dtype = operand_dtype(self.hidden_states, weight)
        parts = []
        for first in range(0, max(1, len(self.token_ids)), ROWS):
            rows = slice(first, first + ROWS)
            x, ids = operand(self.hidden_states[rows], dtype), self.token_ids[rows]
            parts.append(statistics_of(x, weight, self.head.of_rows(rows), ids))
        return torch.cat(parts, dim=1)

    def hold(self, rows: Tensor) -> Tensor:
        head, ids = self.head.of_rows(rows), self.token_ids[rows]
        x = self.hidden_states[rows]
        self.held = HeldLogits(x, head, ids, is_exact=True, memory=self.memory)
        self.memory = self.held.memory
        return self.held.statistics

    def weight_gradients(self) -> Tensor:
        self.is_filled = False
        return _native.empty(self.head.weight.shape, torch.float32)

    def gradients(
        self,
        kept: Tensor,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor | None:
        self.held.finish(kept, coefficients, lse_parts, db)
        if dw is not None:
            self.held.weight_gradient(dw, add=self.is_filled)
            self.is_filled = True
        if not needs_hidden:
            return None
        dx = empty(len(kept), self.head.weight.shape[1])
        self.held.hidden_gradient(dx, torch.arange(len(kept)))
        return dx

    def write_gradients(
        self,
        coefficients: Tensor,
        lse_parts: Tensor,
        is_whole: bool,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
        workspace: int,
    ) -> None:
        """Range by range of the vocabulary, as wide as fits into the workspace: needs no fp32 copy
        of dw. The logits come out as they were in the forward pass, bit for bit."""
        rows, vocab = len(self.hidden_states), len(self.head.weight)
        every = torch.arange(rows)
        width = max(256, workspace // (4 * rows) // 256 * 256)  # whole panels
        memory = None
        for columns in pieces(vocab, width):
            part, ids = self.head.columns(columns), self.token_ids - columns.start
            held = HeldLogits(self.hidden_states, part, ids, is_exact=True, memory=memory)
            memory = held.memory
            held.finish(every, coefficients, lse_parts, None if db is None else db[columns])
            if dw is not None:
                held.weight_gradient(dw[columns])
            if dx is not None:
                held.hidden_gradient(dx, every, add=True)


def statistics_of(
    x: Tensor,
    weight: Tensor,
    head: Head,
    token_ids: Tensor,
    held: Tensor | None = None,
    powers: Tensor | None = None,
) -> Tensor:
    """[4, R] of the rows of an `operand`; held and powers (`HeldLogits`) are written."""
    bias = None if head.bias is None else head.bias.float().contiguous()
    out = empty(4, len(token_ids))
    _native.call(
        "linear_forward",
        x,
        weight,
        bias,
        token_ids.contiguous(),
        head.temperature.contiguous(),
        head.softcap,
        held,
        powers,
        out,
    )
    return out


def empty(*shape: int) -> Tensor:
    """Memory in fp32, in which the library computes, whatever the process's default dtype is."""
    return torch.empty(shape, dtype=torch.float32)


def both_bf16(hidden_states: Tensor, weight: Tensor) -> bool:
    return hidden_states.dtype == weight.dtype == torch.bfloat16


def operand_dtype(hidden_states: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of products. Where it is fp32, bf16 and fp16 operands are widened tile by tile."""
    use_bf16 = both_bf16(hidden_states, weight) and _native.multiplies_bf16()
    return torch.bfloat16 if use_bf16 else torch.float32


def operand(hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states [R, H] padded with zeros to whole tiles of rows and columns.

    The tensor itself where nothing is to be padded or converted.
    """
    rows, width = hidden_states.shape
    tile_rows, _ = _native.tile_shape()
    shape = (round_up(rows, tile_rows), round_up(width, 16))
    if hidden_states.dtype == dtype and shape == (rows, width):
        return hidden_states.contiguous()
    out = torch.empty(shape, dtype=dtype)
    out[:rows, :width] = hidden_states
    out[rows:] = 0
    out[:, width:] = 0
    return out
