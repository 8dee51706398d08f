"""Divergence of a student from a teacher over the whole vocabulary, from both models' hidden
states: the loss of on-policy distillation."""

from typing import Literal

import torch
from torch import Tensor

from codistill_kernels import _backends
from codistill_kernels._autograd import first_order_only, refuse_transforms
from codistill_kernels._checks import require, require_normalizer
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.inputs import require_workspace
from codistill_kernels._linear.planning import workspace_bytes
from codistill_kernels._ops import custom_op, fake_of
from codistill_kernels._pair.chunks import divergences_by_chunks
from codistill_kernels._pair.divergences import DIVERGENCES
from codistill_kernels._pair.inputs import Model, ModelInputs, Scaling, Softcap, prepare_pair
from codistill_kernels._scaling import divisor, with_gradients

# --- custom op ---------------------------------------------------------------------------------


@custom_op()
def divergence_gradients(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    student_temperature: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    teacher_temperature: Tensor,
    mask: Tensor,
    softcaps: list[float],
    vocab_size: int,
    kind: str,
    jsd_weight: float,
    coefficients: Tensor | None,
    needs: list[bool],
    workspace_mib: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergences [N], 0 where masked, and the gradients of their sum, each times its coefficient.

    Rows of coefficient 0 are left out. An empty tensor stands for each gradient that is not needed.
    """
    chosen = _backends.choose(backend, student_hidden.device, student_hidden.dtype)
    kept = mask if coefficients is None else mask & (coefficients != 0)
    values, gradients = divergences_by_chunks(
        ModelInputs(
            student_hidden, Head(student_weight, student_bias, student_temperature, softcaps[0])
        ),
        ModelInputs(
            teacher_hidden, Head(teacher_weight, teacher_bias, teacher_temperature, softcaps[1])
        ),
        vocab_size,
        kept.nonzero().squeeze(1),
        kind,
        jsd_weight,
        coefficients,
        needs,
        chosen,
        # The default is for the logits of two models.
        workspace_bytes(workspace_mib, student_hidden.device, 2 * vocab_size),
    )
    dx, dw, db = (values.new_empty(0) if g is None else g for g in gradients)
    return values, dx, dw, db


@fake_of(divergence_gradients)
def _(
    student_hidden,
    student_weight,
    student_bias,
    student_temperature,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    teacher_temperature,
    mask,
    softcaps,
    vocab_size,
    kind,
    jsd_weight,
    coefficients,
    needs,
    workspace_mib,
    backend,
):
    shapes = (student_hidden.shape, student_weight.shape, student_weight.shape[:1])
    return (
        torch.empty_like(student_temperature),
        *(
            student_temperature.new_empty(shape if need else 0)
            for shape, need in zip(shapes, needs, strict=True)
        ),
    )


# --- autograd ----------------------------------------------------------------------------------


class Divergences(torch.autograd.Function):
    """Divergences [N], whose gradients come from logits that the backward pass computes again.

    Takes the arguments of `divergence_gradients` without coefficients and needs.
    """

    @staticmethod
    def forward(ctx, *arguments):
        tensors, ctx.settings, ctx.options = arguments[:9], arguments[9:13], arguments[13:]
        ctx.save_for_backward(*tensors)
        values, *_ = divergence_gradients(*tensors, *ctx.settings, None, [False] * 3, *ctx.options)
        return values

    @staticmethod
    @first_order_only("linear_divergence")
    def backward(ctx, dvalues):
        tensors, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        _, *gradients = divergence_gradients(
            *tensors, *ctx.settings, dvalues.contiguous(), needs, *ctx.options
        )
        gradients = [
            gradient.to(leaf.dtype) if need else None
            for gradient, leaf, need in zip(gradients, tensors[:3], needs, strict=True)
        ]
        return *gradients, *[None] * (len(ctx.needs_input_grad) - 3)


# --- public function ---------------------------------------------------------------------------


def linear_divergence(
    student: Model,
    teacher: Model,
    mask: Tensor | None = None,
    *,
    kind: str = "reverse_kl",
    jsd_weight: float = 0.5,
    normalizer: float | Tensor = 1.0,
    reduction: Literal["sum", "none"] = "sum",
    temperature: float | Tensor = 1.0,
    softcap: Softcap = None,
    logit_scale: Scaling = 1.0,
    vocab_size: int | None = None,
    workspace_mib: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of a student from a teacher over the whole vocabulary, token by token, with its
    gradient by the student, without the [N, V] logits of either.

    p = softmax_v(student_hidden @ student_weight.T / temperature), q likewise of the teacher
    reverse_kl: D[n] = sum_v p (log p - log q)
    forward_kl: D[n] = sum_v q (log q - log p)
    jsd: D[n] = w KL(q || m) + (1 - w) KL(p || m) with m = w q + (1 - w) p, w = jsd_weight
    loss = (1/normalizer) sum over unmasked tokens n of D[n]

    One pass over chunks of tokens: logits of both models, divergence and gradient while they are
    there. 6 N H V operations of the student and 2 N H V of the teacher.

    Args:
        student, teacher: (hidden states [N, H] or [B, T, H], lm_head weight [V, H]), or with the
            head's bias [V] or None as the third, each with its own H and V; fp32, bf16, fp16 or
            fp64. The student's are differentiable; the teacher gets no gradient. A weight may be a
            DTensor that is replicated, not one in shards.
        mask: [N] or [B, T] bool; what is False counts nothing, whatever the hidden states hold.
        kind: "reverse_kl" (seeks the teacher's mode; MiniLLM, on-policy distillation), "forward_kl"
            (covers all of the teacher; on fixed data, plain distillation) or "jsd" (between them).
        jsd_weight: in (0, 1), of "jsd" alone: beta of GKD and TRL. Their 0 and 1 are "forward_kl"
            and "reverse_kl".
        normalizer: a number or a scalar tensor, >= 0, such as the tokens of all micro-batches and
            processes; 0 only where nothing is left to divide.
        reduction: "sum", or "none": D [N] or [B, T] itself, 0 where masked, not normalized; its
            backward pass makes the logits again, 8 N H V of the student and 4 of the teacher.
        temperature: divides the logits of both, > 0: a number, or a tensor [N] or [B, T].
        softcap, logit_scale: as in `linear_logps`; each one number for both models, or (the
            student's, the teacher's).
        vocab_size: the vocabulary both have; weight rows from here on are outside both softmaxes.
            None: as many rows as both weights have.
        workspace_mib: memory that the logits of both models may take, 64 tokens' at least. None:
            256 tokens' or 128 MiB on a CPU, 2560 MiB or half of what is free on a GPU.
        backend: "auto", "triton", "cpu" (products in C++, PyTorch between them) or "torch". auto:
            triton on a GPU, cpu on the CPU.

    Returns:
        (loss, {"divergence": [N] or [B, T], "tokens": scalar}), fp32 (fp64 for fp64 students),
        nats, >= 0; the statistics are detached.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names it.

    Memory besides the inputs: the workspace, on cpu and torch some 8 MiB blocks of rows, and the
    gradients of the student, its head's summed in fp32.
    Source: reverse KL, Gu et al. 2024 (arXiv:2306.08543); jsd, generalized JSD of Agarwal et al.
    2024 (arXiv:2306.13649), Eq. 1. Definition: codistill_kernels.reference.linear_divergence.
    """
    require(kind in DIVERGENCES, "kind", f"one of {', '.join(DIVERGENCES)}", repr(kind))
    is_jsd = kind == "jsd"
    expected = "in (0, 1); the ends are kinds forward_kl and reverse_kl"
    require(0 < jsd_weight < 1, "jsd_weight", expected, jsd_weight)
    require(is_jsd or jsd_weight == 0.5, "jsd_weight", f"left out with {kind!r}", jsd_weight)
    require(reduction in ("sum", "none"), "reduction", "sum or none", repr(reduction))
    require_normalizer(normalizer)
    require_workspace(workspace_mib)
    inputs = prepare_pair(
        student,
        teacher,
        mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        takes_bias=True,
    )
    leaves = inputs.student.tensors()[:3]
    refuse_transforms("linear_divergence", *leaves, *inputs.teacher.tensors()[:3])
    keep = inputs.mask
    if keep is None:
        keep = torch.ones_like(inputs.student.head.temperature, dtype=torch.bool)
    softcaps = [model.head.softcap for model in (inputs.student, inputs.teacher)]
    tensors = (*inputs.student.tensors(), *inputs.teacher.tensors(), keep)
    settings, options = (softcaps, inputs.vocab, kind, jsd_weight), (workspace_mib, backend)
    if reduction == "none":
        loss = values = Divergences.apply(*tensors, *settings, *options)
    else:
        has_gradient = torch.is_grad_enabled()
        needs = [has_gradient and t is not None and t.requires_grad for t in leaves]
        with torch.no_grad():
            values, *gradients = divergence_gradients(*tensors, *settings, None, needs, *options)
        loss = values.sum()
        if any(needs):
            loss = with_gradients(leaves, loss, gradients, 1.0, None)
        loss = loss / divisor(loss, normalizer)
    tokens = keep.sum().to(values.dtype)
    return inputs.shape.restored(loss, dict(divergence=values.detach(), tokens=tokens))
