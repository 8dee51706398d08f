"""The algorithm between rollouts and losses, by hand."""

import math

import pytest
import torch
from tiny import make_rollouts

from codistill.advantages import beta_scales
from codistill.config import Config
from codistill.config.machinery import OptimizerConfig
from codistill.engine import SyncError
from codistill.learner import learning_rate_factor
from codistill.output.metrics import StepMetrics
from codistill.scoring import alpha_at, assign_credit, check_gap
from codistill_kernels import kd_rewards
from codistill_kernels._estimators import OF_REWARDS

GAIN = [0.2, -0.4, 0.0, 0.6, -0.2, -1.0]  # log-ratio large/small of a rollout's first token
LENGTHS = [2, 5, 3, 2, 4, 3]
ACCURACY = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.fixture
def hand(settings):
    """hand({"section": {...}}): credit of one prompt's rollouts; M = 6, G = 4, N = 8, alpha = 4.

    The fourth rollout is truncated; the small model's log-probabilities are -1.
    """
    settings["rollout"]["prompts_per_step"] = 1
    settings["kd"] = {"alpha": 4.0}

    def run(changes: dict | None = None, **options):
        for section, values in (changes or {}).items():
            settings[section] = settings.get(section, {}) | values
        rollouts = make_rollouts(LENGTHS, ACCURACY, truncated={3})
        small = torch.full((sum(LENGTHS),), -1.0)
        large = small.clone()
        large[rollouts.completions.cu_seqlens[:-1]] += torch.tensor(GAIN)
        logps = {"small": small, "large": large}
        return assign_credit(Config(**settings), rollouts, logps, **options)

    return run


def kept_advantages(scored, name: str) -> list[float]:
    """The advantages of the rollouts kept; all others have none."""
    advantages = scored.advantages[name].clone()
    kept = advantages[scored.kept].tolist()
    advantages[scored.kept] = 0
    assert not advantages.any()
    return kept


def test_score_by_hand(hand):
    scored = hand()
    # Eq. 6: kd = 4 * gain / 8
    assert scored.kd_rewards.tolist() == pytest.approx([0.1, -0.2, 0.0, 0.3, -0.1, -0.5])
    # effective 1.1, 0.8, 1.0, 0.3, -0.1, -0.5: best two 0, 2; worst two 4, 5
    assert scored.kept.tolist() == [0, 2, 4, 5]
    # Eq. 7 over the kept: mean of 1.1, 1.0, -0.1, -0.5 is 0.375; of 1, 1, 0, 0 it is 0.5
    assert kept_advantages(scored, "small") == pytest.approx([0.725, 0.625, -0.475, -0.875])
    assert kept_advantages(scored, "large") == pytest.approx([0.5, 0.5, -0.5, -0.5])


def test_grpo_has_no_kd_term(settings, hand):
    settings["algorithm"] = "grpo"
    scored = hand({"downsample": {"method": "none"}, "advantage": {"scale": "std"}})
    assert scored.kd_rewards is None and scored.advantages.keys() == {"small"}
    assert scored.effective_rewards.tolist() == ACCURACY
    # Eq. 3 over all six: mean 1/2, sample deviation sqrt(6 / 4 / 5) = 0.5477
    expected = [0.9129] * 3 + [-0.9129] * 3
    assert kept_advantages(scored, "small") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("kd", "expected"),
    [
        # Eq. 4: -4/8 (exp(g) - 1 - g)
        ({"estimator": "k3"}, [-0.010701, -0.035160, 0.0, -0.111059, -0.009365, -0.183940]),
        ({"placement": "objective"}, [0.0] * 6),
        ({"alpha": 1.0}, [0.025, -0.05, 0.0, 0.075, -0.025, -0.125]),
    ],
    ids=["k3", "objective", "alpha"],
)
def test_kd_term(hand, kd, expected):
    scored = hand({"kd": kd})
    assert scored.kd_rewards.tolist() == pytest.approx(expected, abs=1e-6)
    sums = torch.tensor(ACCURACY) + torch.tensor(expected)
    assert scored.effective_rewards.tolist() == pytest.approx(sums.tolist(), abs=1e-6)


