"""From scored rollouts to losses: normalization, ratios, masks and penalties, by hand."""

import math

import pytest
import torch
from tiny import PROBLEM, make_rollouts

from codistill.batch import TokenBatch
from codistill.config import Config
from codistill.engine import Completion
from codistill.objective import Objective, make_objectives
from codistill.rewards import RewardTerms
from codistill.rollout import Rollouts
from codistill.scoring import Credit, Scored, engine_weights
from codistill_kernels import kl_penalty, policy_loss
from codistill_kernels._estimators import OF_OBJECTIVES

LENGTHS = [3, 1, 2]


@pytest.fixture
def hand(settings):
    """hand(name, {"section": {...}}): one prompt, M = G = 3 rollouts of 3, 1 and 2 tokens, N = 8.

    The first is truncated. Log-probabilities: small -1, large -2, at the start -1.5, engine -0.5.
    """
    settings["rollout"] |= {"num_generations": 3, "prompts_per_step": 1}
    settings |= {"downsample": {"method": "none"}}

    def run(name: str = "small", changes: dict | None = None, alpha: float = 0.0) -> Objective:
        for section, values in (changes or {}).items():
            settings[section] = settings.get(section, {}) | values
        config = Config(**settings)
        rollouts = make_rollouts(LENGTHS, [0.0] * 3, truncated={0}, logp=-0.5)
        logps = {"small": torch.full((6,), -1.0), "large": torch.full((6,), -2.0)}
        advantages = {
            "small": torch.tensor([2.0, 1.0, -3.0]),
            "large": torch.tensor([1.0, 0.0, -1.0]),
        }
        scored = Scored(
            Credit(None, torch.zeros(3), torch.arange(3), advantages),
            [],
            logps,
            teacher_logps=logps["large"],
            reference_logps={name: torch.full((6,), -1.5) for name in ("small", "large")},
            importance_weights=engine_weights(config, rollouts, logps["small"]),
        )
        (objective,) = make_objectives(config, name, rollouts, scored, alpha=alpha)
        return objective

    return run


@pytest.fixture
def batch() -> TokenBatch:
    rollouts = make_rollouts(LENGTHS, [0.0] * 3)
    return TokenBatch.build(rollouts.prompts, rollouts.completions, [0, 2, 1], torch.device("cpu"))


def loss(objective: Objective, batch: TokenBatch) -> float:
    """The loss of a policy whose ratio is 1 everywhere: minus a weighted sum of advantages."""
    terms = objective.terms(batch)
    value, _ = policy_loss(terms["old_logps"], cu_seqlens=batch.cu_seqlens, **terms)
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
def test_normalization(hand, batch, normalization, expected):
    objective = hand("small", {"loss": {"normalization": normalization}})
    assert loss(objective, batch) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        # without the first rollout: 1 - 6 = -5; |o| and the count of tokens are of what is left
        ("constant", 5 / (3 * 8)),
        ("sequence", (3 - 1) / 3),
        ("tokens", 5 / 3),
    ],
)
def test_truncated_rollouts_out_of_the_loss(hand, batch, normalization, expected):
    changes = {"loss": {"normalization": normalization}, "rollout": {"truncated": "mask"}}
    for name in ("small", "large"):
        objective = hand(name, changes)
        assert objective.mask.tolist() == [False] * 3 + [True] * 3
        if name == "small":
            assert loss(objective, batch) == pytest.approx(expected)


def test_old_logps_of_the_trainer_or_the_engine(hand):
    for name in ("small", "large"):  # of the writer, for both models
        assert hand(name).old_logps.tolist() == [-1.0] * 6
        assert hand(name).importance_weights is None
    for name in ("small", "large"):
        objective = hand(name, {"loss": {"old_logps": "engine"}})
        assert objective.old_logps.tolist() == [-0.5] * 6


