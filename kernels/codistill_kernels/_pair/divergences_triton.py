"""Divergences of two models and their gradients by the student's logits in Triton.

The kinds are those of divergences.py. The logits of both models are in memory. Three passes over
them: states of the two softmaxes, sums of the terms, gradients. A program goes through one segment
of one row.

Letters: N rows (tokens), V columns of the logits here.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.softmax_triton import LOG2E, NUM_WARPS, divide
from codistill_kernels._pair.divergences import DIVERGENCES
from codistill_kernels._pair.reverse_kl_triton import (
    PAIR_STATES,
    load_logits,
    merge_segments,
    pair_states,
    positive,
    with_infinities,
)

# The sums of a segment: values and slopes of all tokens but one that has most of the student's
# mass, and log q of that one.
SUMS = 3

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]."""
    series = -1.0 / 5 * x + 1.0 / 4
    series = -series * x + 1.0 / 3
    series = -series * x + 1.0 / 2
    series = -series * x + 1.0
    return tl.where(x < 1.0 / 64, series * x, tl.log(1.0 + x))


@triton.jit
def terms_of(p, log_p, log_q, jsd_weight, log_odds, KIND: tl.constexpr):
    """Value and slope of each token, as in divergences.py. In the place of -inf is -1e30,
    which times 0 is 0."""
    if KIND == "reverse_kl":
        value = p * (log_p - log_q)
        slope = value
    elif KIND == "forward_kl":
        q = tl.exp2(log_q * LOG2E)
        value, slope = q * (log_q - log_p), -q
    else:
        tl.static_assert(KIND == "jsd")
        # log p/m + log(1 - w) and log q/m + log w, as sigmoids of the log odds of p in m.
        odds = log_p - log_q - log_odds
        tail = log1p(tl.exp2(-tl.abs(odds) * LOG2E))
        of_p = tl.where(odds < 0, odds, 0.0) - tail
        of_q = tl.where(odds > 0, -odds, 0.0) - tail
        slope = (1.0 - jsd_weight) * p * of_p
        weighted_q = jsd_weight * tl.exp2(log_q * LOG2E)
        value = weighted_q * (of_q - tl.log(jsd_weight))
        value += slope - (1.0 - jsd_weight) * p * tl.log(1.0 - jsd_weight)
    return value, slope


