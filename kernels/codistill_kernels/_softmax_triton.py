"""Softmax states and gradients in Triton, and the kernels on logits that are in memory.

The state of a row over some vocabulary rows is that of `_softmax_torch`: max m of its logits z,
rest of sum exp(z - m) (without the term 1 of one maximum), sum exp(z - m) (z - m), target logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels._tiles import BLOCK_COLUMNS

FAR = tl.constexpr(-1e4)  # exp of it is 0; a shifted logit of -inf would give 0 * inf
NUM_WARPS = 4

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """a / b with one Newton step on the approximate quotient. Triton's `/` is 2 ulp off, and its
    exact division takes more registers in a tile's epilogue than the tile."""
    inverse = 1.0 / b
    quotient = a * inverse
    better = tl.fma(tl.fma(-quotient, b, a), inverse, quotient)
    return tl.where(tl.abs(quotient) == float("inf"), quotient, better)


@triton.jit
def expm1(x):
    """For x <= 0."""
    series = 1.0 / 40320 * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    series = series * x * x + x
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    size = divide(-e, e + 2.0)
    return tl.where(x < 0, -size, size)


@triton.jit
def scale(raw, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Raw logits a = x . w + bias -> logits z."""
    z = raw
    if HAS_SOFTCAP:
        z = softcap * tanh(divide(raw, softcap))
    return divide(z, temperature)


@triton.jit
def tile_sum(z):
    """Max [N] and rest [N] of logits [N, V], the exponentials and the shifted logits [N, V]."""
    maximum = tl.max(z, axis=1)
    # A tile of nothing but -inf is empty, not NaN; but NaN, which max may not see, stays.
    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    shifted = z - base[:, None]
    p = tl.exp(shifted)
    is_max = z == maximum[:, None]
    rest = tl.sum(tl.where(is_max, 0.0, p), axis=1)
    ties = tl.sum(is_max.to(tl.float32), axis=1) - 1.0
    rest += tl.where(maximum == -float("inf"), 0.0, ties)
    return maximum, rest, p, shifted


@triton.jit
def distance(maximum, new_maximum):
    """maximum - new_maximum, 0 where both are -inf."""
    return tl.where(maximum == new_maximum, 0.0, maximum - new_maximum)


@triton.jit
def merge_sums(max_a, rest_a, max_b, rest_b):
    """Max and rest of two disjoint ranges; either may be empty (max = -inf)."""
    maximum = tl.maximum(max_a, max_b)
    a_is_high = max_a >= max_b
    low, low_rest = tl.where(a_is_high, max_b, max_a), tl.where(a_is_high, rest_b, rest_a)
    high_rest = tl.where(a_is_high, rest_a, rest_b)
    factor = tl.where(low == -float("inf"), 0.0, tl.exp(distance(low, maximum)))
    return maximum, high_rest + factor * (1.0 + low_rest)


@triton.jit
def merge_weighted(maximum, max_a, rest_a, weighted_a):
    """What a range adds to sum exp(z - maximum) (z - maximum)."""
    shift = distance(max_a, maximum)
    factor = tl.where(max_a == -float("inf"), 0.0, tl.exp(shift))
    inside = tl.where(factor == 0.0, 0.0, shift) * (1.0 + rest_a) + weighted_a
    return factor * inside


@triton.jit
def merge_tile(maximum, rest, weighted, z):
    """The state of a range, and one more tile of logits [N, V]."""
    tile_max, tile_rest, p, shifted = tile_sum(z)
    tile_weighted = tl.sum(p * tl.where(shifted < FAR, 0.0, shifted), axis=1)
    new_max, new_rest = merge_sums(maximum, rest, tile_max, tile_rest)
    new_weighted = merge_weighted(new_max, maximum, rest, weighted)
    new_weighted += merge_weighted(new_max, tile_max, tile_rest, tile_weighted)
    return new_max, new_rest, new_weighted


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def logit_statistics_kernel(
    logits_ptr,
    token_ids_ptr,
    temperature_ptr,
    out_ptr,
    num_rows,
    vocab_size,
    stride_n,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target_column = tl.load(token_ids_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    maximum = tl.full([1], -float("inf"), tl.float32)
    rest = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1], tl.float32)
    target = tl.zeros([1], tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask_v = cols < vocab_size
        raw = tl.load(logits_ptr + row * stride_n + cols, mask=mask_v, other=0.0).to(tl.float32)
        z = scale(raw, softcap, temperature, HAS_SOFTCAP)
        target += tl.sum(tl.where(cols == target_column, z, 0.0))
        z = tl.where(mask_v, z, -float("inf"))[None, :]
        maximum, rest, weighted = merge_tile(maximum, rest, weighted, z)
    at = out_ptr + row + tl.arange(0, 1)
    tl.store(at, maximum)
    tl.store(at + num_rows, rest)
    tl.store(at + 2 * num_rows, weighted)
    tl.store(at + 3 * num_rows, target)


@triton.jit(do_not_specialize=["num_rows"])
def logit_gradients_kernel(
    raw_ptr,
    out_ptr,
    at_target_ptr,
    token_ids_ptr,
    temperature_ptr,
    coefficients_ptr,
    log_softmax_ptr,
    num_rows,
    vocab_size,
    num_columns,
    stride_raw_n,
    stride_out_n,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT_TARGET: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = cols < vocab_size
    c0 = tl.load(coefficients_ptr + row)
    c1 = tl.load(coefficients_ptr + num_rows + row)
    c2 = tl.load(coefficients_ptr + 2 * num_rows + row)
    maximum = tl.load(log_softmax_ptr + row)
    log_sum = tl.load(log_softmax_ptr + num_rows + row)
    mean = tl.load(log_softmax_ptr + 2 * num_rows + row)
    temperature = tl.load(temperature_ptr + row)
    target_column = tl.load(token_ids_ptr + row)
    raw = tl.load(raw_ptr + row * stride_raw_n + cols, mask=mask_v, other=0.0).to(tl.float32)
    shifted = scale(raw, softcap, temperature, HAS_SOFTCAP) - maximum
    shifted = tl.where(shifted < FAR, FAR, shifted)
    logp = shifted - log_sum
    p = tl.exp(logp)
    dz = p * (c0 + c2 * (shifted - mean))
    # c0 p_y - c1 loses all digits where p_y is near 1 and c0 = c1: expm1 keeps them.
    dz_target = c0 * expm1(tl.minimum(logp, 0.0)) + (c0 - c1) + c2 * p * (shifted - mean)
    is_target = cols == target_column
    dz = tl.where(is_target, dz_target, dz)
    if HAS_SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(divide(raw, softcap)))
        dz *= 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2 without its cancellation
    dz = divide(dz, temperature)
    # Select: a row without a gradient may hold NaN.
    dz = tl.where(tl.abs(c0) + tl.abs(c1) + tl.abs(c2) > 0.0, dz, 0.0)
    dz = tl.where(mask_v, dz, 0.0)
    if SPLIT_TARGET:
        tl.store(at_target_ptr + row + 0 * cols, dz, mask=is_target & mask_v)
        dz = tl.where(is_target, 0.0, dz)
    out = out_ptr + row * stride_out_n + cols
    tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=cols < num_columns)


# --- launchers ---------------------------------------------------------------------------------


def logit_statistics(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, softcap: float, vocab_size: int
) -> Tensor:
    """[4, N] of raw logits [N, V], rows of stride 1 in V."""
    out = torch.empty((4, len(logits)), dtype=torch.float32, device=logits.device)
    if len(logits):
        logit_statistics_kernel[(len(logits),)](
            logits,
            token_ids.contiguous(),
            temperature.contiguous(),
            out,
            len(logits),
            vocab_size,
            logits.stride(0),
            softcap,
            HAS_SOFTCAP=softcap != 0,
            BLOCK_V=BLOCK_COLUMNS,
            num_warps=NUM_WARPS,
        )
    return out


def logit_gradients(
    raw: Tensor,
    out: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    coefficients: Tensor,
    log_softmax: Tensor,
    at_target: Tensor | None = None,
) -> None:
    """out [N, V] = d / d raw, in the dtype of `out`, which may be `raw`; 0 from vocab_size on.

    at_target: [N], takes the target's entries unrounded, which are 0 in `out` then.
    """
    if not out.numel():
        return
    logit_gradients_kernel[(len(raw), triton.cdiv(out.shape[1], BLOCK_COLUMNS))](
        raw,
        out,
        out if at_target is None else at_target,
        token_ids.contiguous(),
        temperature.contiguous(),
        coefficients.contiguous(),
        log_softmax.contiguous(),
        len(raw),
        vocab_size,
        out.shape[1],
        raw.stride(0),
        out.stride(0),
        softcap,
        HAS_SOFTCAP=softcap != 0,
        SPLIT_TARGET=at_target is not None,
        BLOCK_V=BLOCK_COLUMNS,
        num_warps=NUM_WARPS,
    )