@pytest.mark.parametrize(("cap", "weight"), [(2.0, math.exp(-0.5)), (0.4, 0.4)])
def test_truncated_importance_weights(hand, cap, weight):
    # trainer over engine: exp(-1 + 0.5)
    objective = hand("large", {"loss": {"importance_cap": cap}})
    assert objective.importance_weights.tolist() == pytest.approx([weight] * 6)
    assert objective.old_logps.tolist() == [-1.0] * 6


@pytest.mark.parametrize("name", ["small", "large"])
def test_kl_to_the_start_of_each_model(hand, batch, name):
    objective = hand(name, {"loss": {"beta": 0.1, "normalization": "sequence"}})
    (penalty,) = objective.penalties
    assert (penalty.name, penalty.coefficient, penalty.estimator) == ("reference", 0.1, "k3")
    kl, _ = kl_penalty(torch.full((6,), -1.0), **objective.penalty_terms(penalty, batch))
    # Eq. 4 at ratio exp(-0.5), alike at every token: 1/G sum_i 1/|o_i| sum_t leaves it as it is
    assert kl.item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


@pytest.mark.parametrize("estimator", [None, *OF_OBJECTIVES])
def test_kd_term_in_the_objective_is_the_small_models(hand, estimator):
    kd = {"kd": {"placement": "objective", "estimator": estimator}}
    (penalty,) = hand("small", kd, alpha=0.7).penalties
    assert (penalty.name, penalty.coefficient) == ("kd", 0.7)
    assert penalty.estimator == (estimator or "k3") and penalty.logps.tolist() == [-2.0] * 6
    assert hand("large", kd, alpha=0.7).penalties == ()
    assert hand("small", {"kd": {"placement": "reward", "estimator": None}}).penalties == ()


def test_tokens_of_rollouts_that_are_not_kept_are_not_counted(settings):
    settings["rollout"] |= {"num_generations": 3, "prompts_per_step": 1}
    settings |= {"downsample": {"method": "top", "keep": 2}, "loss": {"normalization": "tokens"}}
    rollouts = make_rollouts(LENGTHS, [0.0] * 3)
    logps = {"small": torch.full((6,), -1.0), "large": torch.full((6,), -2.0)}
    credit = Credit(None, torch.zeros(3), torch.tensor([1, 2]), {"small": torch.ones(3)})
    scored = Scored(credit, [], logps)
    (objective,) = make_objectives(Config(**settings), "small", rollouts, scored)
    assert objective.normalizer == 1 + 2


def test_a_hint_has_importance_weight_one(settings):
    """The engine says nothing of it."""
    settings["loss"] = {"importance_cap": 2.0}
    completion = Completion([4, 5, 1], [-0.5], False)
    rewards = RewardTerms(torch.zeros(1), torch.zeros(1), {})
    rollouts = Rollouts.of([PROBLEM], [""], [completion], [2], rewards)
    weights = engine_weights(Config(**settings), rollouts, torch.full((3,), -1.0))
    assert weights.tolist() == pytest.approx([1.0, 1.0, math.exp(-0.5)])


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [("constant", [2 * 8, 2 * 8]), ("sequence", [2, 2]), ("tokens", [3 + 1, 2 + 4])],
)
def test_a_mini_batch_is_divided_by_what_is_in_it(settings, normalization, expected):
    settings["rollout"] |= {"num_generations": 2, "prompts_per_step": 2}
    settings |= {"downsample": {"keep": 2}, "loss": {"normalization": normalization}}
    settings["training"] = settings.get("training", {}) | {"mini_batches": 2}
    rollouts = make_rollouts([3, 1, 2, 4], [0.0] * 4)
    logps = {name: torch.full((10,), -1.0) for name in ("small", "large")}
    credit = Credit(None, torch.zeros(4), torch.arange(4), {"small": torch.ones(4)})
    scored = Scored(credit, [], logps, teacher_logps=logps["large"])
    objectives = make_objectives(Config(**settings), "small", rollouts, scored)
    assert [float(objective.normalizer) for objective in objectives] == expected