@pytest.mark.parametrize("estimator", OF_REWARDS)
def test_each_estimator_is_the_one_asked_for(hand, estimator):
    scored = hand({"kd": {"estimator": estimator}})
    large, small = torch.tensor(GAIN), torch.zeros(6)  # the other tokens are alike
    terms = dict(alpha=4.0, max_completion_tokens=8, estimator=estimator)
    expected = kd_rewards(torch.zeros(6), large, small, torch.arange(7), **terms)
    torch.testing.assert_close(scored.kd_rewards, expected, rtol=1e-5, atol=1e-6)


def test_exact_kd_reward_is_the_divergence_itself(hand):
    kl = torch.cat([torch.tensor([0.5] + [0.1] * (n - 1)) for n in LENGTHS])
    scored = hand({"kd": {"estimator": "exact"}}, kl=kl)
    # -4/8 (0.5 + 0.1 (n - 1)) of 2, 5, 3, 2, 4, 3 tokens
    expected = [-0.3, -0.45, -0.35, -0.3, -0.4, -0.35]
    assert scored.kd_rewards.tolist() == pytest.approx(expected)


def test_alpha_moves_in_a_straight_line(settings, hand):
    config = Config(**settings | {"kd": {"alpha": 4.0, "alpha_end": 1.0}})
    assert [alpha_at(config, step, 4) for step in (1, 2, 3, 4)] == pytest.approx([4, 3, 2, 1])
    assert alpha_at(config, 1, 1) == 4
    scored = hand({"kd": {"alpha_end": 0.0}}, step=3, total_steps=5)  # alpha = 2
    assert scored.kd_rewards.tolist() == pytest.approx([0.05, -0.1, 0.0, 0.15, -0.05, -0.25])


@pytest.mark.parametrize(
    ("downsample", "kept"),
    [
        # effective 1.1, 0.8, 1.0, 0.3, -0.1, -0.5
        ({"method": "top"}, [0, 1, 2, 3]),
        # two best and two worst; of three: 1.1, 1.0, -0.5 (squares sum to 1.61) before 1.1, -0.1,
        # -0.5 (1.39)
        ({"method": "max_variance"}, [0, 2, 4, 5]),
        ({"method": "max_variance", "keep": 3}, [0, 2, 5]),
        ({"method": "none"}, [0, 1, 2, 3, 4, 5]),
        # tokens 2, 5, 3, 2, 4, 3: the shortest four (GFPO)
        ({"method": "top", "by": "shortness"}, [0, 2, 3, 5]),
        # 0.55, 0.16, 0.33, 0.15, -0.03, -0.17 a token
        ({"method": "top", "by": "reward_per_token", "keep": 2}, [0, 2]),
        ({"by": "shortness", "keep": 2}, [0, 1]),
    ],
    ids=str,
)
def test_downsampling(hand, downsample, kept):
    scored = hand({"downsample": downsample})
    assert scored.kept.tolist() == kept
    # which are kept decides the baseline, and nothing about the rewards
    assert scored.kd_rewards.tolist() == pytest.approx([0.1, -0.2, 0.0, 0.3, -0.1, -0.5])
    effective = scored.effective_rewards[kept]
    assert kept_advantages(scored, "small") == pytest.approx(
        (effective - effective.mean()).tolist()
    )


def test_random_downsampling_is_a_function_of_seed_and_step(hand):
    changes = {"downsample": {"method": "random", "keep": 3}}
    kept = [hand(changes, step=step).kept.tolist() for step in range(1, 9)]
    assert kept == [hand(changes, step=step).kept.tolist() for step in range(1, 9)]
    assert len({tuple(rows) for rows in kept}) > 3 and all(len(set(rows)) == 3 for rows in kept)


