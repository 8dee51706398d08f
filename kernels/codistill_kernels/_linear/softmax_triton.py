"""Softmax of logits that are in memory, in Triton: states of segments, gradients.

A program goes through one segment of one row, which it holds in registers. `merge_states` merges
the states of a row's segments into its statistics (chunks.py).

Letters: N rows (tokens), V columns of the logits here, S segments of SEGMENT columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels._linear import slab_sizes

# Stands for -inf: far enough below every logit to make no difference, and 0 times it is 0.
LOWEST = tl.constexpr(-1e30)
BANNED = tl.constexpr(-1e20)  # a logit below this stands for -inf, at any temperature
LOG2E = tl.constexpr(1.4426950408889634)
# Exponents of exponentials that are kept: a segment's largest lies in 0 .. COARSE, which leaves 126
# below and room for sums above. In most rows all segments have offset BASE, as long as their
# largest logits are between -2.7 and 41.5 nats.
COARSE, BASE = tl.constexpr(64), tl.constexpr(-4)
NUM_WARPS = 8
# The state of a segment: its max m, sum exp(z - m) without the token's term, sum exp(z - m) (z - m)
# (0 where no entropy is wanted), the token's logit, the slope of the softcap there, and the offset
# k of its exponentials. Numbers that nobody reads are not written.
STATES = 6
MERGED_ROWS = 32  # rows whose states one program merges

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """a / b of finite numbers, with one Newton step on the approximate quotient: Triton's `/` alone
    is off by 2 ulp."""
    inverse = 1.0 / b
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0."""
    series = 1.0 / 40320 * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    series = series * x * x + x
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def softcapped(raw, softcap):
    """softcap tanh(raw / softcap) and its slope, which 1 - tanh^2 would round to 0 early."""
    x = tl.abs(divide(raw, softcap))
    e = tl.exp2(x * (-2.0 * LOG2E))
    twice = divide(2.0, 1.0 + e)
    series = -1.0 / 315 * x + 4.0 / 315  # of (1 - e) / 2, which cancels near 0
    series = series * x - 2.0 / 45
    series = series * x + 2.0 / 15
    series = series * x - 1.0 / 3
    series = series * x + 2.0 / 3
    series = series * x - 1.0
    series = series * x * x + x
    # Near the limit 1 minus a small part, rounded once: a low temperature magnifies each ulp.
    tanh = tl.where(x < 0.25, series * twice, tl.fma(-e, twice, 1.0))
    return tl.where(raw < 0, -softcap, softcap) * tanh, e * twice * twice


