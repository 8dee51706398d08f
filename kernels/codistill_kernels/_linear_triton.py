"""Logits of a linear head on a GPU: products by cuBLAS into fp32 slabs, the rest in Triton.

    slab = x W_s^T (fp32, never rounded) -> states of its rows and, where gradients are wanted,
    E = 2^(z log2e - k) in the operands' dtype
    v = c0 2^k e^-lse a row:  dx = v (E W),  dW_s = E_s^T (v x)

E is written once and is what both gradient products read: 6 N H V operations, 6 bytes a logit. The
power k is a multiple of 128 that few rows have: a row's segments differ by exact powers of two.
Slabs have fixed shapes, so a row's result does not depend on the other rows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels import _slabs
from codistill_kernels._head import Head, Plan
from codistill_kernels._slabs import padded_columns, padded_rows, pieces
from codistill_kernels._softmax_triton import (
    COARSE,
    LOG2E,
    NUM_WARPS,
    STATES,
    logit_gradients,
    merge_states,
    segment_states,
)

# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_kept", "first_segment", "num_segments"])
def finish_exponentials_kernel(
    exponentials_ptr,
    rows_ptr,
    shifts_ptr,
    target_column_ptr,
    at_target_ptr,
    factors_ptr,
    num_kept,
    first_segment,
    num_segments,
    columns,
    stride_n,
    SEGMENT: tl.constexpr,
):
    """Segments times 2^shift, where there is one, and the target's entry in its place; all 0 where
    the row's factor is."""
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    is_zero = tl.load(factors_ptr + index) == 0.0
    exponentials_ptr += row * stride_n
    for segment in range(num_segments):
        shift = tl.load(shifts_ptr + (first_segment + segment) * num_kept + index)
        if is_zero | (shift != 0.0):  # rare: offsets differ from 44 nats on
            cols = segment * SEGMENT + tl.arange(0, SEGMENT)
            e = tl.load(exponentials_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)
            # A power of two is exact. Select: a row without a gradient may hold NaN.
            e = tl.where(is_zero, 0.0, e * tl.exp2(shift))
            e = e.to(exponentials_ptr.dtype.element_ty)
            tl.store(exponentials_ptr + cols, e, mask=cols < columns)
    column = tl.load(target_column_ptr + index) - first_segment * SEGMENT
    if (column >= 0) & (column < columns) & (is_zero == 0):
        at_target = tl.load(at_target_ptr + index).to(exponentials_ptr.dtype.element_ty)
        tl.debug_barrier()  # its segment may just have been written
        tl.store(exponentials_ptr + column, at_target)


# --- products ----------------------------------------------------------------------------------


