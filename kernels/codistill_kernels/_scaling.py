"""Losses that are divided by a normalizer, and gradients that are known up to that factor."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._autograd import first_order_only


def divisor(total: Tensor, normalizer: float | Tensor) -> float | Tensor:
    """What a sum is divided by: the normalizer, or infinity for 0 over 0.

    Where there is nothing to train on, loss and gradient are thereby 0. No value is looked at, for
    which one would wait for a GPU.
    """
    if not isinstance(normalizer, Tensor):
        if normalizer != 0:
            return normalizer
        normalizer = torch.zeros_like(total)
    normalizer = normalizer.detach().to(total)
    return torch.where((normalizer == 0) & (total.detach() == 0), torch.inf, normalizer)


def with_gradients(
    inputs: Sequence[Tensor | None],
    loss: Tensor,
    gradients: Sequence[Tensor],
    normalizer: float | Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The loss, connected to hidden_states, lm_head_weight and bias by these gradients of it.

    The gradients are those before the division by the normalizer; that of hidden_states is summed
    over the group.
    """
    # Empty, but connected to the inputs: by these a second derivative finds the refusal.
    anchors = [t[:0].clone() for t in inputs if t is not None and t.requires_grad]
    return WithGradients.apply(*inputs, loss, gradients, normalizer, group, *anchors)


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already, up to a factor."""

    @staticmethod
    def forward(
        ctx, hidden_states, lm_head_weight, bias, loss, gradients, normalizer, group, *anchors
    ):
        ctx.save_for_backward(*gradients, *anchors)
        ctx.normalizer, ctx.group, ctx.is_spent = normalizer, group, False
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_states, lm_head_weight, bias)]
        return loss.clone()

    @staticmethod
    @first_order_only("a fused loss")
    def backward(ctx, dloss):
        if ctx.is_spent:
            raise RuntimeError(
                "codistill_kernels: a second backward pass needs a second call of the loss: the "
                "first one has taken the memory of the head's gradient"
            )
        factor = dloss / ctx.normalizer
        needs = ctx.needs_input_grad
        dx, dw, db = (
            gradient if need else None
            for gradient, need in zip(ctx.saved_tensors[:3], needs, strict=False)
        )
        if dx is not None and ctx.group is not None:
            dx = dx.clone()
            dist.all_reduce(dx, group=ctx.group)
        if not torch.compiler.is_compiling() and dw is not None and dw.is_cuda:
            ctx.is_spent, dw = True, scale_in_place(dw, factor, ctx.dtypes[1])
        else:
            dw = scale(dw, factor, ctx.dtypes[1])
        dx, db = scale(dx, factor, ctx.dtypes[0]), scale(db, factor, ctx.dtypes[2])
        return dx, dw, db, *[None] * (len(needs) - 3)


# Rows of a gradient that a CPU scales at once: 3 MiB of fp32 at H = 1536, which stay in cache.
ROWS_AT_ONCE = 512


def scale(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * factor, rounded once."""
    if gradient is None or gradient.dtype == dtype:
        return None if gradient is None else gradient * factor
    out = torch.empty_like(gradient, dtype=dtype)
    if gradient.is_cuda:  # converts as it writes
        return torch.mul(gradient, factor, out=out)
    # On a CPU `out=` would make the whole product in fp32 first.
    buffer = torch.empty_like(gradient[:ROWS_AT_ONCE])
    for part, result in zip(gradient.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE), strict=True):
        result.copy_(torch.mul(part, factor, out=buffer[: len(part)]))
    return out


def scale_in_place(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once, at the start of the gradient's own memory."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    source, out = gradient.view(-1), gradient.view(-1).view(dtype)[: gradient.numel()]
    # Results first .. 2 first take the bytes of sources first / 2 .. first, which were read before.
    first = min(4096, len(source))
    out[:first] = source[:first] * factor
    while first < len(source):
        part = slice(first, min(2 * first, len(source)))
        torch.mul(source[part], factor, out=out[part])
        first *= 2
    return out.view(gradient.shape)
