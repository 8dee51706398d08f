"""What kernels with a backward pass of their own cannot do is refused: it would silently give 0."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def first_order_only(name: str) -> Callable[[Callable], Callable]:
    """Decorates a Function's `backward`: its results are refused a derivative of their own.

    `once_differentiable` does so only where the gradient from above requires one itself, which that
    of a plain loss does not. The refusal reaches everyone who asks for the derivative by a saved
    tensor that requires a gradient: save one connected to each input. name: of the operation.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def first_order_backward(ctx: Any, *upstream: Tensor | None) -> Any:
            # Before the backward pass, which may write over what is saved. torch.compile refuses
            # second derivatives itself.
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
    """The first `count` tensors, whose derivative with respect to the others is refused."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.operation = name
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.operation} has no second derivatives (create_graph=True)")


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries what the operation `name` would drop: a tangent of forward-mode
    differentiation, or a dimension or level of torch.func."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if not isinstance(tensor, Tensor):  # None, or for the checks of arguments to say
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(f"{name} does not work inside torch.func (vmap, grad, jvp, ...)")
        if has_tangent(tensor):
            raise RuntimeError(f"{name} has no forward-mode derivative")


def has_tangent(tensor: Tensor) -> bool:
    in_level = forward_ad._current_level >= 0
    return in_level and forward_ad.unpack_dual(tensor).tangent is not None
