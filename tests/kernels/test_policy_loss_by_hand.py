"""policy_loss of every kind by hand, and what PolicyLoss refuses."""

import math

import pytest
import torch
from losses import LOSSES

from codistill_kernels import PolicyLoss, policy_loss


def leaf(values):
    return torch.tensor(values, dtype=torch.float64).requires_grad_()


def with_gradient(logps, *arguments, **keywords):
    loss, stats = policy_loss(logps, *arguments, **keywords)
    return loss.detach(), torch.autograd.grad(loss, logps)[0], stats


def test_clip_by_hand():
    # ratios 1.5 (A 2: clipped to 1.2), 0.5 (A -1: clipped to 0.8), 1.1 (A 1), 0.5 (A 3: not cut)
    # sum = 1.2*2 - 0.8*1 + 1.1*1 + 0.5*3 = 4.2; loss = -4.2 / 10
    ratios = torch.tensor([1.5, 0.5, 1.1, 0.5])
    logps = ratios.log().requires_grad_()
    advantages = torch.tensor([2.0, -1.0, 1.0, 3.0])
    loss, stats = policy_loss(logps, torch.zeros(4), advantages, normalizer=10)
    loss.backward()
    assert loss.item() == pytest.approx(-0.42)
    # d(-r A / 10) / d logp = -r A / 10 where no bound cuts
    assert logps.grad.tolist() == pytest.approx([0, 0, -0.11, -0.15])
    assert stats["tokens"] == 4 and stats["ratio_max"].item() == pytest.approx(1.5)
    assert stats["ratio_mean"].item() == pytest.approx(0.9)
    assert (stats["clip_fraction_low"], stats["clip_fraction_high"]) == (0.25, 0.25)
    # (sum r)^2 / (n sum r^2) = 3.6^2 / (4 * (2.25 + 0.25 + 1.21 + 0.25)) = 12.96 / 15.84
    assert stats["ess"].item() == pytest.approx(12.96 / 15.84)
    kl = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1, 0.5)) / 4
    assert stats["approx_kl"].item() == pytest.approx(kl, rel=1e-5)
    assert torch.equal(stats["logps"], logps.detach()) and not stats["logps"].requires_grad


def test_dual_clip_by_hand():
    # ratio 4, A -2: -8 without, 3 * -2 = -6 with dual_clip 3, and no gradient
    settings, advantages = PolicyLoss(dual_clip=3.0), torch.tensor([-2.0])
    loss, gradient, stats = with_gradient(
        leaf([math.log(4)]), torch.zeros(1), advantages, loss=settings, normalizer=1
    )
    assert loss.item() == pytest.approx(6.0) and gradient.item() == 0
    assert stats["clip_fraction_high"] == 1


def test_cispo_by_hand():
    # ratios 1.5, 0.5, 1.1, 0.5 are weights 1.2, 0.8, 1.1, 0.8 whatever A is; logp = log r - 1
    # sum c A logp = 1.2*2*(log 1.5 - 1) + 0.8*-1*(log 0.5 - 1) + 1.1*(log 1.1 - 1) + 0.8*3*(..)
    ratios, weighted = (1.5, 0.5, 1.1, 0.5), (2.4, -0.8, 1.1, 2.4)
    loss, gradient, stats = with_gradient(
        leaf([math.log(r) - 1 for r in ratios]),
        -torch.ones(4, dtype=torch.float64),
        torch.tensor([2.0, -1.0, 1.0, 3.0]),
        loss=PolicyLoss("cispo"),
        normalizer=10,
    )
    total = sum(w * (math.log(r) - 1) for w, r in zip(weighted, ratios, strict=True))
    assert loss.item() == pytest.approx(-total / 10)
    assert gradient.tolist() == pytest.approx([-0.24, 0.08, -0.11, -0.24])  # none is cut
    assert (stats["clip_fraction_low"], stats["clip_fraction_high"]) == (0.5, 0.25)


def test_gspo_by_hand():
    # sequence 0, A 2: mean log-ratio 0.2, s = 1.2214 > 1.2: two tokens of 1.2 * 2, one masked
    # sequence 1, A -1: mean -0.2, s = 0.8187 < 0.9: two tokens of -0.9
    # sequence 3, A -3, weights 0.5 and 1: mean 0.15, not cut: 1.5 * s * -3. Its last is masked.
    s = math.exp(0.15)
    loss, gradient, stats = with_gradient(
        leaf([0.3, 9.0, 0.1, -0.5, 0.1, 0.4, -0.1, 5.0]),
        torch.zeros(8, dtype=torch.float64),
        torch.tensor([2.0, -1.0, 99.0, -3.0]),
        torch.tensor([1, 0, 1, 1, 1, 1, 1, 0]).bool(),
        loss=PolicyLoss("gspo", epsilon_low=0.1),
        normalizer=10,
        importance_weights=torch.tensor([1, 7, 1, 1, 1, 0.5, 1, 7]),
        cu_seqlens=torch.tensor([0, 3, 5, 5, 8]),
    )
    assert loss.item() == pytest.approx(-(2 * 2.4 - 2 * 0.9 - 4.5 * s) / 10)
    # d s / d logp = s / 2 for both unmasked tokens of sequence 3
    assert gradient.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.225 * s, 0.225 * s, 0])
    assert stats["tokens"] == 6
    assert stats["clip_fraction_low"].item() == pytest.approx(2 / 6)
    assert stats["clip_fraction_high"].item() == pytest.approx(2 / 6)


