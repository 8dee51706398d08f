"""KL divergence of two models in Triton, from hidden states and heads, without their logits.

The product of each model goes into a slab of its own; one pass over both slabs makes the states of
the two softmaxes and of what relates them.

Letters: N rows (tokens), V columns of the logits here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.products import as_operands
from codistill_kernels._linear.slab_sizes import pieces
from codistill_kernels._linear.slabs import Slabs
from codistill_kernels._linear.softmax_triton import BANNED, LOG2E, NUM_WARPS, load_raw, scale
from codistill_kernels._pair.reverse_kl import Model

# The state of a segment is max and rest of the student, then of the teacher, and the weighted
# difference sum exp(z_s - max_s) ((z_s - max_s) - (z_t - max_t)).
PAIR_STATES = 5

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def exponentials(z):
    """max, rest of sum exp(z - max) (without the term 1 of one maximum), exp(z - max), z - max."""
    maximum = tl.max(z, axis=0)
    shifted = z - maximum
    e = tl.exp2(shifted * LOG2E)
    rest = tl.sum(e, axis=0) - 1.0
    if rest < 0.01:  # one maximum, and few digits of the others left
        rest = tl.sum(tl.where(shifted == 0.0, 0.0, e), axis=0)
    return maximum, rest, e, shifted


@triton.jit
def load_logits(
    raw_ptr,  # [N, V]
    row,
    cols,
    columns,
    stride_n,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits z of a row, and the slope of the softcap."""
    raw = load_raw(raw_ptr + row * stride_n, raw_ptr, cols, columns, False)
    return scale(raw, cols < columns, softcap, temperature, HAS_SOFTCAP)


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def pair_states_kernel(
    student_ptr,  # [N, V] raw logits
    teacher_ptr,  # [N, V] raw logits
    student_temperature_ptr,  # [N]
    teacher_temperature_ptr,  # [N]
    states_ptr,  # [PAIR_STATES, N], written
    num_rows,
    columns,
    stride_n,
    student_softcap,
    teacher_softcap,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """State of one segment of one row of both models, for KL(student || teacher), where

    KL = E_p[z_s - z_t] - lse_s + lse_t. One program per row.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, SEGMENT)
    temperature_s = tl.load(student_temperature_ptr + row)
    temperature_t = tl.load(teacher_temperature_ptr + row)
    z_s, _ = load_logits(
        student_ptr, row, cols, columns, stride_n, student_softcap, temperature_s, STUDENT_SOFTCAP
    )
    z_t, _ = load_logits(
        teacher_ptr, row, cols, columns, stride_n, teacher_softcap, temperature_t, TEACHER_SOFTCAP
    )
    max_s, rest_s, p_s, shifted_s = exponentials(z_s)
    max_t, rest_t, _, shifted_t = exponentials(z_t)
    at = states_ptr + row
    tl.store(at, max_s)
    tl.store(at + num_rows, rest_s)
    tl.store(at + 2 * num_rows, max_t)
    tl.store(at + 3 * num_rows, rest_t)
    tl.store(at + 4 * num_rows, tl.sum(p_s * (shifted_s - shifted_t), axis=0))


# --- launchers ---------------------------------------------------------------------------------


def reverse_kl(student: Model, teacher: Model) -> Tensor:
    """[N] KL(student || teacher), nats; both weights have the same number of rows."""
    slabs_s, slabs_t = (Slabs(*as_operands(*model[:2])) for model in (student, teacher))
    (*_, temperature_s, softcap_s), (*_, temperature_t, softcap_t) = student, teacher
    rows = len(temperature_s)
    segments = list(pieces(len(student[1]), slab_sizes.SEGMENT))
    states = temperature_s.new_empty((len(segments), PAIR_STATES, rows))
    for number, columns in enumerate(segments):
        for (part, slab), (_, other) in zip(slabs_s.of(columns), slabs_t.of(columns), strict=True):
            scaling = temperature_s[part], temperature_t[part], softcap_s, softcap_t
            pair_states(slab, other, *scaling, states[number, :, part])
    return divergence(states)


def pair_states(
    student: Tensor,
    teacher: Tensor,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    student_softcap: float,
    teacher_softcap: float,
    states: Tensor,
) -> None:
    """Write the states [PAIR_STATES, R] of raw logits [R, columns], which have the same strides."""
    assert student.stride() == teacher.stride()
    with torch.cuda.device_of(student):
        pair_states_kernel[(len(student),)](
            student,
            teacher,
            student_temperature,
            teacher_temperature,
            states,
            states.stride(0),
            student.shape[1],
            student.stride(0),
            student_softcap,
            teacher_softcap,
            STUDENT_SOFTCAP=student_softcap != 0,
            TEACHER_SOFTCAP=teacher_softcap != 0,
            SEGMENT=slab_sizes.SEGMENT,
            num_warps=NUM_WARPS,
        )


def divergence(states: Tensor) -> Tensor:
    """[N] KL(student || teacher) from the states [segments, PAIR_STATES, N] of the whole
    vocabulary."""
    max_s, rest_s, max_t, rest_t, difference = states.unbind(1)
    max_s, max_t = with_infinities(max_s), with_infinities(max_t)
    student, student_rest = merge_segments(max_s, rest_s)
    teacher, teacher_rest = merge_segments(max_t, rest_t)
    shift = max_s - student
    factor = shift.exp()
    parts = factor * (difference + (shift - (max_t - teacher)) * (1 + rest_s))
    kl = torch.where(factor == 0, 0.0, parts).sum(0) / (1 + student_rest)
    return positive(kl - student_rest.log1p() + teacher_rest.log1p())


def with_infinities(maxima: Tensor) -> Tensor:
    """-inf where a maximum stands for it."""
    return torch.where(maxima < BANNED.value, -torch.inf, maxima)


def positive(divergences: Tensor) -> Tensor:
    """Divergences without the numbers below 0 that rounding makes; NaN stays.

    Where one model rules a token out and the other does not, 1e30 stood for infinity.
    """
    return torch.where(divergences > 1e20, torch.inf, divergences.clamp(min=0))


def merge_segments(maxima: Tensor, rests: Tensor) -> tuple[Tensor, Tensor]:
    """Max and rest [N] from those of the segments [segments, N]."""
    largest, at = maxima.max(dim=0, keepdim=True)
    factor = (maxima - largest).exp()
    # The segment that holds the maximum adds its rest alone: 1 + rest - 1 would round it.
    parts = (factor * (1 + rests)).scatter(0, at, rests.gather(0, at))
    return largest.squeeze(0), parts.sum(0)
