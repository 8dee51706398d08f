"""The linear head on a GPU: products by cuBLAS, the softmax in Triton. docs/kernels.md has the
design."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.chunks import Chunks, Kept, Plan
from codistill_kernels._linear.exponentials_triton import Exponentials
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.products import fp32_sums, product
from codistill_kernels._linear.slab_sizes import padded_columns, pieces
from codistill_kernels._linear.slabs import Slabs, linear_states, operands
from codistill_kernels._linear.softmax_triton import logit_gradients, merge_states


class TritonChunks(Chunks):
    """Exponentials of one chunk of rows at a time."""

    HOLDS_LOGITS = False

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None:
        self.hidden_states, self.token_ids = hidden_states, token_ids.contiguous()
        self.x, self.head = operands(hidden_states, head)
        self.given = head
        self.memory: Tensor | None = None
        self.is_filled = False

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        return slab_sizes.plan(rows, vocab, dtype, workspace)

    @staticmethod
    def takes_logits(softcap: float, has_entropy_gradient: bool, needs: Sequence[bool]) -> bool:
        """A bias's gradient is a plain sum of them, and the logarithm of a rounded exponential is
        off by 2^-9, too much for z - E_p z."""
        return has_entropy_gradient or needs[2]

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
        if is_exact:
            return KeptLogits(self, rows, head_rows)
        vocab, hidden = self.head.weight.shape
        itemsize = self.x.element_size()
        is_shared = (
            needs_dw
            and self.given.weight.dtype == self.x.dtype
            and slab_sizes.shares_memory(len(self.x), vocab, hidden, itemsize, workspace)
        )
        exponentials = Exponentials(
            self.x,
            self.head,
            self.token_ids,
            has_entropy=has_entropy,
            head_rows=head_rows,
            is_shared=is_shared,
        )
        return KeptExponentials(exponentials, rows, self.given.weight.dtype)

    def statistics(self, has_entropy: bool = False) -> Tensor:
        slabs, vocab = Slabs(self.x, self.head.weight), len(self.head.weight)
        states = linear_states(slabs, self.head, self.token_ids, slice(0, vocab), has_entropy)
        return merge_states(states, self.token_ids, vocab)

    def hold(self, rows: Tensor) -> Tensor:
        """Exponentials are held."""
        head, ids = self.head.of_rows(rows), self.token_ids[rows]
        self.held = Exponentials(self.x[rows], head, ids, has_entropy=True, memory=self.memory)
        self.memory = self.held.memory
        return self.held.statistics

    def weight_gradients(self) -> Tensor:
        self.is_filled = False
        return self.x.new_empty(self.head.weight.shape, dtype=torch.float32)

    def gradients(
        self,
        kept: Tensor,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor | None:
        """Serves coefficients of log-probabilities alone: c1 = c0 and c2 = 0."""
        assert db is None
        dx = self.held.gradients(
            kept, coefficients[0], lse_parts, needs_hidden, dw, add=self.is_filled
        )
        self.is_filled = True
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
        """Segment by segment of the vocabulary: dw is summed over all rows in one product, and
        rounded once. The logits come out as they were in the forward pass, bit for bit."""
        slabs = Slabs(self.x, self.head.weight)
        tokens = self.head, self.token_ids
        write_gradients(slabs, self.x, *tokens, coefficients, lse_parts, dx, dw, db)


def write_gradients(
    slabs: Slabs,
    x: Tensor,
    head: Head,
    token_ids: Tensor,
    coefficients: Tensor,
    lse_parts: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """`Chunks.write_gradients` from slabs of raw logits and hidden states x.

    With db the slabs are overwritten.
    """
    vocab = len(head.weight)
    per_row = coefficients.contiguous(), lse_parts.contiguous()
    memory = x.new_empty(len(x) * padded_columns(min(slab_sizes.SEGMENT, vocab)))
    for columns in pieces(vocab, slab_sizes.SEGMENT):
        weight = head.weight[columns]
        width = padded_columns(len(weight))
        dz = memory[: len(x) * width].view(len(x), width)
        for rows, slab in slabs.of(columns):
            out = dz[rows] if db is None else slab
            token = (token_ids[rows], head.temperature[rows], head.softcap)
            place = (len(weight), columns.start)
            logit_gradients(slab, out, head.bias, *token, *place, *(t[:, rows] for t in per_row))
            if db is not None:  # a plain sum, of numbers that are not rounded
                db[columns] += slab.sum(dim=0)
                dz[rows, : len(weight)] = slab
        dz = dz[:, : len(weight)]
        with fp32_sums:
            if dx is not None:
                product(dz, weight, dx, add=columns.start > 0)
            if dw is not None:
                product(dz.T, x, dw[columns])


class KeptExponentials(Kept):
    """Exponentials of the active rows of a call."""

    has_entropy_gradient = False

    def __init__(self, exponentials: Exponentials, rows: Tensor, dw_dtype: torch.dtype) -> None:
        self.exponentials, self.rows, self.dw_dtype = exponentials, rows, dw_dtype

    @property
    def statistics(self) -> Tensor:
        return self.exponentials.statistics

    def gradients(
        self,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs: Sequence[bool],
        hidden_states: Tensor,
        dx_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        c0 = coefficients[0, self.rows]
        kept = c0.nonzero().squeeze(1)
        if not slab_sizes.gathers(len(kept), len(c0)):
            kept = torch.arange(len(c0), device=c0.device)
        rows = self.rows[kept]
        dw = self.exponentials.head_gradient(self.dw_dtype) if needs[1] else None
        if not len(kept):
            return torch.zeros_like(hidden_states), None if dw is None else dw.zero_(), None
        dx = self.exponentials.gradients(kept, c0[kept], lse_parts[:, rows], needs[0], dw)
        return to_rows(dx, rows, len(hidden_states)), dw, None


class KeptLogits(Kept):
    """Raw logits of the active rows of a call, in fp32."""

    has_entropy_gradient = True

    def __init__(self, chunks: TritonChunks, rows: Tensor, head_rows: int) -> None:
        """rows, head_rows: as in `Chunks.keep`."""
        self.head, self.token_ids, given = chunks.head, chunks.token_ids, chunks.given
        self.dw_dtype = given.weight.dtype
        self.db_dtype = torch.float32 if given.bias is None else given.bias.dtype
        self.rows, self.head_rows = rows, head_rows
        self.slabs = Slabs(chunks.x, self.head.weight, keeps=True)
        vocab = len(self.head.weight)
        states = linear_states(self.slabs, self.head, self.token_ids, slice(0, vocab), True)
        self.merged = merge_states(states, self.token_ids, vocab)

    @property
    def statistics(self) -> Tensor:
        return self.merged

    def gradients(
        self,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs: Sequence[bool],
        hidden_states: Tensor,
        dx_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        per_row = coefficients[:, self.rows], lse_parts[:, self.rows]
        vocab, hidden = self.head.weight.shape
        new = coefficients.new_empty
        dx = new((len(self.rows), hidden)) if needs[0] else None
        dw = new((self.head_rows, hidden), dtype=self.dw_dtype) if needs[1] else None
        db = new(self.head_rows).zero_() if needs[2] else None
        if dw is not None:
            dw[vocab:] = 0
        # A row without a gradient may hold NaN: its dz is 0, but not 0 times that.
        x = self.slabs.x.masked_fill(per_row[0].eq(0).all(dim=0)[:, None], 0.0)
        write_gradients(self.slabs, x, self.head, self.token_ids, *per_row, dx, dw, db)
        db = None if db is None else db.to(self.db_dtype)
        return to_rows(dx, self.rows, len(hidden_states)), dw, db


def to_rows(part: Tensor | None, rows: Tensor, size: int) -> Tensor | None:
    """[K, H] as those rows of [size, H], zeros elsewhere."""
    if part is None or len(rows) == size:
        return part
    out = part.new_zeros((size, part.shape[1]))
    out[rows] = part
    return out