def test_gmpo_by_hand():
    # sequence 0, A 2: 0.3 cut to 0.25, -0.9 stays: mean -0.325; two tokens of 2 exp(-0.325)
    # sequence 1, A -1: -0.5 cut to -0.1, 0.3 stays: mean 0.1; weights 0.5 and 1. Last is masked.
    first, second = math.exp(-0.325), math.exp(0.1)
    loss, gradient, stats = with_gradient(
        leaf([0.3, -0.9, -0.5, 0.3, -5.0]),
        torch.zeros(5, dtype=torch.float64),
        torch.tensor([2.0, -1.0]),
        torch.tensor([1, 1, 1, 1, 0]).bool(),
        loss=PolicyLoss("gmpo", epsilon_low=0.1, epsilon_high=0.25),
        normalizer=10,
        importance_weights=torch.tensor([1, 1, 0.5, 1, 7]),
        cu_seqlens=torch.tensor([0, 2, 5]),
    )
    assert loss.item() == pytest.approx(-(4 * first - 1.5 * second) / 10)
    expected = [0, -0.2 * first, 0, 0.075 * second, 0]
    assert gradient.tolist() == pytest.approx(expected)
    assert (stats["clip_fraction_low"], stats["clip_fraction_high"]) == (0.25, 0.25)


def test_log_ratio_clamp_by_hand():
    # log r = 3 -> 2 and -3 -> -2, A -1: ratios e^2 and e^-2 (cut at 0.8), no gradient; 2 is on the
    # bound; with epsilon_high 1 only log r > 2 would be cut where A > 0
    logps = leaf([3.0, 2.0, 0.0])
    loss, gradient, stats = with_gradient(
        logps,
        torch.zeros(3, dtype=torch.float64),
        -torch.ones(3, dtype=torch.float64),
        loss=PolicyLoss(log_ratio_clamp=2.0),
        normalizer=10,
    )
    assert loss.item() == pytest.approx((2 * math.exp(2) + 1) / 10)
    assert gradient.tolist() == pytest.approx([0, math.exp(2) / 10, 0.1])
    assert stats["clip_fraction_high"].item() == pytest.approx(1 / 3)
    assert stats["ratio_max"].item() == pytest.approx(math.exp(3))  # as it was


def test_log_ratio_clamp_of_sequences_by_hand():
    # gspo, A -1: 3 -> 1 and 0.5: s = exp(0.75); gmpo the same. d s / d logp = s / 2 of the second
    s = math.exp(0.75)
    for kind in ("gspo", "gmpo"):
        loss, gradient, stats = with_gradient(
            leaf([3.0, 0.5]),
            torch.zeros(2),
            -torch.ones(1),
            loss=PolicyLoss(kind, log_ratio_clamp=1.0),
            normalizer=10,
            cu_seqlens=torch.tensor([0, 2]),
        )
        assert loss.item() == pytest.approx(2 * s / 10), kind
        assert gradient.tolist() == pytest.approx([0, s / 10]), kind
        assert stats["clip_fraction_high"] == 0.5


def test_log_ratio_clamp_bounds_the_weight_of_cispo():
    # e^3 is below 1 + epsilon_high: without the clamp the weight; with it e^2, and no token is cut
    loss, gradient, _ = with_gradient(
        leaf([3.0]),
        torch.zeros(1),
        torch.ones(1),
        loss=PolicyLoss("cispo", epsilon_high=99.0, log_ratio_clamp=2.0),
        normalizer=1,
    )
    assert loss.item() == pytest.approx(-3 * math.exp(2))
    assert gradient.item() == pytest.approx(-math.exp(2))


def test_settings_survive_a_custom_op():
    for loss in LOSSES.values():
        settings = loss.settings()
        assert all(isinstance(value, float) for value in settings)
        assert PolicyLoss.from_settings(loss.kind, settings) == loss


@pytest.mark.parametrize(
    "change",
    [
        dict(kind="ppo"),
        dict(epsilon_low=1.0),
        dict(epsilon_low=1.5, kind="cispo"),
        dict(epsilon_low=1.0, kind="gspo"),
        dict(epsilon_low=-0.1, kind="gmpo"),
        dict(epsilon_high=-0.1),
        dict(epsilon_high=math.nan),
        dict(dual_clip=0.5),
        dict(dual_clip=3.0, kind="cispo"),
        dict(dual_clip=3.0, kind="sapo"),
        dict(epsilon_high=-0.3, kind="cispo"),
        dict(epsilon_low=0.3, kind="sapo"),
        dict(epsilon_high=0.3, kind="reinforce"),
        dict(truncate=2.0),
        dict(truncate=0.0, kind="dppo_tv"),
        dict(sapo_temperature_positive=2.0),
        dict(sapo_temperature_negative=0.0, kind="sapo"),
        dict(vespo_k_negative=-1.0, kind="vespo"),
        dict(vespo_lambda_positive=2.0, kind="gspo"),
        dict(entropy_bonus=math.inf),
        dict(dual_clip=3.0, kind="gmpo"),
        dict(log_ratio_clamp=0.0),
        dict(log_ratio_clamp=math.nan),
    ],
    ids=str,
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must be"):
        PolicyLoss(**change)


def test_settings_may_be_open():
    assert PolicyLoss("cispo", epsilon_low=1.0).epsilon_low == 1  # no lower bound
    assert PolicyLoss("gmpo", epsilon_low=1.5).needs_sequences  # nats
    assert PolicyLoss("gspo").needs_sequences and not PolicyLoss("cispo").needs_sequences
