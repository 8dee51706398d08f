"""The linear head in plain PyTorch: any device, any dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_kernels._linear.chunks import Chunks, Kept, Plan, split_rows
from codistill_kernels._linear.head import Head, compute_dtype
from codistill_kernels._linear.softmax_torch import gradients, lse_parts_of, scale, statistics


class TorchChunks(Chunks):
    """Raw logits x . w + bias of one chunk of rows at a time."""

    HOLDS_LOGITS = True
    ROWS = 256  # of a chunk whose logits need not be held; chosen, untested
    BUFFERS = 3  # [R, V] tensors alive at once: raw logits, their exponentials, their gradient
    FEW_ROWS = 0  # a chunk costs little besides its products

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None:
        self.hidden_states, self.token_ids, self.head = hidden_states, token_ids, head
        self.dtype = compute_dtype(hidden_states)
        # Once, where `matmul` would convert it for every chunk.
        self.weight = head.weight if head.weight.is_cuda else head.weight.to(self.dtype)

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        """A chunk has at least 64 rows; nothing is kept for the backward pass."""
        size = cls.BUFFERS * (8 if dtype == torch.float64 else 4)
        most = max(64, workspace // (size * max(1, vocab)))
        return Plan("columns" if most < min(cls.FEW_ROWS, rows) else "chunks", most)

    @staticmethod
    def takes_logits(softcap: float, has_entropy_gradient: bool, needs: Sequence[bool]) -> bool:
        return True

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
        raise AssertionError("TorchChunks never plans to keep logits")

    def statistics(self, has_entropy: bool = False) -> Tensor:
        every = torch.arange(len(self.token_ids), device=self.token_ids.device)
        return torch.cat([self.hold(rows) for rows in every.split(self.ROWS)], dim=1)

    def hold(self, rows: Tensor) -> Tensor:
        self.rows = rows
        self.raw = matmul(self.hidden_states[rows], self.weight.T, self.dtype)
        if self.head.bias is not None:
            self.raw += self.head.bias.to(self.dtype)
        temperature, softcap = self.head.temperature[rows], self.head.softcap
        return statistics(scale(self.raw, temperature, softcap), self.token_ids[rows])

    def weight_gradients(self) -> Tensor:
        return torch.zeros(self.head.weight.shape, dtype=self.dtype, device=self.weight.device)

    def gradients(
        self,
        kept: Tensor,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor | None:
        rows = self.rows[kept]
        raw = self.raw if len(kept) == len(self.raw) else self.raw[kept]
        self.raw = None
        temperature, softcap = self.head.temperature[rows], self.head.softcap
        ids = self.token_ids[rows]
        dz = gradients(raw, ids, temperature, softcap, coefficients, lse_parts)
        if db is not None:
            db += dz.sum(dim=0)
        if dw is not None:
            dw.addmm_(dz.T, self.hidden_states[rows].to(self.dtype))
        return matmul(dz, self.weight, self.dtype) if needs_hidden else None

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
        """Chunk by chunk, as many rows as fit into the workspace."""
        vocab, dtype = len(self.weight), torch.promote_types(self.dtype, self.head.weight.dtype)
        sums = None
        if dw is not None:
            sums = dw[:vocab].zero_() if dw.dtype == self.dtype else self.weight_gradients()
        every = torch.arange(len(self.token_ids), device=self.token_ids.device)
        for rows in split_rows(every, self.plan(len(every), vocab, dtype, workspace).rows):
            fresh = self.hold(rows)
            # From these very logits where they are all: no kernel promises a matrix product's bits,
            # and a peaked row's p - 1 is all rounding if its maximum is not the forward pass's.
            parts = lse_parts_of(fresh) if is_whole else lse_parts[:, rows]
            here = torch.arange(len(rows), device=rows.device)
            db_here = None if db is None else db[:vocab]
            part = self.gradients(here, coefficients[:, rows], parts, dx is not None, sums, db_here)
            if dx is not None:
                dx[rows] = part
        if dw is not None and dw.dtype != self.dtype:
            dw[:vocab] = sums


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; operands stay as they are where the device sums them in fp32."""
    # A caller's autocast holds in here too, and would round operands and result.
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype and dtype == torch.float32 and a.dtype != dtype:
            return torch.mm(a, b, out_dtype=dtype)
        return a.to(dtype) @ b.to(dtype)
