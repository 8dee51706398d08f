"""Operators of the namespace torch.ops.codistill, opaque to torch.compile.

Registered by the dispatcher's own calls: torch.library.custom_op imports torch._dynamo at an
operator's first use, 1 to 4 seconds of a process that compiles nothing.
"""

from collections.abc import Callable

import torch

NAMESPACE = "codistill"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def custom_op(*, mutates: tuple[str, ...] = ()) -> Callable[[Callable], torch._ops.OpOverload]:
    """A decorator that makes an operator of a function with annotated arguments.

    mutates: names of the arguments that it writes to. The operator's derivative is refused, never
    0.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")

        def refuse(ctx, *gradients):
            raise RuntimeError(f"{NAMESPACE}.{name} has no second derivatives (create_graph=True)")

        if not mutates:  # whoever writes to an argument refuses by itself
            torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def fake_of(op: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """The decorated function gives the operator's results without their values."""

    def register(function: Callable) -> Callable:
        return torch.library.register_fake(op, function, lib=LIBRARY)

    return register
