"""Refusals of what kernels with their own backward pass cannot do: it would silently give 0."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def first_order_only(name: str) -> Callable[[Callable], Callable]:
    """A decorator of a Function's `backward`, whose results then refuse to be differentiated.

    `once_differentiable` refuses only where the upstream gradient requires a gradient itself, which
    that of a plain loss does not. Here whoever differentiates by a saved tensor that requires a
    gradient meets the refusal: save a tensor that is connected to each input. name: what the
    operation is called in the message.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def first_order_backward(ctx: Any, *upstream: Tensor | None) -> Any:
            # Looked at before the backward pass, which may write over what is saved. torch.compile
            # refuses second derivatives itself.
            has_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            tensors = (*ctx.saved_tensors, *upstream) if has_graph else ()
            connected = [t for t in tensors if t is not None and t.requires_grad]
            with torch.no_grad():
                results = backward(ctx, *upstream)
            if not connected:
                return results
            given = [g for g in results if g is not None]
            refusing = iter(NotDifferentiable.apply(name, len(given), *given, *connected))
            return tuple(None if g is None else next(refusing) for g in results)

        return first_order_backward

    return decorate


class NotDifferentiable(torch.autograd.Function):
    """Returns the first `count` tensors; their derivatives by the others are refused."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.operation = name
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.operation} has no second derivatives (create_graph=True)")


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError where a tensor carries what the operation `name` would drop.

    That is a tangent of forward-mode differentiation, or a dimension or level of torch.func.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if not isinstance(tensor, Tensor):  # None, or a mistake that the checks of arguments name
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(f"{name} does not work inside torch.func (vmap, grad, jvp, ...)")
        if has_tangent(tensor):
            raise RuntimeError(f"{name} has no forward-mode derivative")


def has_tangent(tensor: Tensor) -> bool:
    in_level = forward_ad._current_level >= 0
    return in_level and forward_ad.unpack_dual(tensor).tangent is not None