def as_operands(hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of stride 1, of one dtype: fp32 where they differ."""
    if hidden_states.dtype != weight.dtype or weight.dtype == torch.float64:
        hidden_states, weight = hidden_states.float(), weight.float()
    return tuple(t if t.stride(1) == 1 else t.contiguous() for t in (hidden_states, weight))


def operands(hidden_states: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Hidden states and head as products and kernels take them."""
    x, weight = as_operands(hidden_states, head.weight)
    bias = None if head.bias is None else head.bias.float().contiguous()
    return x, replace(head, weight=weight, bias=bias, temperature=head.temperature.contiguous())


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b: summed in fp32, rounded once to the dtype of `out`."""
    if a.is_cuda and a.dtype != torch.float32:
        if out.dtype != torch.float32:
            assert not add
            torch.mm(a, b, out=out)
        elif add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(a.float(), b.float())
    elif out.dtype == torch.float32:
        torch.mm(a.float(), b.float(), out=out)
    else:
        out.copy_(a.float() @ b.float())


@contextmanager
def fp32_sums() -> Iterator[None]:
    """cuBLAS may not add up parts of a product that it has rounded to bf16 or fp16."""
    settings = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = {
        name: (getattr(settings, name), getattr(settings, f"{name}_split_k")) for name in names
    }
    try:
        for name, (_, split_k) in before.items():
            setattr(settings, name, (False, split_k))
        yield
    finally:
        for name, values in before.items():
            setattr(settings, name, values)


class Slabs:
    """fp32 products x . w of a head, a slab at a time in the same memory."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = x, weight
        widest = padded_columns(min(_slabs.SEGMENT, len(weight)))
        shape = padded_rows(len(x)) * widest
        self.memory = torch.empty(shape, dtype=torch.float32, device=x.device)
        self.blocks = [(rows, self.block(rows)) for rows in pieces(len(x), _slabs.ROWS)]

    def block(self, rows: slice) -> Tensor:
        """Hidden states of a slab, with rows of zeros to its fixed height."""
        x = self.x[rows]
        height = padded_rows(len(x))
        if height == len(x):
            return x
        out = x.new_zeros((height, x.shape[1]))
        out[: len(x)] = x
        return out

    def of(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their products with these vocabulary rows), slab after slab."""
        weight = self.weight[columns]
        width = padded_columns(len(weight))
        for rows, x in self.blocks:
            slab = self.memory[: len(x) * width].view(len(x), width)[:, : len(weight)]
            product(x, weight.T, slab)
            yield rows, slab[: rows.stop - rows.start]


def linear_states(
    slabs: Slabs,
    head: Head,
    token_ids: Tensor,
    columns: slice,
    has_entropy: bool,
    exponentials: Tensor | None = None,
) -> Tensor:
    """States [segments, STATES, N] of these vocabulary rows; fills exponentials [N, columns]."""
    segments = [
        slice(columns.start + piece.start, columns.start + piece.stop)
        for piece in pieces(columns.stop - columns.start, _slabs.SEGMENT)
    ]
    shape = (len(segments), STATES, len(token_ids))
    states = torch.empty(shape, dtype=torch.float32, device=token_ids.device)
    for number, segment in enumerate(segments):
        first = segment.start - columns.start
        for rows, slab in slabs.of(segment):
            segment_states(
                slab,
                head.bias,
                token_ids[rows],
                head.temperature[rows],
                head.softcap,
                slab.shape[1],
                segment.start,
                states[number : number + 1, :, rows],
                has_entropy,
                None
                if exponentials is None
                else exponentials[rows, first : first + _slabs.SEGMENT],
            )
    return states


# --- exponentials ------------------------------------------------------------------------------


class Exponentials:
    """Statistics of rows, and E of their logits until the gradients are made of it."""

    def __init__(
        self,
        x: Tensor,
        head: Head,
        token_ids: Tensor,
        *,
        has_entropy: bool = False,
        head_rows: int | None = None,
        is_shared: bool = False,
        memory: Tensor | None = None,
    ) -> None:
        """x, head: as `operands` gives them. is_shared: the gradient of head_rows rows (default:
        the head's) will take the place of E. memory: of exponentials that are done with, to be used
        again."""
        self.x, self.head, self.token_ids = x, head, token_ids.contiguous()
        self.is_shared = is_shared
        self.head_rows = len(head.weight) if head_rows is None else head_rows
        shape = (len(x), *head.weight.shape)
        rows = self.head_rows
        self.columns = list(_slabs.slices(*shape, shared=is_shared, head_rows=rows))
        size = _slabs.kept_elements(*shape, shared=is_shared, head_rows=rows)
        self.memory = x.new_empty(size) if memory is None else memory[:size]
        self.slices = [self.slice_of(columns) for columns in self.columns]
        states = self.states(Slabs(x, head.weight), has_entropy)
        self.statistics = merge_states(states, self.token_ids, len(head.weight))
        self.offsets, self.slopes = states[:, 5], states[:, 4]

    def slice_of(self, columns: slice) -> Tensor:
        """[N, columns] at the end of the memory, behind the slices before."""
        rows, width = len(self.x), columns.stop - columns.start
        first = len(self.memory) - rows * (self.columns[-1].stop - columns.start)
        return self.memory[first : first + rows * width].view(rows, width)

    def states(self, slabs: Slabs, has_entropy: bool) -> Tensor:
        parts = []
        for columns, e in zip(self.columns, self.slices, strict=True):
            segments = slice(columns.start, min(columns.stop, len(self.head.weight)))
            parts.append(linear_states(slabs, self.head, self.token_ids, segments, has_entropy, e))
        return torch.cat(parts)

    def head_gradient(self, dtype: torch.dtype) -> Tensor:
        """Memory [head_rows, H] for `gradients`, where it is shared in the place of E."""
        shape = (self.head_rows, self.head.weight.shape[1])
        if self.is_shared:
            return self.memory[: math.prod(shape)].view(shape)
        return self.memory.new_empty(shape, dtype=dtype)

    def gradients(
        self,
        kept: Tensor,
        c0: Tensor,
        log_softmax: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        *,
        add: bool = False,
    ) -> Tensor | None:
        """dx [K, H] in fp32 of the `kept` rows, and dw [>= V, H], overwritten or with `add` added
        to; rows from V on become 0.

        c0 [K], 0 where a row of these has no gradient, log_softmax [3, K]. Once only: it changes E.
        """
        factors = self.finish(kept, c0, log_softmax)
        x = self.x if len(kept) == len(self.x) else self.x[kept]
        scaled = torch.mul(x, factors[:, None], out=torch.empty_like(x))  # rounded once
        scaled.masked_fill_(factors[:, None] == 0, 0.0)  # such a row may hold NaN
        dx = factors.new_empty(x.shape) if needs_hidden else None
        with fp32_sums():
            for columns, e in self.parts(kept):
                if dx is not None:
                    product(e, self.head.weight[columns], dx, add=columns.start > 0)
                if dw is not None:
                    out = dw[columns]
                    direct = torch.empty_like(out) if overlap(e, out) else out
                    product(e.T, scaled, direct, add=add)
                    if direct is not out:
                        out.copy_(direct)
        if dw is not None:
            dw[len(self.head.weight) :] = 0
        return None if dx is None else dx.mul_(factors[:, None])

    def finish(self, kept: Tensor, c0: Tensor, log_softmax: Tensor) -> Tensor:
        """Bring the kept rows' segments to one power of two a row and put p_y - 1 in the target's
        place; the number [K] a row that makes E the gradient of its raw logits."""
        maximum, log_sum, _ = log_softmax
        some = slice(None) if len(kept) == len(self.x) else kept
        ids, target = self.token_ids[some], self.statistics[3, some]
        ids = torch.where(ids < len(self.head.weight), ids, -1)  # another shard's
        exponent = maximum * LOG2E.value
        offset = (exponent / COARSE.value).round() * COARSE.value
        exponent = exponent - offset + log_sum * LOG2E.value  # log2 of e^lse 2^-offset
        at_target = (target - maximum - log_sum).clamp(max=0).expm1() * exponent.exp2()
        if self.head.softcap:
            owner = ids.clamp(min=0).div(_slabs.SEGMENT, rounding_mode="floor")
            slopes = self.slopes[:, some].gather(0, owner.clamp(max=len(self.slopes) - 1)[None])
            at_target = at_target * slopes.squeeze(0)
        shifts = self.offsets[:, some] - offset
        factors = c0 * (-exponent).exp2() / self.head.temperature[some]
        factors = torch.where(c0 == 0, 0.0, factors)
        for columns, e in zip(self.columns, self.slices, strict=True):
            finish_exponentials_kernel[(len(kept),)](
                e,
                kept,
                shifts,
                ids,
                at_target,
                factors,
                len(kept),
                columns.start // _slabs.SEGMENT,
                triton.cdiv(e.shape[1], _slabs.SEGMENT),
                e.shape[1],
                e.stride(0),
                SEGMENT=_slabs.SEGMENT,
                num_warps=NUM_WARPS,
            )
        return factors

    def parts(self, kept: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary rows, E [K, columns] of the kept rows), where they lie or gathered."""
        vocab = len(self.head.weight)
        is_all = len(kept) == len(self.x)
        widest = self.columns[-1].stop if is_all else _slabs.SEGMENT
        buffer = self.memory.new_empty(0 if is_all else len(kept) * widest)
        for columns, e in zip(self.columns, self.slices, strict=True):
            for piece in pieces(e.shape[1], widest):
                part = e[:, piece]
                if not is_all:
                    out = buffer[: len(kept) * part.shape[1]].view(len(kept), part.shape[1])
                    part = torch.index_select(part, 0, kept, out=out)
                first = columns.start + piece.start
                stop = min(columns.start + piece.stop, vocab)
                yield slice(first, stop), part[:, : stop - first]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether matrices of row stride >= columns lie on the same memory."""
    (start_a, end_a), (start_b, end_b) = (
        (t.data_ptr(), t.data_ptr() + t.stride(0) * len(t) * t.element_size()) for t in (a, b)
    )
    return start_a < end_b and start_b < end_a


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
            with fp32_sums():
                if dx is not None:
                    product(dz, weight, dx, add=columns.start > 0)
                if dw is not None:
                    product(dz.T, x, dw[columns])

    def hold(self, rows: Tensor) -> Tensor:
        """Keep the exponentials of these rows; their statistics [4, R]."""
        head, ids = self.head.of_rows(rows), self.token_ids[rows]
        self.held = Exponentials(self.x[rows], head, ids, memory=self.memory)
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
