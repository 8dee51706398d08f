"""A linear head on a GPU: the Triton backend's chunks. docs/kernels.md has the design."""

import torch
from torch import Tensor

from codistill_kernels import _slabs
from codistill_kernels._exponentials_triton import Exponentials
from codistill_kernels._head import Head, Plan
from codistill_kernels._products_triton import Slabs, fp32_sums, linear_states, operands, product
from codistill_kernels._slabs import padded_columns, pieces
from codistill_kernels._softmax_triton import logit_gradients, merge_states


class TritonChunks:
    """Exponentials of one chunk of rows at a time."""

    HAS_BIAS_GRADIENT = False  # a plain sum, of numbers that are not rounded: they are not held

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None:
        self.hidden_states, self.token_ids = hidden_states, token_ids.contiguous()
        self.x, self.head = operands(hidden_states, head)
        self.memory: Tensor | None = None
        self.is_filled = False

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        """workspace: bytes."""
        return _slabs.plan(rows, vocab, dtype, workspace)

    @classmethod
    def keep(
        cls,
        hidden_states: Tensor,
        head: Head,
        token_ids: Tensor,
        head_rows: int,
        has_entropy: bool,
        needs_dw: bool,
        workspace: int,
    ) -> Exponentials:
        """Of all rows, until their gradients are wanted; head_rows: of the head's."""
        x, head_operands = operands(hidden_states, head)
        vocab, hidden = head.weight.shape
        is_shared = (
            needs_dw
            and head.weight.dtype == x.dtype
            and _slabs.shares_memory(len(x), vocab, hidden, x.element_size(), workspace)
        )
        return Exponentials(
            x,
            head_operands,
            token_ids,
            has_entropy=has_entropy,
            head_rows=head_rows,
            is_shared=is_shared,
        )

    def statistics(self, has_entropy: bool = False) -> Tensor:
        """[4, N] of all rows, none of them held; the third may be 0 without has_entropy."""
        slabs, vocab = Slabs(self.x, self.head.weight), len(self.head.weight)
        states = linear_states(slabs, self.head, self.token_ids, slice(0, vocab), has_entropy)
        return merge_states(states, self.token_ids, vocab)

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
        that are computed again, a segment of the vocabulary after the other: dw is summed over all
        rows in one product, and rounded once."""
        x, head = operands(hidden_states, head)
        slabs, vocab = Slabs(x, head.weight), len(head.weight)
        numbers = coefficients.contiguous(), log_softmax.contiguous()
        memory = x.new_empty(len(x) * padded_columns(min(_slabs.SEGMENT, vocab)))
        for columns in pieces(vocab, _slabs.SEGMENT):
            weight = head.weight[columns]
            width = padded_columns(len(weight))
            dz = memory[: len(x) * width].view(len(x), width)
            for rows, slab in slabs.of(columns):
                out = dz[rows] if db is None else slab
                token = (token_ids[rows], head.temperature[rows], head.softcap)
                place = (len(weight), columns.start)
                logit_gradients(
                    slab, out, head.bias, *token, *place, *(t[:, rows] for t in numbers)
                )
                if db is not None:  # of numbers that are not rounded: a plain sum
                    db[columns] += slab.sum(dim=0)
                    dz[rows, : len(weight)] = slab
            dz = dz[:, : len(weight)]
            with fp32_sums:
                if dx is not None:
                    product(dz, weight, dx, add=columns.start > 0)
                if dw is not None:
                    product(dz.T, x, dw[columns])

    def hold(self, rows: Tensor) -> Tensor:
        """Keep the exponentials of these rows; their statistics [4, R]."""
        head, ids = self.head.of_rows(rows), self.token_ids[rows]
        self.held = Exponentials(self.x[rows], head, ids, has_entropy=True, memory=self.memory)
        self.memory = self.held.memory
        return self.held.statistics

    def weight_gradients(self) -> Tensor:
        """Memory that `gradients` fills at its first call and then adds to."""
        self.is_filled = False
        return self.x.new_empty(self.head.weight.shape, dtype=torch.float32)

    def gradients(
        self,
        kept: Tensor,
        coefficients: Tensor,
        log_softmax: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor | None:
        """dx [K, H] of rows `kept` of those held, which ends their being held; adds to dw."""
        assert db is None
        dx = self.held.gradients(
            kept, coefficients[0], log_softmax, needs_hidden, dw, add=self.is_filled
        )
        self.is_filled = True
        return dx
