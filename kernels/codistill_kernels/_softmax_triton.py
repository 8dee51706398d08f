"""Softmax of logits that are in memory, in Triton: states of segments, gradients.

A program goes through one segment of one row, which it holds in registers. `merge_segments` makes
of the segments' states the statistics that `_softmax_torch` describes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels import _slabs

# In the place of -inf: as large as makes no difference, and 0 times it is 0. NaN stays NaN.
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
COARSE = tl.constexpr(128)  # of exponents: no segment's offset differs while |z| < 44 nats
NUM_WARPS = 8
# Of a segment: max, sum without the target, weighted sum, target logit, slope of the softcap there,
# offset k of its exponentials. Those of a target are unset where it is elsewhere.
STATES = 6

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """a / b of finite numbers with one Newton step on the approximate quotient. Triton's `/` is
    2 ulp off."""
    inverse = 1.0 / b
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


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
def softcapped(raw, softcap):
    """softcap tanh(raw / softcap) and its slope, which 1 - tanh^2 would round to 0 early."""
    x = tl.abs(divide(raw, softcap))
    e = expm1(-2.0 * x)
    inverse = divide(1.0, e + 2.0)
    size = softcap * -e * inverse
    return tl.where(raw < 0, -size, size), 4.0 * tl.exp(-2.0 * x) * inverse * inverse


@triton.jit
def load_raw(logits_ptr, bias_ptr, cols, columns, HAS_BIAS: tl.constexpr):
    """Raw logits a = x . w + bias of a row, LOWEST outside and in the place of -inf."""
    mask = cols < columns
    raw = tl.load(logits_ptr + cols, mask=mask, other=LOWEST).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + cols, mask=mask, other=0.0)
    return tl.maximum(raw, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale(raw, inside, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Raw logits -> logits z, and the slope of the softcap."""
    z, slope = raw, 1.0
    if HAS_SOFTCAP:
        finite = tl.minimum(raw, -LOWEST, propagate_nan=tl.PropagateNan.ALL)
        z, slope = softcapped(finite, softcap)
        z = tl.where(inside, z, LOWEST)
    return divide(z, temperature), slope


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "first_column"])
def segment_states_kernel(
    logits_ptr,
    bias_ptr,
    token_ids_ptr,
    temperature_ptr,
    states_ptr,
    exponentials_ptr,
    num_rows,
    columns,
    first_column,
    exponential_columns,
    stride_n,
    stride_en,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    STATES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """states [segments, STATES, num_rows]; with KEEP, exponentials 2^(z log2e - k) times the slope
    of the softcap, where k is the segment's largest exponent to the nearest COARSE."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = segment * SEGMENT + tl.arange(0, SEGMENT)
    logits_ptr += row * stride_n
    bias_ptr += first_column // 16 * 16  # no change: Triton sees that accesses of 16 bytes fit
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
    # Without the target, whose term may be all but the rest: lse keeps the digits of the rest.
    tl.store(at + num_rows, tl.sum(tl.where(is_target, 0.0, e), axis=0))
    tl.store(at + 2 * num_rows, tl.sum(e * shifted, axis=0))
    if (local_target >= 0) & (local_target < SEGMENT):
        raw_target = load_raw(logits_ptr, bias_ptr, target_column, columns, HAS_BIAS)
        inside = target_column < columns
        target, target_slope = scale(raw_target, inside, softcap, temperature, HAS_SOFTCAP)
        tl.store(at + 3 * num_rows, target)
        tl.store(at + 4 * num_rows, target_slope)
    if KEEP:
        exponent = maximum * LOG2E
        offset = tl.floor(exponent / COARSE + 0.5) * COARSE
        tl.store(at + 5 * num_rows, offset)
        e *= tl.exp2(exponent - offset)
        e *= slope
        out = exponentials_ptr + row * stride_en + cols
        tl.store(out, e.to(exponentials_ptr.dtype.element_ty), mask=cols < exponential_columns)


@triton.jit(do_not_specialize=["num_rows", "first_column"])
def logit_gradients_kernel(
    logits_ptr,
    bias_ptr,
    out_ptr,
    token_ids_ptr,
    temperature_ptr,
    coefficients_ptr,
    log_softmax_ptr,
    num_rows,
    columns,
    first_column,
    out_columns,
    stride_n,
    stride_out_n,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """out = d / d raw logits; 0 from `columns` on. May be in place."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    logits_ptr += row * stride_n
    bias_ptr += first_column // 16 * 16  # no change: Triton sees that accesses of 16 bytes fit
    temperature = tl.load(temperature_ptr + row)
    c0 = divide(tl.load(coefficients_ptr + row), temperature)
    c1 = divide(tl.load(coefficients_ptr + num_rows + row), temperature)
    c2 = divide(tl.load(coefficients_ptr + 2 * num_rows + row), temperature)
    # A row without a gradient may hold NaN: it is not looked at.
    has_gradient = tl.abs(c0) + tl.abs(c1) + tl.abs(c2) > 0.0
    columns = tl.where(has_gradient, columns, 0)
    maximum = tl.where(has_gradient, tl.load(log_softmax_ptr + row), 0.0)
    log_sum = tl.where(has_gradient, tl.load(log_softmax_ptr + num_rows + row), 0.0)
    mean = tl.where(has_gradient, tl.load(log_softmax_ptr + 2 * num_rows + row), 0.0)
    target_column = tl.load(token_ids_ptr + row).to(tl.int32) - first_column
    raw = load_raw(logits_ptr, bias_ptr, cols, columns, HAS_BIAS)
    z, slope = scale(raw, cols < columns, softcap, temperature, HAS_SOFTCAP)
    shifted = z - maximum
    dz = tl.exp2((shifted - log_sum) * LOG2E) * (c0 + c2 * (shifted - mean))
    is_owner = (target_column >= 0) & (target_column < columns)
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


def segment_states(
    logits: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    columns: int,
    first_column: int,
    states: Tensor,
    exponentials: Tensor | None = None,
) -> None:
    """Of raw logits [N, >= columns], whose first column is vocabulary row `first_column`, into
    states [segments, STATES, N] (rows of stride 1), and the exponentials [N, >= columns]."""
    rows, segments = len(logits), states.shape[0]
    if not rows:
        return
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
        KEEP=exponentials is not None,
        STATES=STATES,
        SEGMENT=_slabs.SEGMENT,
        num_warps=NUM_WARPS,
    )


