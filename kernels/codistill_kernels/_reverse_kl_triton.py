"""KL divergence of two models in Triton, from hidden states and heads, without their logits.

Two products, of either hidden size, go into two accumulators of one program; one epilogue takes the
states of both softmaxes and what relates them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels._linear_triton import (
    as_operands,
    blocks_of,
    descriptor,
    fits_tma,
    halves,
    merge_splits,
    my_tiles,
    num_splits,
    product_tile,
)
from codistill_kernels._softmax_triton import distance, divide, merge_sums, tile_sum
from codistill_kernels._tiles import PAIR_TILES, tile_for

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def merged_difference(new_max_s, new_max_t, max_s, rest_s, max_t, difference):
    """What a range adds to sum exp(z_s - new_max_s) ((z_s - new_max_s) - (z_t - new_max_t))."""
    shift = distance(max_s, new_max_s)
    apart = shift - distance(max_t, new_max_t)
    factor = tl.where(max_s == -float("inf"), 0.0, tl.exp(shift))
    return tl.where(factor == 0.0, 0.0, factor * (difference + apart * (1.0 + rest_s)))


@triton.jit
def merge_pair(max_s, rest_s, max_t, rest_t, difference, z_s, z_t):
    """The states of both models over a range, and one more tile of their logits [N, V]."""
    tile_max_s, tile_rest_s, p_s, far_s = tile_sum(z_s)
    tile_max_t, tile_rest_t, _, far_t = tile_sum(z_t)
    tile_difference = tl.sum(tl.where(p_s == 0.0, 0.0, p_s * (far_s - far_t)), axis=1)
    new_max_s, new_rest_s = merge_sums(max_s, rest_s, tile_max_s, tile_rest_s)
    new_max_t, new_rest_t = merge_sums(max_t, rest_t, tile_max_t, tile_rest_t)
    new_difference = merged_difference(
        new_max_s, new_max_t, max_s, rest_s, max_t, difference
    ) + merged_difference(
        new_max_s, new_max_t, tile_max_s, tile_rest_s, tile_max_t, tile_difference
    )
    return new_max_s, new_rest_s, new_max_t, new_rest_t, new_difference


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def reverse_kl_kernel(
    x_s,
    weight_s,
    x_t,
    weight_t,
    temperature_ptr,
    states_ptr,
    num_rows,
    vocab_size,
    hidden_s,
    hidden_t,
    num_splits,
    stride_xsn,
    stride_wsv,
    stride_xtn,
    stride_wtv,
    USE_TMA: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Two products, of either hidden size, into two accumulators; one epilogue."""
    tile_n, split = my_tiles(num_rows, num_splits, GROUP_N, BLOCK_N)
    first_n = tile_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    temperature = tl.load(temperature_ptr + offs_n, mask=mask_n, other=1.0)
    max_s = tl.full([BLOCK_N], -float("inf"), tl.float32)
    max_t = tl.full([BLOCK_N], -float("inf"), tl.float32)
    rest_s = tl.zeros([BLOCK_N], tl.float32)
    rest_t = tl.zeros([BLOCK_N], tl.float32)
    difference = tl.zeros([BLOCK_N], tl.float32)
    start = split * (TILES_PER_SPLIT * BLOCK_V)
    stop = tl.minimum(start + TILES_PER_SPLIT * BLOCK_V, vocab_size)
    for first_v in range(start, stop, BLOCK_V):
        z_s = product_tile(
            x_s,
            weight_s,
            first_n,
            first_v,
            num_rows,
            vocab_size,
            hidden_s,
            stride_xsn,
            stride_wsv,
            USE_TMA,
            BLOCK_N,
            BLOCK_V,
            BLOCK_H,
        )
        z_t = product_tile(
            x_t,
            weight_t,
            first_n,
            first_v,
            num_rows,
            vocab_size,
            hidden_t,
            stride_xtn,
            stride_wtv,
            USE_TMA,
            BLOCK_N,
            BLOCK_V,
            BLOCK_H,
        )
        left_s, right_s = halves(z_s, BLOCK_N, BLOCK_V)
        left_t, right_t = halves(z_t, BLOCK_N, BLOCK_V)
        for half in tl.static_range(2):
            part_s, part_t = (left_s, left_t) if half == 0 else (right_s, right_t)
            local_v = first_v + half * (BLOCK_V // 2) + tl.arange(0, BLOCK_V // 2)
            mask_v = (local_v < vocab_size)[None, :]
            part_s = tl.where(mask_v, divide(part_s, temperature[:, None]), -float("inf"))
            part_t = tl.where(mask_v, divide(part_t, temperature[:, None]), -float("inf"))
            max_s, rest_s, max_t, rest_t, difference = merge_pair(
                max_s, rest_s, max_t, rest_t, difference, part_s, part_t
            )
    # states: [5, splits, N]
    at = states_ptr + split.to(tl.int64) * num_rows + offs_n
    part = num_splits.to(tl.int64) * num_rows
    tl.store(at, max_s, mask=mask_n)
    tl.store(at + part, rest_s, mask=mask_n)
    tl.store(at + 2 * part, max_t, mask=mask_n)
    tl.store(at + 3 * part, rest_t, mask=mask_n)
    tl.store(at + 4 * part, difference, mask=mask_n)


# --- launchers ---------------------------------------------------------------------------------


def reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: Tensor,
) -> Tensor:
    """[N] KL(student || teacher), nats; both weights have the same number of rows."""
    x_s, weight_s = as_operands(student_hidden, student_weight)
    x_t, weight_t = as_operands(teacher_hidden, teacher_weight)
    if x_s.dtype != x_t.dtype:
        x_s, weight_s, x_t, weight_t = (t.float() for t in (x_s, weight_s, x_t, weight_t))
    rows, vocab = len(x_s), len(weight_s)
    tile = tile_for(PAIR_TILES, x_s.device, x_s.dtype)
    splits = num_splits(vocab, tile)
    states = torch.empty((5, splits, rows), dtype=torch.float32, device=x_s.device)
    operands = (x_s, weight_s, x_t, weight_t)
    use_tma = fits_tma(*operands)
    if not rows:
        return states.new_empty(0)
    heights = (tile.block_n, tile.block_v) * 2
    reverse_kl_kernel[(triton.cdiv(rows, tile.block_n) * splits,)](
        *(
            descriptor(t, height, tile.block_h) if use_tma else t
            for t, height in zip(operands, heights, strict=True)
        ),
        temperature.contiguous(),
        states,
        rows,
        vocab,
        x_s.shape[1],
        x_t.shape[1],
        splits,
        *(t.stride(0) for t in operands),
        USE_TMA=use_tma,
        **blocks_of(tile),
    )
    return divergence_of_splits(states)


def divergence_of_splits(states: Tensor) -> Tensor:
    """[N] from the states [5, splits, N] of disjoint ranges."""
    max_s, rest_s, max_t, rest_t, difference = states
    zero = torch.zeros_like(max_s)
    student = merge_splits(torch.stack((max_s, rest_s, zero, zero)))
    teacher = merge_splits(torch.stack((max_t, rest_t, zero, zero)))
    shift = max_s - student[0]
    apart = shift - (max_t - teacher[0])
    factor = shift.exp()
    parts = torch.where(factor > 0, factor * (difference + apart * (1 + rest_s)), 0.0)
    kl = parts.sum(0) / (1 + student[1]) - student[1].log1p() + teacher[1].log1p()
    return kl.clamp(min=0)  # rounding; NaN stays
