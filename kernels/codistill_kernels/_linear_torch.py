"""Logits of a linear head in plain PyTorch: any device, any dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_kernels._head import Head, Plan, compute_dtype
from codistill_kernels._softmax_torch import gradients, scale, statistics


class TorchChunks:
    """Raw logits x . w + bias of one chunk of rows at a time."""

    HOLDS_LOGITS = True
    ROWS = 256  # of a chunk whose logits need not be held; chosen, untested
    BUFFERS = 3  # [R, V] tensors alive at once: raw logits, their exponentials, their gradient
    FEW_ROWS = 0  # a chunk costs little besides its products

    @staticmethod
    def takes_logits(softcap: float, has_entropy_gradient: bool, needs: Sequence[bool]) -> bool:
        """Whether gradients take the logits, unrounded, not only their exponentials."""
        return True

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None:
        self.hidden_states, self.token_ids, self.head = hidden_states, token_ids, head
        self.dtype = compute_dtype(hidden_states)
        # Once, where `matmul` would convert it for every chunk.
        self.weight = head.weight if head.weight.is_cuda else head.weight.to(self.dtype)

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        """workspace: bytes. A chunk has at least 64 rows."""
        size = cls.BUFFERS * (8 if dtype == torch.float64 else 4)
        most = max(64, workspace // (size * max(1, vocab)))
        return Plan("columns" if most < min(cls.FEW_ROWS, rows) else "chunks", most)

    def statistics(self, has_entropy: bool = False) -> Tensor:
        """[4, N] of all rows, none of them held; with an entropy or not, it costs the same."""
        every = torch.arange(len(self.token_ids), device=self.token_ids.device)
        return torch.cat([self.hold(rows) for rows in every.split(self.ROWS)], dim=1)

    def hold(self, rows: Tensor) -> Tensor:
        """Keep the raw logits of these rows; their statistics [4, R]."""
        self.rows = rows
        self.raw = matmul(self.hidden_states[rows], self.weight.T, self.dtype)
        if self.head.bias is not None:
            self.raw += self.head.bias.to(self.dtype)
        temperature, softcap = self.head.temperature[rows], self.head.softcap
        return statistics(scale(self.raw, temperature, softcap), self.token_ids[rows])

    def weight_gradients(self) -> Tensor:
        """Zeros for `gradients` to add to."""
        return torch.zeros(self.head.weight.shape, dtype=self.dtype, device=self.weight.device)

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
        rows = self.rows[kept]
        raw = self.raw if len(kept) == len(self.raw) else self.raw[kept]
        self.raw = None
        temperature, softcap = self.head.temperature[rows], self.head.softcap
        ids = self.token_ids[rows]
        dz = gradients(raw, ids, temperature, softcap, coefficients, log_softmax)
        if db is not None:
            db += dz.sum(dim=0)
        if dw is not None:
            dw.addmm_(dz.T, self.hidden_states[rows].to(self.dtype))
        return matmul(dz, self.weight, self.dtype) if needs_hidden else None


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, operands as they are where the device sums them in fp32, else converted first."""
    # A caller's autocast holds in here too, and would round operands and result.
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype and dtype == torch.float32 and a.dtype != dtype:
            return torch.mm(a, b, out_dtype=dtype)
        return a.to(dtype) @ b.to(dtype)
