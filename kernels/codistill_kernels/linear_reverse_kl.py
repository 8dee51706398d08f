"""KL divergence of two models at every token, over the whole vocabulary, from hidden states."""

import torch
from torch import Tensor

from codistill_kernels import _backends
from codistill_kernels._ops import custom_op, fake_of
from codistill_kernels._pair.inputs import Scaling, Softcap, prepare_pair
from codistill_kernels._pair.reverse_kl import reverse_kl as pair_reverse_kl

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
    """[N] sum_v p (log p - log q), p of the student and q of the teacher, over all rows of the
    weights."""
    student = (student_hidden, student_weight, student_temperature, student_softcap)
    teacher = (teacher_hidden, teacher_weight, teacher_temperature, teacher_softcap)
    chosen = _backends.choose(backend, student_hidden.device, student_hidden.dtype)
    if chosen == "triton":
        from codistill_kernels._pair import reverse_kl_triton

        return reverse_kl_triton.reverse_kl(student, teacher)
    return pair_reverse_kl(student, teacher, chosen)


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

    It is a reward and has no gradient. `linear_divergence` is its differentiable twin.

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

    Memory besides the inputs: two tiles of logits per thread (cpu), two slabs of 128 MiB (triton),
    or two chunks of 128 rows (torch).
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