@pytest.mark.parametrize(
    ("advantage", "small", "large"),
    [
        # baseline of all six: mean effective 2.6 / 6 = 0.4333, mean reward 0.5
        ({"group": "all"}, [0.6667, 0.5667, -0.5333, -0.9333], [0.5, 0.5, -0.5, -0.5]),
        # the others of the kept: 1.1 - (1.0 - 0.1 - 0.5) / 3 and so on; 4/3 of Eq. 7
        (
            {"baseline": "leave_one_out"},
            [0.9667, 0.8333, -0.6333, -1.1667],
            [2 / 3] * 2 + [-2 / 3] * 2,
        ),
        # the others of all six: 6/5 of the first line
        (
            {"baseline": "leave_one_out", "group": "all"},
            [0.8, 0.68, -0.64, -1.12],
            [0.6, 0.6, -0.6, -0.6],
        ),
        # sample deviations of the kept: sqrt(1.9075 / 3) = 0.7974, sqrt(1 / 3)
        ({"scale": "std"}, [0.9092, 0.7838, -0.5957, -1.0973], [0.8660] * 2 + [-0.8660] * 2),
    ],
    ids=str,
)
def test_advantages(hand, advantage, small, large):
    scored = hand({"advantage": advantage})
    assert scored.kept.tolist() == [0, 2, 4, 5]
    assert kept_advantages(scored, "small") == pytest.approx(small, abs=1e-4)
    assert kept_advantages(scored, "large") == pytest.approx(large, abs=1e-4)


def test_leave_one_out_is_the_mean_of_the_others(hand):
    scored = hand({"advantage": {"baseline": "leave_one_out"}, "downsample": {"method": "none"}})
    rewards = scored.effective_rewards
    others = [(rewards.sum() - reward) / 5 for reward in rewards]
    expected = [(r - o).item() for r, o in zip(rewards, others, strict=True)]
    assert kept_advantages(scored, "small") == pytest.approx(expected, abs=1e-6)


def test_beta_scales_by_hand():
    # accuracies 0.2, 0.4, 0.6, 0.8: mean 0.5, sample variance 0.2 / 3; a + b = 0.25 / 0.0667 - 1 =
    # 2.75, a = b = 1.375, density with both parameters 1.4583
    scales = beta_scales(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    p = torch.tensor([0.2, 0.4], dtype=torch.float64)
    c = 1 + 1.375 / 3
    norm = torch.lgamma(torch.tensor(2 * c)) - 2 * torch.lgamma(torch.tensor(c))
    expected = (-(norm + (c - 1) * (p.log() + (1 - p).log()))).exp().tolist()
    assert scales.tolist() == pytest.approx([*expected, *expected[::-1]], rel=1e-6)
    assert scales[0] > scales[1] > 0  # what is rarely right, or rarely wrong, counts more
    assert beta_scales(torch.tensor([0.3, 0.3])).tolist() == [1, 1]
    assert beta_scales(torch.tensor([0.0, 1.0, 0.5])).tolist()[:2] == [1, 1]


def test_beta_scales_the_accuracy_and_centres_the_rest(settings):
    settings["rollout"] |= {"num_generations": 4, "prompts_per_step": 2}
    settings |= {"advantage": {"scale": "beta"}, "kd": {"alpha": 8.0}}
    accuracy = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]  # 1/4 and 3/4: mean 1/2, variance 1/8
    rollouts = make_rollouts([1] * 8, accuracy)
    small, gain = torch.full((8,), -1.0), torch.tensor([0.4, 0.0, 0.0, 0.0] * 2)
    logps = {"small": small, "large": small + gain}
    scored = assign_credit(Config(**settings), rollouts, logps)
    factor = beta_scales(torch.tensor([0.25, 0.75]))[0].item()
    # a + b = 0.25 / 0.125 - 1 = 1, both parameters 7/6; gamma(7/3) / gamma(7/6)^2 = 1.38340
    assert factor == pytest.approx(1 / (1.38340 * (3 / 16) ** (1 / 6)), rel=1e-4)
    large_first = scored.advantages["large"][:4].tolist()
    assert large_first == pytest.approx([0.75 * factor] + [-0.25 * factor] * 3)
    # the KD reward, 0.4 and three times 0, adds 0.3 and -0.1 as it is
    small_first = scored.advantages["small"][:4].tolist()
    assert small_first == pytest.approx([0.75 * factor + 0.3] + [-0.25 * factor - 0.1] * 3)


