"""A linear head on a GPU: the Triton backend's chunks. docs/kernels.md has the design."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_kernels import _slabs
from codistill_kernels._exponentials_triton import Exponentials
from codistill_kernels._head import Head, Plan
from codistill_kernels._products import fp32_sums, product
from codistill_kernels._products_triton import Slabs, linear_states, operands
from codistill_kernels._slabs import padded_columns, pieces
from codistill_kernels._softmax_triton import logit_gradients, merge_states


class TritonChunks:
    """Exponentials of one chunk of rows at a time."""

    HOLDS_LOGITS = False  # of a chunk: exponentials

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None:
        self.hidden_states, self.token_ids = hidden_states, token_ids.contiguous()
        self.x, self.head = operands(hidden_states, head)
        self.memory: Tensor | None = None
        self.is_filled = False

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        """workspace: bytes."""
        return _slabs.plan(rows, vocab, dtype, workspace)

    @staticmethod
    def takes_logits(softcap: float, has_entropy_gradient: bool, needs: Sequence[bool]) -> bool:
        """Whether gradients take the logits, unrounded: a bias's is a plain sum of them, and the
        logarithm of a rounded exponential is off by 2^-9, too much for z - E_p z."""
        return has_entropy_gradient or needs[2]

    @staticmethod
    def keep_logits(
        hidden_states: Tensor, head: Head, token_ids: Tensor, rows: Tensor, head_rows: int
    ) -> "KeptLogits":
        """Of these rows, numbered `rows` in the call; head_rows: of the head's gradient."""
        return KeptLogits(hidden_states, head, token_ids, rows, head_rows)

    @staticmethod
    def keep_exponentials(
        hidden_states: Tensor,
        head: Head,
        token_ids: Tensor,
        rows: Tensor,
        head_rows: int,
        has_entropy: bool,
        needs_dw: bool,
        workspace: int,
    ) -> "KeptExponentials":
        """As `keep_logits`."""
        x, head_operands = operands(hidden_states, head)
        vocab, hidden = head.weight.shape
        is_shared = (
            needs_dw
            and head.weight.dtype == x.dtype
            and _slabs.shares_memory(len(x), vocab, hidden, x.element_size(), workspace)
        )
        exponentials = Exponentials(
            x,
            head_operands,
            token_ids,
            has_entropy=has_entropy,
            head_rows=head_rows,
            is_shared=is_shared,
        )
        return KeptExponentials(exponentials, rows, head.weight.dtype)

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
        numbers = (coefficients, log_softmax)
        write_gradients(Slabs(x, head.weight), x, head, token_ids, *numbers, dx, dw, db)

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


def write_gradients(
    slabs: Slabs,
    x: Tensor,
    head: Head,
    token_ids: Tensor,
    coefficients: Tensor,
    log_softmax: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """As TritonChunks.write_gradients, from slabs of raw logits, which with db they end, and x."""
    vocab = len(head.weight)
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
            logit_gradients(slab, out, head.bias, *token, *place, *(t[:, rows] for t in numbers))
            if db is not None:  # of numbers that are not rounded: a plain sum
                db[columns] += slab.sum(dim=0)
                dz[rows, : len(weight)] = slab
        dz = dz[:, : len(weight)]
        with fp32_sums:
            if dx is not None:
                product(dz, weight, dx, add=columns.start > 0)
            if dw is not None:
                product(dz.T, x, dw[columns])


class KeptExponentials:
    """`_linear.Kept`: exponentials of the active rows of a call."""

    has_entropy_gradient = False

    def __init__(self, exponentials: Exponentials, rows: Tensor, dw_dtype: torch.dtype) -> None:
        self.exponentials, self.rows, self.dw_dtype = exponentials, rows, dw_dtype

    @property
    def statistics(self) -> Tensor:
        return self.exponentials.statistics

    def gradients(
        self,
        coefficients: Tensor,
        log_softmax: Tensor,
        needs: Sequence[bool],
        hidden_states: Tensor,
        dx_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        c0 = coefficients[0, self.rows]
        kept = c0.nonzero().squeeze(1)
        if not _slabs.gathers(len(kept), len(c0)):
            kept = torch.arange(len(c0), device=c0.device)
        rows = self.rows[kept]
        dw = self.exponentials.head_gradient(self.dw_dtype) if needs[1] else None
        if not len(kept):
            return torch.zeros_like(hidden_states), None if dw is None else dw.zero_(), None
        dx = self.exponentials.gradients(kept, c0[kept], log_softmax[:, rows], needs[0], dw)
        return to_rows(dx, rows, len(hidden_states)), dw, None


class KeptLogits:
    """`_linear.Kept`: raw logits of the active rows of a call, in fp32."""

    has_entropy_gradient = True

    def __init__(
        self, hidden_states: Tensor, head: Head, token_ids: Tensor, rows: Tensor, head_rows: int
    ) -> None:
        x, self.head = operands(hidden_states, head)
        self.dw_dtype = head.weight.dtype
        self.db_dtype = torch.float32 if head.bias is None else head.bias.dtype
        self.token_ids, self.rows, self.head_rows = token_ids.contiguous(), rows, head_rows
        self.slabs = Slabs(x, self.head.weight, keeps=True)
        vocab = len(head.weight)
        states = linear_states(self.slabs, self.head, self.token_ids, slice(0, vocab), True)
        self.statistics = merge_states(states, self.token_ids, vocab)

    def gradients(
        self,
        coefficients: Tensor,
        log_softmax: Tensor,
        needs: Sequence[bool],
        hidden_states: Tensor,
        dx_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        numbers = coefficients[:, self.rows], log_softmax[:, self.rows]
        vocab, hidden = self.head.weight.shape
        new = coefficients.new_empty
        dx = new((len(self.rows), hidden)) if needs[0] else None
        dw = new((self.head_rows, hidden), dtype=self.dw_dtype) if needs[1] else None
        db = new(self.head_rows).zero_() if needs[2] else None
        if dw is not None:
            dw[vocab:] = 0
        # A row without a gradient may hold NaN: its dz is 0, but not 0 times that.
        x = self.slabs.x.masked_fill(numbers[0].eq(0).all(dim=0)[:, None], 0.0)
        write_gradients(self.slabs, x, self.head, self.token_ids, *numbers, dx, dw, db)
        db = None if db is None else db.to(self.db_dtype)
        return to_rows(dx, self.rows, len(hidden_states)), dw, db


def to_rows(part: Tensor | None, rows: Tensor, size: int) -> Tensor | None:
    """[K, H] as those rows of [size, H], zeros elsewhere."""
    if part is None or len(rows) == size:
        return part
    out = part.new_zeros((size, part.shape[1]))
    out[rows] = part
    return out
