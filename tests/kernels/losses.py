"""Every kind of policy loss, with settings that matter on the tests' tokens, and those tokens."""

import pytest
import torch

from codistill_kernels import PolicyLoss, policy_loss
from codistill_kernels._surrogates import SURROGATES

BOUNDS = dict(epsilon_low=0.1, epsilon_high=0.3)
NEAR = dict(epsilon_low=0.05, epsilon_high=0.1)
LOSSES = {
    "clip": PolicyLoss(**BOUNDS),
    "dual clip": PolicyLoss(**BOUNDS, dual_clip=1.4),
    "cispo": PolicyLoss("cispo", **BOUNDS),
    "cispo below 1": PolicyLoss("cispo", epsilon_low=0.4, epsilon_high=-0.2),
    "gspo": PolicyLoss("gspo", **NEAR),
    "gspo dual clip": PolicyLoss("gspo", **NEAR, dual_clip=1.2),
    "luspo": PolicyLoss("luspo", **NEAR),
    "gmpo": PolicyLoss("gmpo", **BOUNDS),
    "sapo": PolicyLoss("sapo", sapo_temperature_positive=0.8, sapo_temperature_negative=1.3),
    "vespo": PolicyLoss("vespo", vespo_k_positive=1.5, vespo_lambda_negative=2.5),
    "reinforce": PolicyLoss("reinforce"),
    "dppo_tv": PolicyLoss("dppo_tv", epsilon_low=0.02, epsilon_high=0.03, truncate=1.2),
    "dppo_kl": PolicyLoss("dppo_kl", epsilon_low=0.005, epsilon_high=0.003),
    "clamped clip": PolicyLoss(**BOUNDS, log_ratio_clamp=0.5),
    "clamped cispo": PolicyLoss("cispo", 0.1, 0.9, log_ratio_clamp=0.5),
    "clamped gspo": PolicyLoss("gspo", **NEAR, log_ratio_clamp=0.7),
    "clamped gmpo": PolicyLoss("gmpo", **BOUNDS, log_ratio_clamp=0.5),
    "clamped sapo": PolicyLoss("sapo", log_ratio_clamp=0.5),
    "clamped vespo": PolicyLoss("vespo", log_ratio_clamp=0.5),
    "clip with entropy": PolicyLoss(**BOUNDS, entropy_bonus=0.3),
    "gspo with entropy": PolicyLoss("gspo", **NEAR, entropy_bonus=-0.2),
}
assert {loss.kind for loss in LOSSES.values()} == set(SURROGATES)

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def has_bounds(loss: PolicyLoss) -> bool:
    return "epsilon_low" in SURROGATES[loss.kind].settings


def first_step_value(loss: PolicyLoss, logp: float) -> float:
    """The surrogate of a token with ratio 1 and advantage 1."""
    if loss.kind == "sapo":
        return 2 / loss.sapo_temperature_positive
    return 1.0 if SURROGATES[loss.kind].follows_ratio else logp


# Sequences 1 and 7 have no token; the mask takes all tokens of sequence 3.
ENDS = torch.tensor([0, 7, 7, 20, 24, 25, 45, 60, 60])


def flat_case(tokens: int, seed: int = 0, dtype=torch.float64) -> dict:
    generator = torch.Generator().manual_seed(seed)
    old = -0.6 - torch.rand(tokens, generator=generator, dtype=dtype) * 5
    logps = old + 0.4 * torch.randn(tokens, generator=generator, dtype=dtype)
    return dict(
        logps=logps.clamp(max=-0.05).requires_grad_(),
        old_logps=old,
        advantages=torch.randn(tokens, generator=generator, dtype=dtype),
        mask=torch.rand(tokens, generator=generator) > 0.2,
        importance_weights=torch.rand(tokens, generator=generator, dtype=dtype),
        entropy=torch.rand(tokens, generator=generator, dtype=dtype).requires_grad_(),
    )


def sequence_case(seed: int = 0, dtype=torch.float64) -> dict:
    case = flat_case(60, seed, dtype) | {"cu_seqlens": ENDS}
    case["mask"][20:24] = False
    # Sequence 0 rose with a positive and sequence 2 fell with a negative advantage: gspo cuts both.
    case["advantages"] = case["advantages"][:8].clone()
    case["advantages"][0], case["advantages"][2], case["advantages"][5] = 1.5, -0.7, 0.3
    case["old_logps"][:7] -= 0.5
    case["old_logps"][7:20] += 0.5
    return case


def leaf(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).requires_grad_()


def with_gradient(logps, *arguments, **keywords):
    loss, stats = policy_loss(logps, *arguments, **keywords)
    return loss.detach(), torch.autograd.grad(loss, logps)[0], stats