def test_truncated_rollouts_without_a_reward(hand, monkeypatch):
    monkeypatch.setitem(globals(), "ACCURACY", [1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    effective = hand({"rollout": {"truncated": "keep"}}).effective_rewards
    assert effective.tolist() == pytest.approx([1.1, 0.8, 1.0, 1.3, -0.1, -0.5])
    effective = hand({"rollout": {"truncated": "zero_reward"}}).effective_rewards
    # the fourth keeps its KD reward alone
    assert effective.tolist() == pytest.approx([1.1, 0.8, 1.0, 0.3, -0.1, -0.5])


def test_beta_scales_what_was_given_as_accuracy(hand, monkeypatch):
    """The fourth rollout is right, cut off and gets nothing: it counts as wrong."""
    monkeypatch.setitem(globals(), "ACCURACY", [1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr("codistill.advantages.beta_scales", lambda p: torch.full_like(p, 2.0))
    changes = {"advantage": {"scale": "beta"}, "rollout": {"truncated": "zero_reward"}}
    large = hand(changes | {"downsample": {"method": "none"}}).advantages["large"]
    assert large.tolist() == pytest.approx([1.0] * 3 + [-1.0] * 3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, 20 % warm-up: 1/3, 2/3, then 1, then half a cosine over 8 steps
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),
    ],
)
def test_learning_rate(schedule, expected):
    config = OptimizerConfig(schedule=schedule, warmup_fraction=0.2)
    factors = [learning_rate_factor(step, 10, config) for step in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx(expected)


@pytest.fixture
def gate(settings, process_group):
    """gate(gaps, dtype, limit): compares an engine that says -1 of each token with a trainer."""

    def run(gaps: list[float], dtype: str, limit: float | None = None) -> dict[str, float]:
        settings["training"]["dtype"] = dtype
        settings["rollout"]["logp_gap_limit"] = limit
        rollouts = make_rollouts([len(gaps)], [1.0], logp=-1.0)
        metrics = StepMetrics(torch.device("cpu"))
        sampled = torch.tensor(gaps) - 1
        check_gap(Config(**settings), rollouts, sampled, "the engine", metrics)
        return metrics.reduce()

    return run


def test_gap_gate(gate):
    gaps = [0.0] * 995 + [-0.5] * 4 + [2.0]
    numbers = gate(gaps, "bfloat16")  # on average 0.004, beyond 0.1 on half a percent of the tokens
    assert numbers["rollout/logp_gap_mean"] == pytest.approx(0.004, rel=1e-4)
    assert numbers["rollout/logp_gap_max"] == pytest.approx(2.0)
    gate([5e-4, -5e-4], "float32")
    gate(gaps, "float32", 2.5)


@pytest.mark.parametrize(
    ("gaps", "dtype", "limit", "message"),
    [
        ([0.0, 2e-3], "float32", None, "2.00e-03 nats at most"),
        ([0.0, math.nan], "float32", None, "inf nats at most"),
        ([0.11, -0.11], "bfloat16", None, "1.10e-01 nats on average"),
        ([math.nan, 0.0], "bfloat16", None, "inf nats on average"),
        # 2 % of the tokens, on average 0.024
        ([0.0] * 98 + [1.2] * 2, "bfloat16", None, "1.20e[+]00 nats on 99% of the tokens, at most"),
        ([0.0, 0.2], "bfloat16", 0.1, "2.00e-01 nats at most"),
    ],
)
def test_gap_gate_stops(gate, gaps, dtype, limit, message):
    with pytest.raises(SyncError, match=f"the engine and the trainer differ by {message}"):
        gate(gaps, dtype, limit)