def merge_segments(states: Tensor, token_ids: Tensor) -> Tensor:
    """Statistics [4, N] from the states [segments, STATES, N] of all vocabulary rows here."""
    maxima, totals, weighted, targets, _, _ = states.unbind(1)
    maxima, targets = (torch.where(t < -1e29, -torch.inf, t) for t in (maxima, targets))
    largest = maxima.amax(dim=0)
    # A row of nothing but -inf: its terms are 0, and -inf - -inf would be NaN.
    shift = maxima - torch.where(largest == -torch.inf, 0.0, largest)
    factor = shift.exp()
    total = (factor * totals).sum(dim=0)
    owner = token_ids.div(_slabs.SEGMENT, rounding_mode="floor")
    is_owner = owner == torch.arange(len(states), device=states.device)[:, None]
    target = torch.where(is_owner, targets, 0.0).sum(dim=0)
    # `totals` are without the target.
    is_owner &= targets > -torch.inf
    target_term = torch.where(is_owner, (targets - maxima).exp(), 0.0)
    inside = torch.where(factor > 0, shift * (totals + target_term) + weighted, 0.0)
    # Without the term of the maximum, exactly where that is the target.
    others = total + (factor * target_term).sum(dim=0) - 1
    rest = torch.where(is_owner.any(dim=0) & (target == largest), total, others.clamp(min=0))
    return torch.stack((largest, rest, (factor * inside).sum(dim=0), target))


def logit_statistics(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, softcap: float, vocab_size: int
) -> Tensor:
    """[4, N] of raw logits [N, V], rows of stride 1 in V."""
    segments = triton.cdiv(vocab_size, _slabs.SEGMENT)
    shape = (segments, STATES, len(logits))
    states = torch.empty(shape, dtype=torch.float32, device=logits.device)
    ids, temperature = token_ids.contiguous(), temperature.contiguous()
    segment_states(logits, None, ids, temperature, softcap, vocab_size, 0, states)
    return merge_segments(states, ids)


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
    log_softmax: Tensor,
) -> None:
    """out [N, >= columns] = d / d raw logits, in the dtype of `out`, which may be `logits`; 0 from
    `columns` on. coefficients and log_softmax [3, N]: rows of stride 1, of one stride."""
    if not out.numel():
        return
    assert coefficients.stride() == log_softmax.stride()
    logit_gradients_kernel[(len(logits), triton.cdiv(out.shape[1], _slabs.SEGMENT))](
        logits,
        coefficients if bias is None else bias,
        out,
        token_ids,
        temperature,
        coefficients,
        log_softmax,
        coefficients.stride(0),
        columns,
        first_column,
        out.shape[1],
        logits.stride(0),
        out.stride(0),
        softcap,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0,
        SEGMENT=_slabs.SEGMENT,
        num_warps=NUM_WARPS,
    )