@triton.jit
def load_pair(
    student_ptr,  # [N, V] raw logits
    teacher_ptr,  # [N, V] raw logits
    student_temperature_ptr,  # [N]
    teacher_temperature_ptr,  # [N]
    pair_parts_ptr,  # [5, N]
    num_rows,
    columns,
    stride_n,
    student_softcap,
    teacher_softcap,
    row,
    cols,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    """log p, log q, whether a token has most of the student's mass, and dz / d raw logit."""
    temperature_s = tl.load(student_temperature_ptr + row)
    temperature_t = tl.load(teacher_temperature_ptr + row)
    at = pair_parts_ptr + row
    max_s, log_sum_s = tl.load(at), tl.load(at + num_rows)
    max_t, log_sum_t = tl.load(at + 2 * num_rows), tl.load(at + 3 * num_rows)
    rest = tl.load(at + 4 * num_rows)
    z_s, slope = load_logits(
        student_ptr, row, cols, columns, stride_n, student_softcap, temperature_s, STUDENT_SOFTCAP
    )
    z_t, _ = load_logits(
        teacher_ptr, row, cols, columns, stride_n, teacher_softcap, temperature_t, TEACHER_SOFTCAP
    )
    is_peak = z_s == tl.where(rest < 1.0, max_s, float("nan"))  # NaN: no token has
    slope = divide(slope, temperature_s)
    return z_s - max_s - log_sum_s, z_t - max_t - log_sum_t, is_peak, slope


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def pair_sums_kernel(
    student_ptr,  # [N, V] raw logits
    teacher_ptr,  # [N, V] raw logits
    student_temperature_ptr,  # [N]
    teacher_temperature_ptr,  # [N]
    pair_parts_ptr,  # [5, N]
    sums_ptr,  # [SUMS, N], written
    num_rows,
    columns,
    stride_n,
    student_softcap,
    teacher_softcap,
    jsd_weight,
    log_odds,
    KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Sums over one segment of the terms of the divergence and of their slopes, t_j.

    A token that has most of the student's mass is left out; its log q is given instead. One program
    per row.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, SEGMENT)
    log_p, log_q, is_peak, _ = load_pair(
        student_ptr,
        teacher_ptr,
        student_temperature_ptr,
        teacher_temperature_ptr,
        pair_parts_ptr,
        num_rows,
        columns,
        stride_n,
        student_softcap,
        teacher_softcap,
        row,
        cols,
        STUDENT_SOFTCAP,
        TEACHER_SOFTCAP,
    )
    value, slope = terms_of(tl.exp2(log_p * LOG2E), log_p, log_q, jsd_weight, log_odds, KIND)
    at = sums_ptr + row
    tl.store(at, tl.sum(tl.where(is_peak, 0.0, value), axis=0))
    tl.store(at + num_rows, tl.sum(tl.where(is_peak, 0.0, slope), axis=0))
    tl.store(at + 2 * num_rows, tl.sum(tl.where(is_peak, log_q, 0.0), axis=0))


@triton.jit(do_not_specialize=["num_rows"])
def pair_gradients_kernel(
    student_ptr,  # [N, V] raw logits, overwritten
    teacher_ptr,  # [N, V] raw logits
    student_temperature_ptr,  # [N]
    teacher_temperature_ptr,  # [N]
    pair_parts_ptr,  # [5, N]
    slopes_ptr,  # [3, N] sum_k t_k, dz of a token that has most of the mass, coefficient of the row
    num_rows,
    columns,
    stride_n,
    student_softcap,
    teacher_softcap,
    jsd_weight,
    log_odds,
    out_columns,
    KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """d / d raw logits of the student, in their place: coefficient (t_j - p_j sum_k t_k) dz/da.

    Columns from `columns` on become 0. One program per row.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, SEGMENT)
    log_p, log_q, is_peak, to_raw = load_pair(
        student_ptr,
        teacher_ptr,
        student_temperature_ptr,
        teacher_temperature_ptr,
        pair_parts_ptr,
        num_rows,
        columns,
        stride_n,
        student_softcap,
        teacher_softcap,
        row,
        cols,
        STUDENT_SOFTCAP,
        TEACHER_SOFTCAP,
    )
    total, at_peak = tl.load(slopes_ptr + row), tl.load(slopes_ptr + num_rows + row)
    coefficient = tl.load(slopes_ptr + 2 * num_rows + row)
    p = tl.exp2(log_p * LOG2E)
    _, slope = terms_of(p, log_p, log_q, jsd_weight, log_odds, KIND)
    dz = tl.where(is_peak, at_peak, slope - p * total) * (coefficient * to_raw)
    tl.debug_barrier()  # in place: all have loaded before one stores
    tl.store(student_ptr + row * stride_n + cols, dz, mask=cols < out_columns)


# --- launchers ---------------------------------------------------------------------------------


def divergences(
    raw_p: Tensor,
    raw_q: Tensor,
    student: Head,
    teacher: Head,
    kind: str,
    jsd_weight: float,
    coefficients: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`divergences.divergences` in Triton; out is None or raw_p itself."""
    assert out is None or out is raw_p
    segments = list(slab_sizes.pieces(raw_p.shape[1], slab_sizes.SEGMENT))
    states = raw_p.new_empty((len(segments), PAIR_STATES, len(raw_p)))
    sums = raw_p.new_empty((len(segments), SUMS, len(raw_p)))
    scaling = (student.temperature, teacher.temperature), (student.softcap, teacher.softcap)
    for part, columns in zip(states, segments, strict=True):
        pair_states(raw_p[:, columns], raw_q[:, columns], *scaling[0], *scaling[1], part)
    pair_parts = pair_parts_of(states)
    weights = jsd_weight, math.log(jsd_weight) - math.log1p(-jsd_weight)

    def launch(kernel, columns: slice, sums_or_slopes: Tensor, *sizes: int) -> None:
        logits = raw_p[:, columns], raw_q[:, columns]
        place = len(raw_p), logits[0].shape[1], raw_p.stride(0)
        kernel[(len(raw_p),)](
            *logits,
            *scaling[0],
            pair_parts,
            sums_or_slopes,
            *place,
            *scaling[1],
            *weights,
            *sizes,
            KIND=kind,
            STUDENT_SOFTCAP=student.softcap != 0,
            TEACHER_SOFTCAP=teacher.softcap != 0,
            SEGMENT=slab_sizes.SEGMENT,
            num_warps=NUM_WARPS,
        )

    with torch.cuda.device_of(raw_p):
        for part, columns in zip(sums, segments, strict=True):
            launch(pair_sums_kernel, columns, part)
        values, slopes = of_row(sums.sum(0), pair_parts, kind, jsd_weight)
        if out is not None:
            factor = torch.ones_like(values) if coefficients is None else coefficients
            slopes = torch.stack((*slopes, factor))
            for columns in segments:
                width = slab_sizes.padded_columns(columns.stop - columns.start)
                launch(pair_gradients_kernel, columns, slopes, width)
    return positive(values)


def of_row(
    sums: Tensor, pair_parts: Tensor, kind: str, jsd_weight: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Values [N]; and the sum of the slopes and dz of a token that has most of the mass, [N]."""
    value, others, log_q = sums
    _, log_sum, *_, rest = pair_parts
    # That token by itself, in the form that keeps the digits of the difference of two sure models.
    terms = DIVERGENCES[kind](-log_sum, log_q, jsd_weight)
    of_peak, slope = (torch.where(rest >= 1, 0.0, term) for term in terms)
    return value + of_peak, (others + slope, (rest * slope - others) / (1 + rest))


def pair_parts_of(states: Tensor) -> Tensor:
    """[5, N]: max and log sum exp(z - max) of the student, the same two of the teacher, and the
    student's sum exp(z - max) without the term 1 of one maximum."""
    max_s, rest_s, max_t, rest_t, _ = states.unbind(1)
    student, rest = merge_segments(with_infinities(max_s), rest_s)
    teacher, teacher_rest = merge_segments(with_infinities(max_t), rest_t)
    return torch.stack((student, rest.log1p(), teacher, teacher_rest.log1p(), rest))