@triton.jit
def load_raw(
    logits_ptr,  # [V] x . w of one row
    bias_ptr,  # [V]
    cols,
    columns,
    HAS_BIAS: tl.constexpr,
):
    """Raw logits a = x . w + bias of these columns, LOWEST from `columns` on and where they are
    -inf."""
    mask = cols < columns
    raw = tl.load(logits_ptr + cols, mask=mask, other=LOWEST).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + cols, mask=mask, other=0.0)
    return tl.maximum(raw, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale(raw, inside, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Logits z = softcap tanh(raw / softcap) / temperature, and the slope of the softcap."""
    z, slope = raw, 1.0
    if HAS_SOFTCAP:
        finite = tl.minimum(raw, -LOWEST, propagate_nan=tl.PropagateNan.ALL)
        z, slope = softcapped(finite, softcap)
        z = tl.where(inside, z, LOWEST)
    return divide(z, temperature), slope


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "first_column"])
def segment_states_kernel(
    logits_ptr,  # [N, >= V] x . w
    bias_ptr,  # [V]
    token_ids_ptr,  # [N] int64
    temperature_ptr,  # [N]
    states_ptr,  # [S, STATES, N], written
    exponentials_ptr,  # [N, >= V], written with KEEP
    num_rows,
    columns,
    first_column,  # vocabulary row of the first column
    exponential_columns,
    stride_n,
    stride_en,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    STATES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """State of one segment of one row of z = softcap tanh((x . w + bias) / softcap) / temperature.

    With KEEP also E_j = 2^(z_j log2e - k) times the slope of the softcap at j, where k is BASE plus
    a multiple of COARSE, at most the largest exponent of the segment. One program per row and
    segment.
    """
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = segment * SEGMENT + tl.arange(0, SEGMENT)
    logits_ptr += row * stride_n
    bias_ptr += first_column // 16 * 16  # first_column, so that Triton knows it as aligned
    temperature = tl.load(temperature_ptr + row)
    target_column = tl.load(token_ids_ptr + row).to(tl.int32) - first_column
    raw = load_raw(logits_ptr, bias_ptr, cols, columns, HAS_BIAS)
    z, slope = scale(raw, cols < columns, softcap, temperature, HAS_SOFTCAP)
    maximum = tl.max(z, axis=0)
    shifted = z - maximum
    e = tl.exp2(shifted * LOG2E)
    local_target = target_column - segment * SEGMENT
    is_target = tl.arange(0, SEGMENT) == local_target
    at = states_ptr + segment.to(tl.int64) * STATES * num_rows + row
    tl.store(at, maximum)
    # Without the target, whose term may be nearly all of the sum: the small rest keeps its digits.
    tl.store(at + num_rows, tl.sum(tl.where(is_target, 0.0, e), axis=0))
    tl.store(at + 2 * num_rows, tl.sum(e * shifted, axis=0) if HAS_ENTROPY else 0.0)
    if (local_target >= 0) & (local_target < SEGMENT) & (target_column < columns):
        raw_target = load_raw(logits_ptr, bias_ptr, target_column, columns, HAS_BIAS)
        target, target_slope = scale(raw_target, True, softcap, temperature, HAS_SOFTCAP)
        tl.store(at + 3 * num_rows, target)
        if HAS_SOFTCAP:
            tl.store(at + 4 * num_rows, target_slope)
    if KEEP:
        # 2^(whole + fraction - offset): the launcher computes the same whole part again.
        whole = tl.floor(maximum * LOG2E)
        fraction = tl.fma(maximum, LOG2E, -whole)
        offset = tl.floor((whole - BASE) * (1 / COARSE)) * COARSE + BASE
        tl.store(at + 5 * num_rows, offset)
        e *= tl.exp2(fraction) * tl.exp2(whole - offset)
        e *= slope
        out = exponentials_ptr + row * stride_en + cols
        tl.store(out, e.to(exponentials_ptr.dtype.element_ty), mask=cols < exponential_columns)


@triton.jit(do_not_specialize=["num_rows", "num_segments", "vocab"])
def merge_states_kernel(
    states_ptr,  # [S, STATES, N]
    token_ids_ptr,  # [N] int64
    out_ptr,  # [4, N], written
    num_rows,
    num_segments,
    vocab,
    STATES: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Statistics of whole rows from the states of their segments: with m = max_s m_s,

    sum exp(z - m) = sum_s exp(m_s - m) sum_s, and likewise of the weighted sums. One program per
    BLOCK_N rows.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    target_column = tl.load(token_ids_ptr + offs_n, mask=mask_n, other=-1)
    # Tokens that another shard owns may have numbers from `vocab` on.
    is_here = (target_column >= 0) & (target_column < vocab)
    owner = tl.where(is_here, target_column // SEGMENT, -1)
    maximum = tl.full([BLOCK_N], -float("inf"), tl.float32)
    at = states_ptr + offs_n
    for _ in range(num_segments):
        part = tl.load(at, mask=mask_n, other=0.0)
        maximum = tl.maximum(maximum, part, propagate_nan=tl.PropagateNan.ALL)
        at += STATES * num_rows
    others = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    target_term = tl.zeros([BLOCK_N], tl.float32)
    at = states_ptr + offs_n
    for segment in range(num_segments):
        part_max = tl.load(at, mask=mask_n, other=0.0)
        total = tl.load(at + num_rows, mask=mask_n, other=0.0)
        part_weighted = tl.load(at + 2 * num_rows, mask=mask_n, other=0.0)
        is_owner = owner == segment
        z = tl.load(at + 3 * num_rows, mask=mask_n & is_owner, other=0.0)
        term = tl.where(is_owner, tl.exp(z - part_max), 0.0)
        shift = part_max - maximum
        factor = tl.exp(shift)
        others += factor * total
        target_term += factor * term
        inside = factor * (part_weighted + shift * (total + term))
        weighted += tl.where(factor == 0.0, 0.0, inside)  # shift may be too large to multiply
        target += z
        at += STATES * num_rows
    # Without the term of the maximum: exactly, where the target is the maximum.
    is_maximum = is_here & (target == maximum)
    rest = tl.maximum(others + target_term - 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = out_ptr + offs_n
    tl.store(out, tl.where(maximum < BANNED, -float("inf"), maximum), mask=mask_n)
    tl.store(out + num_rows, tl.where(is_maximum, others, rest), mask=mask_n)
    tl.store(out + 2 * num_rows, weighted, mask=mask_n)
    tl.store(out + 3 * num_rows, tl.where(target < BANNED, -float("inf"), target), mask=mask_n)


@triton.jit(do_not_specialize=["num_rows", "first_column"])
def logit_gradients_kernel(
    logits_ptr,  # [N, >= V] x . w
    bias_ptr,  # [V]
    out_ptr,  # [N, >= V], written; may be logits_ptr
    token_ids_ptr,  # [N] int64
    temperature_ptr,  # [N]
    coefficients_ptr,  # [3, N] c0, c1, c2
    lse_parts_ptr,  # [3, N] max, log sum exp(z - max), E_p[z - max] of the whole vocabulary
    num_rows,
    columns,
    first_column,  # vocabulary row of the first column
    out_columns,
    stride_n,
    stride_out_n,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """out_j = dz_j dz/da of raw logits a, where

    dz_j = c0 p_j - c1 [j = token] + c2 p_j (z_j - E_p z)

    Columns from `columns` on become 0. One program per row and segment.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    logits_ptr += row * stride_n
    bias_ptr += first_column // 16 * 16  # first_column, so that Triton knows it as aligned
    temperature = tl.load(temperature_ptr + row)
    c0 = divide(tl.load(coefficients_ptr + row), temperature)
    c1 = divide(tl.load(coefficients_ptr + num_rows + row), temperature)
    c2 = divide(tl.load(coefficients_ptr + 2 * num_rows + row), temperature)
    # A row without a gradient may hold NaN: it is not looked at.
    has_gradient = (c0 != 0.0) | (c1 != 0.0) | (c2 != 0.0)  # of NaN too
    columns = tl.where(has_gradient, columns, 0)
    maximum = tl.where(has_gradient, tl.load(lse_parts_ptr + row), 0.0)
    log_sum = tl.where(has_gradient, tl.load(lse_parts_ptr + num_rows + row), 0.0)
    mean = tl.where(has_gradient, tl.load(lse_parts_ptr + 2 * num_rows + row), 0.0)
    target_column = tl.load(token_ids_ptr + row).to(tl.int32) - first_column
    raw = load_raw(logits_ptr, bias_ptr, cols, columns, HAS_BIAS)
    z, slope = scale(raw, cols < columns, softcap, temperature, HAS_SOFTCAP)
    shifted = z - maximum
    dz = tl.exp2((shifted - log_sum) * LOG2E) * (c0 + c2 * (shifted - mean))
    is_owner = (target_column >= 0) & (target_column < columns)
    target_column = tl.where(is_owner, target_column, -1)
    target_columns = tl.where(is_owner, columns, 0)
    raw_target = load_raw(logits_ptr, bias_ptr, target_column, target_columns, HAS_BIAS)
    z_target, _ = scale(raw_target, is_owner, softcap, temperature, HAS_SOFTCAP)
    shifted_target = z_target - maximum
    logp = tl.minimum(shifted_target - log_sum, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # c0 p_y - c1 loses all digits where p_y is near 1 and c0 = c1: expm1 keeps them.
    entropy_part = c2 * tl.exp(logp) * (shifted_target - mean)
    at_target = c0 * expm1(logp) + (c0 - c1) + entropy_part
    dz = tl.where(cols == target_column, at_target, dz) * slope
    tl.debug_barrier()  # in place: all have loaded before one stores
    out = out_ptr + row * stride_out_n + cols
    tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=cols < out_columns)


# --- launchers ---------------------------------------------------------------------------------
# Triton launches on the current device, wherever the arguments are: hence device_of.


def segment_states(
    logits: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    columns: int,
    first_column: int,
    states: Tensor,
    has_entropy: bool,
    exponentials: Tensor | None = None,
) -> None:
    """Write states [S, STATES, N] of raw logits [N, >= columns], and exponentials [N, >= columns].

    The first column is vocabulary row `first_column`; states have rows of stride 1.
    """
    rows, segments = len(logits), states.shape[0]
    if not rows:
        return
    with torch.cuda.device_of(logits):
        segment_states_kernel[(rows, segments)](
            logits,
            states if bias is None else bias,
            token_ids,
            temperature,
            states,
            states if exponentials is None else exponentials,
            states.stride(1),
            columns,
            first_column,
            0 if exponentials is None else exponentials.shape[1],
            logits.stride(0),
            0 if exponentials is None else exponentials.stride(0),
            softcap,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0,
            HAS_ENTROPY=has_entropy,
            KEEP=exponentials is not None,
            STATES=STATES,
            SEGMENT=slab_sizes.SEGMENT,
            num_warps=NUM_WARPS,
        )


def merge_states(states: Tensor, token_ids: Tensor, vocab: int) -> Tensor:
    """Statistics [4, N] from the states [S, STATES, N] of all `vocab` vocabulary rows here."""
    segments, _, rows = states.shape
    out = states.new_empty((4, rows))
    if rows:
        with torch.cuda.device_of(states):
            merge_states_kernel[(triton.cdiv(rows, MERGED_ROWS),)](
                states,
                token_ids,
                out,
                rows,
                segments,
                vocab,
                STATES=STATES,
                SEGMENT=slab_sizes.SEGMENT,
                BLOCK_N=MERGED_ROWS,
                num_warps=1,
            )
    return out


def logit_statistics(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    has_entropy: bool,
) -> Tensor:
    """Statistics [4, N] of the first vocab_size columns of raw logits [N, V], of stride 1 in V."""
    segments = triton.cdiv(vocab_size, slab_sizes.SEGMENT)
    shape = (segments, STATES, len(logits))
    states = torch.empty(shape, dtype=torch.float32, device=logits.device)
    ids, temperature = token_ids.contiguous(), temperature.contiguous()
    segment_states(logits, None, ids, temperature, softcap, vocab_size, 0, states, has_entropy)
    return merge_states(states, ids, vocab_size)


def logit_gradients(
    logits: Tensor,
    out: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    columns: int,
    first_column: int,
    coefficients: Tensor,
    lse_parts: Tensor,
) -> None:
    """out [N, >= columns] = d / d raw logits, in the dtype of `out`, which may be `logits`.

    Columns from `columns` on become 0. coefficients and lse_parts [3, N] have rows of stride 1, and
    the same strides.
    """
    if not out.numel():
        return
    assert coefficients.stride() == lse_parts.stride()
    with torch.cuda.device_of(logits):
        logit_gradients_kernel[(len(logits), triton.cdiv(out.shape[1], slab_sizes.SEGMENT))](
            logits,
            coefficients if bias is None else bias,
            out,
            token_ids,
            temperature,
            coefficients,
            lse_parts,
            coefficients.stride(0),
            columns,
            first_column,
            out.shape[1],
            logits.stride(0),
            out.stride(0),
            softcap,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0,
            SEGMENT=slab_sizes.SEGMENT,
            num_warps=NUM_WARPS,
        )
