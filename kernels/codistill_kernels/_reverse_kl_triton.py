"""KL divergence of two models in Triton, from hidden states and heads, without their logits.

Each model's product goes into a slab of its own; one pass over both takes the states of the two
softmaxes and what relates them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill_kernels import _slabs
from codistill_kernels._products import as_operands
from codistill_kernels._products_triton import Slabs
from codistill_kernels._slabs import pieces
from codistill_kernels._softmax_triton import BANNED, LOG2E, NUM_WARPS, divide, load_raw

STATES = 5  # of a segment: max and rest of the student, of the teacher, weighted difference

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def exponentials(z):
    """Max, rest of sum exp(z - max) (without the term 1 of one maximum), exp(z - max), z - max."""
    maximum = tl.max(z, axis=0)
    shifted = z - maximum
    e = tl.exp2(shifted * LOG2E)
    rest = tl.sum(e, axis=0) - 1.0
    if rest < 0.01:  # one maximum, and few digits of the others left
        rest = tl.sum(tl.where(shifted == 0.0, 0.0, e), axis=0)
    return maximum, rest, e, shifted


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def pair_states_kernel(
    student_ptr,
    teacher_ptr,
    temperature_ptr,
    states_ptr,
    num_rows,
    columns,
    stride_n,
    SEGMENT: tl.constexpr,
):
    """states [STATES, num_rows] of the logits of both models, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, SEGMENT)
    temperature = tl.load(temperature_ptr + row)
    raw_s = load_raw(student_ptr + row * stride_n, student_ptr, cols, columns, False)
    raw_t = load_raw(teacher_ptr + row * stride_n, teacher_ptr, cols, columns, False)
    max_s, rest_s, p_s, shifted_s = exponentials(divide(raw_s, temperature))
    max_t, rest_t, _, shifted_t = exponentials(divide(raw_t, temperature))
    at = states_ptr + row
    tl.store(at, max_s)
    tl.store(at + num_rows, rest_s)
    tl.store(at + 2 * num_rows, max_t)
    tl.store(at + 3 * num_rows, rest_t)
    tl.store(at + 4 * num_rows, tl.sum(p_s * (shifted_s - shifted_t), axis=0))


# --- launchers ---------------------------------------------------------------------------------


def reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: Tensor,
) -> Tensor:
    """[N] KL(student || teacher), nats; both weights have the same number of rows."""
    student = Slabs(*as_operands(student_hidden, student_weight))
    teacher = Slabs(*as_operands(teacher_hidden, teacher_weight))
    temperature = temperature.contiguous()
    segments = list(pieces(len(student_weight), _slabs.SEGMENT))
    shape = (len(segments), STATES, len(temperature))
    states = torch.empty(shape, dtype=torch.float32, device=temperature.device)
    for number, columns in enumerate(segments):
        for (rows, slab), (_, other) in zip(student.of(columns), teacher.of(columns), strict=True):
            with torch.cuda.device_of(slab):
                pair_states_kernel[(len(slab),)](
                    slab,
                    other,
                    temperature[rows],
                    states[number, :, rows],
                    len(temperature),
                    slab.shape[1],
                    slab.stride(0),
                    SEGMENT=_slabs.SEGMENT,
                    num_warps=NUM_WARPS,
                )
    return divergence(states)


def divergence(states: Tensor) -> Tensor:
    """[N] from the states [segments, STATES, N] of the whole vocabulary."""
    max_s, rest_s, max_t, rest_t, difference = states.unbind(1)
    max_s, max_t = (torch.where(t < BANNED.value, -torch.inf, t) for t in (max_s, max_t))
    student, student_rest = merge_segments(max_s, rest_s)
    teacher, teacher_rest = merge_segments(max_t, rest_t)
    shift = max_s - student
    factor = shift.exp()
    parts = factor * (difference + (shift - (max_t - teacher)) * (1 + rest_s))
    kl = torch.where(factor == 0, 0.0, parts).sum(0) / (1 + student_rest)
    kl = kl - student_rest.log1p() + teacher_rest.log1p()
    # A token that the teacher rules out and the student does not: 1e30 stood for infinity.
    return torch.where(kl > 1e20, torch.inf, kl.clamp(min=0))  # below 0: rounding; NaN stays


def merge_segments(maxima: Tensor, rests: Tensor) -> tuple[Tensor, Tensor]:
    """Max and rest [N] from those of segments [segments, N]."""
    largest, at = maxima.max(dim=0, keepdim=True)
    factor = (maxima - largest).exp()
    # Of the segment that holds the maximum only the rest: 1 + rest - 1 would round it.
    parts = (factor * (1 + rests)).scatter(0, at, rests.gather(0, at))
    return largest.squeeze(0), parts.sum(0)
