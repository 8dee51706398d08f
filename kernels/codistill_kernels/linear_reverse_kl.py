"""KL divergence of two models at every token, over the whole vocabulary, from hidden states."""

import torch
from torch import Tensor

from codistill_kernels import _backends, _native
from codistill_kernels._linear_cpu import ROWS as CPU_ROWS
from codistill_kernels._linear_cpu import operand, operand_dtype
from codistill_kernels._linear_torch import matmul
from codistill_kernels._ops import custom_op, fake_of
from codistill_kernels._pair_inputs import Scaling, Softcap, prepare_pair
from codistill_kernels._softmax_torch import scale, statistics

ROWS = {"cpu": CPU_ROWS, "torch": 128}  # at once; torch holds the logits of both models

# --- custom op ---------------------------------------------------------------------------------


@custom_op()
def reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_temperature: Tensor,
    student_softcap: float,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_temperature: Tensor,
    teacher_softcap: float,
    backend: str,
) -> Tensor:
    """[N] sum_v p_s (log p_s - log p_t)"""
    student = (student_hidden, student_weight, student_temperature, student_softcap)
    teacher = (teacher_hidden, teacher_weight, teacher_temperature, teacher_softcap)
    chosen = _backends.choose(backend, student_hidden.device, student_hidden.dtype)
    if chosen == "triton":
        from codistill_kernels import _reverse_kl_triton

        return _reverse_kl_triton.reverse_kl(student, teacher)
    out = torch.empty_like(student_temperature)
    of_rows = {"cpu": of_rows_cpu, "torch": of_rows_torch}[chosen]
    for first in range(0, len(out), ROWS[chosen]):
        rows = slice(first, first + ROWS[chosen])
        out[rows] = of_rows(
            *(
                (hidden[rows], weight.contiguous(), temperature[rows], softcap)
                for hidden, weight, temperature, softcap in (student, teacher)
            )
        )
    return out


@fake_of(reverse_kl)
def _(
    student_hidden,
    student_weight,
    student_temperature,
    student_softcap,
    teacher_hidden,
    teacher_weight,
    teacher_temperature,
    teacher_softcap,
    backend,
):
    return torch.empty_like(student_temperature)


Rows = tuple[Tensor, Tensor, Tensor, float]
"""Hidden states, weight, temperature, softcap."""


def of_rows_cpu(student: Rows, teacher: Rows) -> Tensor:
    common = torch.promote_types(*(operand_dtype(*model[:2]) for model in (student, teacher)))
    (x_s, *others_s), (x_t, *others_t) = student, teacher
    out = torch.empty(len(x_s), dtype=torch.float32)
    _native.call(
        "reverse_kl", operand(x_s, common), *others_s, operand(x_t, common), *others_t, out
    )
    return out


def of_rows_torch(student: Rows, teacher: Rows) -> Tensor:
    dtype = student[2].dtype
    return divergence(
        *(
            scale(matmul(hidden, weight.T, dtype), temperature, softcap)
            for hidden, weight, temperature, softcap in (student, teacher)
        )
    )


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) [R] of logits [R, V], with the digits of peaked rows."""
    none = torch.full(student.shape[:1], -1, dtype=torch.int64, device=student.device)
    (max_s, rest_s, *_), (max_t, rest_t, *_) = (statistics(z, none) for z in (student, teacher))
    student, teacher = student - max_s[:, None], teacher - max_t[:, None]
    p = student.exp()
    difference = torch.where(p > 0, p * (student - teacher), 0.0).sum(dim=1)
    kl = difference / (1 + rest_s) - rest_s.log1p() + rest_t.log1p()
    return kl.clamp(min=0)  # rounding; NaN stays


# --- public function ---------------------------------------------------------------------------


def linear_reverse_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: Softcap = None,
    logit_scale: Scaling = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(student || teacher) of the next token, at every token, without either model's logits.

    out[n] = sum_v p[n, v] (log p[n, v] - log q[n, v])
    p = softmax_v(student_hidden @ student_weight.T / temperature), q likewise of the teacher

    A reward: it has no gradient. `linear_divergence` is its differentiable twin.

    Args:
        student, teacher: (hidden states [N, H] or [B, T, H], lm_head weight [V, H]), each with its
            own H and V; fp32, bf16, fp16 or fp64. A weight may be a DTensor that is replicated.
        mask: [N] or [B, T] bool; where False the result is 0, whatever the hidden states hold.
        temperature: divides the logits of both, > 0: a number, or a tensor [N] or [B, T].
        softcap, logit_scale: as in `linear_logps`; each one number for both models, or (the
            student's, the teacher's).
        vocab_size: the vocabulary both have; weight rows from here on are outside both softmaxes.
            None: as many rows as both weights have.
        backend: "auto", "triton", "cpu" (C++) or "torch". auto: triton on a GPU, cpu on the CPU.

    Returns:
        [N] or [B, T] fp32 (fp64 for fp64 students), nats, >= 0, detached: it is a reward.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names it.

    Memory besides the inputs: two tiles of logits a thread (cpu) or program (triton), or two chunks
    of 128 rows (torch).
    Source: the divergence that Eq. 6 estimates from sampled tokens. Definition:
    codistill_kernels.reference.linear_reverse_kl.
    """
    inputs = prepare_pair(
        student,
        teacher,
        mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        takes_bias=False,
    )
    parts: list[Tensor | float] = []
    for model in (inputs.student, inputs.teacher):
        head = model.head
        weight = head.weight.detach()[: inputs.vocab]
        parts += [model.hidden_states.detach(), weight, head.temperature, head.softcap]
    out = reverse_kl(*parts, backend)
    mask = inputs.mask
    return inputs.shape.rows(out if mask is None else torch.where(mask, out, 0.0))
