"""Exponentials of logits that are kept for the gradients.

    slab = x W_s^T (fp32, never rounded) -> states of its rows and E = 2^(z log2e - k)
    with one number v = c0 2^k e^-lse per row:  dx = v (E W),  dW_s = E_s^T (v x)

E, in the operands' dtype, is written once, and both gradient products read it: 6 N H V operations,
6 bytes per logit. The power k goes in steps of 64, and few rows have two: the segments of a row
differ by exact powers of two.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.products import fp32_sums, product
from codistill_kernels._linear.slab_sizes import pieces
from codistill_kernels._linear.slabs import Slabs, linear_states
from codistill_kernels._linear.softmax_triton import BASE, COARSE, LOG2E, NUM_WARPS, merge_states

LOG2E_FP32 = torch.tensor(LOG2E.value, dtype=torch.float32).item()  # as a kernel rounds it

# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_kept", "first_segment", "num_segments"])
def finish_exponentials_kernel(
    exponentials_ptr,  # [N, columns] of these segments, changed
    rows_ptr,  # [K] int64, rows that have a gradient
    shifts_ptr,  # [S, K] of all segments: k of the segment less k of the row
    target_column_ptr,  # [K] int64, column of the token; -1: none
    at_target_ptr,  # [K] p - 1 in units of the exponentials
    factors_ptr,  # [K] v
    num_kept,
    first_segment,
    num_segments,
    columns,
    stride_n,
    SEGMENT: tl.constexpr,
):
    """E_j = 2^shift E_j, and p - 1 in the place of the token; a row of factor 0 becomes 0.

    After this v E is the gradient of the row's raw logits. One program per kept row.
    """
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    is_zero = tl.load(factors_ptr + index) == 0.0
    exponentials_ptr += row * stride_n
    for segment in range(num_segments):
        shift = tl.load(shifts_ptr + (first_segment + segment) * num_kept + index)
        if is_zero | (shift != 0.0):  # rare: offsets differ from 44 nats on
            cols = segment * SEGMENT + tl.arange(0, SEGMENT)
            e = tl.load(exponentials_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)
            # In two steps, each exact: a GPU's exp2 has no subnormal results.
            half = tl.exp2(0.5 * shift)
            # Select, not multiply: a row without a gradient may hold NaN, and a segment of nothing
            # but -inf may hold anything.
            e = tl.where(is_zero | (shift < -4 * COARSE), 0.0, e * half * half)
            e = e.to(exponentials_ptr.dtype.element_ty)
            tl.store(exponentials_ptr + cols, e, mask=cols < columns)
    column = tl.load(target_column_ptr + index) - first_segment * SEGMENT
    if (column >= 0) & (column < columns) & (is_zero == 0):
        at_target = tl.load(at_target_ptr + index).to(exponentials_ptr.dtype.element_ty)
        tl.debug_barrier()  # its segment may just have been written
        tl.store(exponentials_ptr + column, at_target)


# --- exponentials ------------------------------------------------------------------------------


class Exponentials:
    """Statistics of rows, and E of their logits until their gradients are made."""

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
        the head's) will take the place of E. memory: that of exponentials that are done with, to be
        used again."""
        self.x, self.head, self.token_ids = x, head, token_ids.contiguous()
        self.is_shared = is_shared
        self.head_rows = len(head.weight) if head_rows is None else head_rows
        shape = (len(x), *head.weight.shape)
        rows = self.head_rows
        self.columns = list(slab_sizes.slices(*shape, shared=is_shared, head_rows=rows))
        size = slab_sizes.kept_elements(*shape, shared=is_shared, head_rows=rows)
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
        """[S, STATES, N]; E is written."""
        parts = []
        for columns, e in zip(self.columns, self.slices, strict=True):
            segments = slice(columns.start, min(columns.stop, len(self.head.weight)))
            parts.append(linear_states(slabs, self.head, self.token_ids, segments, has_entropy, e))
        return torch.cat(parts)

    def head_gradient(self, dtype: torch.dtype) -> Tensor:
        """Memory [head_rows, H] for the dw of `gradients`: that of E where it is shared."""
        shape = (self.head_rows, self.head.weight.shape[1])
        if self.is_shared:
            return self.memory[: math.prod(shape)].view(shape)
        return self.memory.new_empty(shape, dtype=dtype)

    def gradients(
        self,
        kept: Tensor,
        c0: Tensor,
        lse_parts: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        *,
        add: bool = False,
    ) -> Tensor | None:
        """dx [K, H] in fp32 of the `kept` rows; dw [>= V, H] is written, or with `add` added to.

        Once only: it changes E. c0 [K] is 0 where a row of these has no gradient; lse_parts [3, K].
        Rows of dw from V on become 0.
        """
        factors = self.finish(kept, c0, lse_parts)
        x = self.x if len(kept) == len(self.x) else self.x[kept]
        scaled = torch.mul(x, factors[:, None], out=torch.empty_like(x))  # rounded once
        scaled.masked_fill_(factors[:, None] == 0, 0.0)  # such a row may hold NaN
        dx = factors.new_empty(x.shape) if needs_hidden else None
        with fp32_sums:
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

    def finish(self, kept: Tensor, c0: Tensor, lse_parts: Tensor) -> Tensor:
        """The factors v [K] that make E of the kept rows the gradient of their raw logits.

        Before, their segments are brought to one power of two per row, and p - 1 is put in the
        place of the token.
        """
        maximum, log_sum, _ = lse_parts
        some = slice(None) if len(kept) == len(self.x) else kept
        ids, target = self.token_ids[some], self.statistics[3, some]
        ids = torch.where(ids < len(self.head.weight), ids, -1)  # those that another shard owns
        # Rounded as in the kernel, so that rounding cancels: dz sums to 0 over the vocabulary.
        whole = (maximum * LOG2E.value).floor()
        fraction = (maximum.double() * LOG2E_FP32 - whole).float()
        offset = ((whole - BASE.value) / COARSE.value).floor() * COARSE.value + BASE.value
        size = fraction.exp2() * (whole - offset).exp2() * log_sum.exp()  # e^lse 2^-offset
        at_target = (target - maximum - log_sum).clamp(max=0).expm1() * size
        if self.head.softcap:
            owner = ids.clamp(min=0).div(slab_sizes.SEGMENT, rounding_mode="floor")
            slopes = self.slopes[:, some].gather(0, owner.clamp(max=len(self.slopes) - 1)[None])
            at_target = at_target * slopes.squeeze(0)
        shifts = self.offsets[:, some] - offset
        factors = c0 / size / self.head.temperature[some]
        factors = torch.where(c0 == 0, 0.0, factors)
        for columns, e in zip(self.columns, self.slices, strict=True):
            with torch.cuda.device_of(e):
                finish_exponentials_kernel[(len(kept),)](
                    e,
                    kept,
                    shifts,
                    ids,
                    at_target,
                    factors,
                    len(kept),
                    columns.start // slab_sizes.SEGMENT,
                    triton.cdiv(e.shape[1], slab_sizes.SEGMENT),
                    e.shape[1],
                    e.stride(0),
                    SEGMENT=slab_sizes.SEGMENT,
                    num_warps=NUM_WARPS,
                )
        return factors

    def parts(self, kept: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary rows, E [K, columns] of the kept rows), gathered where some are not kept."""
        vocab = len(self.head.weight)
        is_all = len(kept) == len(self.x)
        widest = self.columns[-1].stop if is_all else slab_sizes.SEGMENT
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
