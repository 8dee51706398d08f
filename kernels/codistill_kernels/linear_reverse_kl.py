"""KL divergence of two models at every token, over the whole vocabulary, from hidden states."""

import torch
from torch import Tensor

from codistill_kernels import _backends, _native
from codistill_kernels._checks import (
    require,
    require_device,
    require_float,
    require_mask,
    require_scaling,
    require_shape,
    require_tensor,
)
from codistill_kernels._head import compute_dtype
from codistill_kernels._linear_cpu import ROWS as CPU_ROWS
from codistill_kernels._linear_cpu import operand, operand_dtype
from codistill_kernels._linear_torch import matmul
from codistill_kernels._ops import custom_op, fake_of
from codistill_kernels._shards import require_plain, whole_head
from codistill_kernels._softmax_torch import statistics
from codistill_kernels._tokens import TokenShape

ROWS = {"cpu": CPU_ROWS, "torch": 128}  # at once; torch holds the logits of both models

# --- custom op ---------------------------------------------------------------------------------


@custom_op()
def reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: Tensor,
    backend: str,
) -> Tensor:
    """[N] sum_v p_s (log p_s - log p_t)"""
    chosen = _backends.choose(backend, student_hidden.device, student_hidden.dtype)
    if chosen == "triton":
        from codistill_kernels import _reverse_kl_triton

        return _reverse_kl_triton.reverse_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, temperature
        )
    out = torch.empty_like(temperature)
    student_weight, teacher_weight = student_weight.contiguous(), teacher_weight.contiguous()
    for first in range(0, len(out), ROWS[chosen]):
        rows = slice(first, first + ROWS[chosen])
        student, teacher = student_hidden[rows], teacher_hidden[rows]
        if chosen == "cpu":
            dtypes = operand_dtype(student, student_weight), operand_dtype(teacher, teacher_weight)
            common = torch.promote_types(*dtypes)
            _native.call(
                "reverse_kl",
                operand(student, common),
                student_weight,
                operand(teacher, common),
                teacher_weight,
                temperature[rows],
                out[rows],
            )
        else:
            out[rows] = divergence(
                matmul(student, student_weight.T, out.dtype) / temperature[rows, None],
                matmul(teacher, teacher_weight.T, out.dtype) / temperature[rows, None],
            )
    return out


@fake_of(reverse_kl)
def _(student_hidden, student_weight, teacher_hidden, teacher_weight, temperature, backend):
    return torch.empty_like(temperature)


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
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(student || teacher) of the next token, at every token, without either model's logits.

    out[n] = sum_v p[n, v] (log p[n, v] - log q[n, v])
    p = softmax_v(student_hidden @ student_weight.T / temperature), q likewise of the teacher

    Args:
        student, teacher: (hidden states [N, H] or [B, T, H], lm_head weight [V, H]), each with its
            own H and V; fp32, bf16, fp16 or fp64. A weight may be a DTensor that is replicated.
        mask: [N] or [B, T] bool; where False the result is 0, whatever the hidden states hold.
        temperature: divides the logits of both, > 0: a number, or a tensor [N] or [B, T].
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
    for name, model in (("student", student), ("teacher", teacher)):
        require_plain(name, model[0])
        require_tensor(name, model[1])
    student_hidden = student[0]
    is_known = student_hidden.ndim in (2, 3)
    expected = "([N, H] or [B, T, H], [V, H])"
    require(is_known, "student", expected, tuple(student_hidden.shape))
    shape = TokenShape(student_hidden.shape[:-1])
    student, teacher = (
        (shape.flat_states(name, hidden), whole_head(name, weight))
        for name, (hidden, weight) in (("student", student), ("teacher", teacher))
    )
    mask, temperature = shape.flat(mask=mask, temperature=temperature)
    vocab_size = check_inputs(student, teacher, mask, temperature, vocab_size)
    (student_hidden, student_weight), (teacher_hidden, teacher_weight) = (
        (hidden.detach(), weight.detach()[:vocab_size]) for hidden, weight in (student, teacher)
    )
    dtype = compute_dtype(student_hidden)
    device = student_hidden.device
    per_token = torch.as_tensor(temperature, dtype=dtype, device=device).detach()
    out = reverse_kl(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        per_token.expand(len(student_hidden)).contiguous(),
        backend,
    )
    return shape.rows(out if mask is None else torch.where(mask, out, 0.0))


def check_inputs(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor | None,
    temperature: float | Tensor,
    vocab_size: int | None,
) -> int:
    """vocab_size, resolved."""
    tokens = len(student[0])
    for name, (hidden, weight) in (("student", student), ("teacher", teacher)):
        require(hidden.ndim == 2, name, "([N, H], [V, H])", tuple(hidden.shape))
        require_shape(name, hidden, (tokens, hidden.shape[-1]), "([N, H], ...)")
        require(weight.ndim == 2, name, "([N, H], [V, H])", tuple(weight.shape))
        require_shape(name, weight, (len(weight), hidden.shape[-1]), "(..., [V, H])")
        for tensor in (hidden, weight):
            require_float(name, tensor)
            require_device(name, tensor, "student", student[0])
    require_mask(mask, tokens)
    require_scaling(temperature, None, (tokens,))
    common = min(len(student[1]), len(teacher[1]))
    vocab_size = common if vocab_size is None else vocab_size
    require(0 < vocab_size <= common, "vocab_size", f"in 1 .. {common}", vocab_size)
    return vocab_size
