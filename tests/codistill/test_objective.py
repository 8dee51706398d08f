"""From scored rollouts to losses: normalization, ratios, masks and penalties, by hand."""

import math

import pytest
import torch
from torch import Tensor

from codistill.config import Config
from codistill.data import Problem
from codistill.engine import Completion
from codistill.objective import make_update
from codistill.scoring import Rollouts, Scored, engine_weights
from codistill_kernels import kl_penalty, policy_loss
from codistill_kernels._estimators import OF_OBJECTIVES

PROBLEM = Problem("1+1", ("2",), "1+1=", [3, 12, 3, 13])
LENGTHS = (3, 1, 2)
ENGINE = [-0.5, -0.5, -0.5], [-0.5], [-0.5, -0.5]


@pytest.fixture
def hand(settings):
    """hand(name, {"section": {...}}): one prompt, M = G = 3 rollouts of 3, 1 and 2 tokens, N = 8.

    The first is truncated. Log-probabilities: small -1, large -2, at the start -1.5.
    """
    settings["rollout"] |= {"num_generations": 3, "prompts_per_step": 1}
    settings |= {"downsample": {"method": "none"}}
    settings["training"]["micro_batch_size"] = 3

    def run(name: str = "small", changes: dict | None = None, alpha: float = 0.0):
        for section, values in (changes or {}).items():
            settings[section] = settings.get(section, {}) | values
        config = Config(**settings)
        completions = [
            Completion([2] * n, logps, truncated=n == 3)
            for n, logps in zip(LENGTHS, ENGINE, strict=True)
        ]
        rollouts = Rollouts(
            [PROBLEM] * 3, completions, [0] * 3, [""] * 3, torch.zeros(3), torch.zeros(3)
        )
        logps = {name: of_value(value) for name, value in (("small", -1.0), ("large", -2.0))}
        scored = Scored(
            logps,
            logps["large"],
            None,
            torch.zeros(3),
            torch.arange(3),
            {"small": torch.tensor([2.0, 1.0, -3.0]), "large": torch.tensor([1.0, 0.0, -1.0])},
            {name: of_value(-1.5) for name in ("small", "large")},
            engine_weights(config, rollouts, logps["small"]),
        )
        update = make_update(config, name, rollouts, scored, torch.device("cpu"), alpha=alpha)
        (batch,) = update.micro_batches
        return batch, update.normalizer

    return run


def of_value(value: float) -> list[Tensor]:
    return [torch.full((n,), value) for n in LENGTHS]


def loss(batch, normalizer: float) -> float:
    """Of a policy whose ratio is 1 everywhere: minus a weighted sum of advantages."""
    advantages = batch.advantages if batch.weights is None else batch.advantages * batch.weights
    value, _ = policy_loss(
        batch.old_logps,
        batch.old_logps,
        advantages,
        batch.mask,
        normalizer=normalizer,
        cu_seqlens=batch.tokens.cu_seqlens,
    )
    return value.item()


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        # advantages 2, 1, -3 times 3, 1, 2 tokens = 6 + 1 - 6 = 1
        ("constant", -1 / (3 * 8)),
        ("sequence", -(2 + 1 - 3) / 3),
        ("tokens", -1 / 6),
    ],
)
def test_normalization(hand, normalization, expected):
    batch, normalizer = hand("small", {"loss": {"normalization": normalization}})
    assert loss(batch, normalizer) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        # without the first rollout: 1 - 6 = -5; |o| and the count of tokens are of what is left
        ("constant", 5 / (3 * 8)),
        ("sequence", (3 - 1) / 3),
        ("tokens", 5 / 3),
    ],
)
def test_truncated_rollouts_out_of_the_loss(hand, normalization, expected):
    changes = {"loss": {"normalization": normalization}, "rollout": {"truncated": "mask"}}
    for name in ("small", "large"):
        batch, normalizer = hand(name, changes)
        assert batch.mask.tolist() == [False] * 3 + [True] * 3
        if name == "small":
            assert loss(batch, normalizer) == pytest.approx(expected)


def test_old_logps_of_the_trainer_or_the_engine(hand):
    for name in ("small", "large"):  # of the writer, for both models
        assert hand(name)[0].old_logps.tolist() == [-1.0] * 6
        assert hand(name)[0].importance_weights is None
    for name in ("small", "large"):
        batch, _ = hand(name, {"loss": {"old_logps": "engine"}})
        assert batch.old_logps.tolist() == [-0.5] * 6


@pytest.mark.parametrize(("cap", "weight"), [(2.0, math.exp(-0.5)), (0.4, 0.4)])
def test_truncated_importance_weights(hand, cap, weight):
    # trainer over engine: exp(-1 + 0.5)
    batch, _ = hand("large", {"loss": {"importance_cap": cap}})
    assert batch.importance_weights.tolist() == pytest.approx([weight] * 6)
    assert batch.old_logps.tolist() == [-1.0] * 6


@pytest.mark.parametrize("name", ["small", "large"])
def test_kl_to_the_start_of_each_model(hand, name):
    batch, normalizer = hand(name, {"loss": {"beta": 0.1, "normalization": "sequence"}})
    (penalty,) = batch.penalties
    assert (penalty.name, penalty.coefficient, penalty.estimator) == ("reference", 0.1, "k3")
    current = torch.full((6,), -1.0)
    kl, _ = kl_penalty(
        current,
        penalty.logps,
        batch.mask,
        estimator=penalty.estimator,
        normalizer=normalizer,
        weights=batch.weights,
        cu_seqlens=batch.tokens.cu_seqlens,
    )
    # Eq. 4 at ratio exp(-0.5), alike at every token: 1/G sum_i 1/|o_i| sum_t leaves it as it is
    assert kl.item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


@pytest.mark.parametrize("estimator", [None, *OF_OBJECTIVES])
def test_kd_term_in_the_objective_is_the_small_models(hand, estimator):
    kd = {"kd": {"placement": "objective", "estimator": estimator}}
    (penalty,) = hand("small", kd, alpha=0.7)[0].penalties
    assert (penalty.name, penalty.coefficient) == ("kd", 0.7)
    assert penalty.estimator == (estimator or "k3") and penalty.logps.tolist() == [-2.0] * 6
    assert hand("large", kd, alpha=0.7)[0].penalties == ()
    assert hand("small", {"kd": {"placement": "reward", "estimator": None}})[0].penalties == ()
