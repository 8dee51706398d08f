"""Estimates of KL(policy || other) at tokens that the policy sampled, d = log other - log policy.

An estimator is one entry of the table: `kd_rewards`, `kl_penalty` and what they refuse follow.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Estimator(NamedTuple):
    value: Callable[[Tensor], Tensor]
    """k(d), element by element."""
    slope: Callable[[Tensor], Tensor] | None = None
    """k'(d), in closed form; None: the estimator serves no objective."""
    in_reward: bool = False
    """Whether `kd_rewards` offers it."""


def sign(d: Tensor) -> Tensor:
    return torch.where(d.isnan(), d, d.sign())  # torch's makes 0 of NaN, which would hide it


ESTIMATORS = {
    # Its slope would be -1, and the gradient zero in expectation, whatever the other model is.
    "k1": Estimator(lambda d: -d, in_reward=True),
    "k2": Estimator(lambda d: d.square() / 2, slope=lambda d: d),
    "k3": Estimator(lambda d: d.expm1() - d, slope=torch.expm1, in_reward=True),
    "abs": Estimator(torch.abs, slope=sign),
}
OF_REWARDS = tuple(name for name, each in ESTIMATORS.items() if each.in_reward)
OF_OBJECTIVES = tuple(name for name, each in ESTIMATORS.items() if each.slope is not None)


class Estimate(torch.autograd.Function):
    """k(d), whose gradient is made of the closed slope: autograd's of expm1(d) - d has no digits
    left where d is small."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, name: str) -> Tensor:
        return ESTIMATORS[name].value(d)

    @staticmethod
    def setup_context(ctx, inputs, output):
        d, ctx.name = inputs
        ctx.save_for_backward(d)

    @staticmethod
    def backward(ctx, dk):
        (d,), slope = ctx.saved_tensors, ESTIMATORS[ctx.name].slope
        assert slope is not None, ctx.name
        return dk * slope(d), None
