"""Every kind of policy loss with settings that matter on the tests' numbers, enumerated once."""

import pytest

from codistill_kernels import PolicyLoss
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
    """Of a token with ratio 1 and advantage 1."""
    if loss.kind == "sapo":
        return 2 / loss.sapo_temperature_positive
    return 1.0 if SURROGATES[loss.kind].follows_ratio else logp
