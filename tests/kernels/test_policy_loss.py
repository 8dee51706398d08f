"""policy_loss: hand-computed numbers, the reference, and its promises one by one."""

import math

import pytest
import torch

from codistill_kernels import PolicyLoss, policy_loss, reference


def random_case(tokens: int, seed: int = 0, dtype=torch.float64) -> dict:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(tokens, generator=generator, dtype=dtype) * 5
    return dict(
        logps=(old + 0.4 * torch.randn(tokens, generator=generator, dtype=dtype)).requires_grad_(),
        old_logps=old,
        advantages=torch.randn(tokens, generator=generator, dtype=dtype),
        mask=torch.rand(tokens, generator=generator) > 0.2,
    )


def test_by_hand():
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
    logps = torch.tensor([math.log(4.0)]).requires_grad_()
    settings = PolicyLoss(dual_clip=3.0)
    loss, stats = policy_loss(
        logps, torch.zeros(1), torch.tensor([-2.0]), loss=settings, normalizer=1
    )
    loss.backward()
    assert loss.item() == pytest.approx(6.0) and logps.grad.item() == 0
    assert stats["clip_fraction_high"] == 1


@pytest.mark.parametrize("dual_clip", [None, 1.3], ids=["clip", "dual clip"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_reference(seed, dual_clip):
    case = random_case(200, seed)
    bounds = dict(epsilon_low=0.1, epsilon_high=0.3, dual_clip=dual_clip)
    weights = torch.rand(200, dtype=torch.float64)
    loss, _ = policy_loss(
        **case, loss=PolicyLoss(**bounds), normalizer=7.0, importance_weights=weights
    )
    (grad,) = torch.autograd.grad(loss, case["logps"])
    gold = reference.policy_loss(**case, **bounds, normalizer=7.0, importance_weights=weights)
    (gold_grad,) = torch.autograd.grad(gold, case["logps"])
    torch.testing.assert_close(loss, gold, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, gold_grad, rtol=1e-12, atol=0)
    assert 0 < (grad == 0).double().mean() < 0.9  # some are cut, not all


@pytest.mark.parametrize(("ratio", "advantage"), [(1.25, 1.0), (0.75, -1.0)], ids=["high", "low"])
def test_on_the_bound_the_gradient_is_the_unclipped_one(ratio, advantage):
    # 0.25 and its neighbours are exact in binary, so the ratio is exactly on the bound.
    logps = torch.tensor([math.log(ratio)], dtype=torch.float64).requires_grad_()
    bounds = PolicyLoss(epsilon_low=0.25, epsilon_high=0.25)
    assert logps.exp().item() == ratio
    loss, _ = policy_loss(
        logps,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([advantage]),
        loss=bounds,
        normalizer=1,
    )
    loss.backward()
    assert logps.grad.item() == -ratio * advantage


def test_nan_behind_the_mask_reaches_nothing():
    case = random_case(20, dtype=torch.float32)
    masked = ~case["mask"]
    clean, clean_stats = policy_loss(**case, normalizer=3)
    (clean_grad,) = torch.autograd.grad(clean, case["logps"])
    dirty = {name: case[name].detach().clone() for name in ("logps", "old_logps", "advantages")}
    for tensor in dirty.values():
        tensor[masked] = torch.nan
    dirty["logps"].requires_grad_()
    loss, stats = policy_loss(**dirty, mask=case["mask"], normalizer=3)
    loss.backward()
    assert torch.equal(loss, clean) and torch.equal(dirty["logps"].grad, clean_grad)
    assert (clean_grad[masked] == 0).all()
    for name in clean_stats.keys() - {"logps"}:
        assert torch.equal(stats[name], clean_stats[name]), name


@pytest.mark.parametrize(
    ("advantage", "settings"),
    [(1.0, PolicyLoss()), (0.0, PolicyLoss()), (-1.0, PolicyLoss(dual_clip=3.0))],
    ids=["clipped", "no advantage", "dual clip"],
)
def test_ratio_that_overflows_reaches_no_gradient(advantage, settings):
    # exp(99) is inf in fp32; the token's gradient is cut, or 0 by its advantage
    old, logps = torch.tensor([-100.0, -1.0]), torch.tensor([-1.0, -1.0]).requires_grad_()
    advantages = torch.tensor([advantage, 1.0])
    loss, stats = policy_loss(logps, old, advantages, loss=settings, normalizer=1)
    loss.backward()
    assert loss.isfinite() and logps.grad.tolist() == [0.0, -1.0]
    assert stats["ess"].item() == pytest.approx(0.5)  # one token has all the weight


def test_without_old_logps_it_is_the_policy_gradient():
    case = random_case(30)
    loss, stats = policy_loss(case["logps"], None, case["advantages"], normalizer=5)
    (grad,) = torch.autograd.grad(loss, case["logps"])
    torch.testing.assert_close(grad, -case["advantages"] / 5)
    assert stats["ratio_max"] == stats["ess"] == 1 and stats["approx_kl"] == 0


def test_advantages_of_sequences_are_those_of_their_tokens():
    case = random_case(10)
    ends = torch.tensor([0, 4, 4, 9, 10])
    advantages = torch.tensor([1.0, 99.0, -2.0, 0.5], dtype=torch.float64)
    whole, _ = policy_loss(**case | {"advantages": advantages}, normalizer=1, cu_seqlens=ends)
    tokens = advantages.repeat_interleave(ends.diff())
    flat, _ = policy_loss(**case | {"advantages": tokens}, normalizer=1)
    assert torch.equal(whole, flat)


def test_any_split_gives_the_same_gradient():
    case = random_case(50)
    whole, _ = policy_loss(**case, normalizer=40)
    (grad,) = torch.autograd.grad(whole, case["logps"])
    parts = [
        policy_loss(**{name: tensor[rows] for name, tensor in case.items()}, normalizer=40)[0]
        for rows in torch.arange(50).split(7)
    ]
    (summed,) = torch.autograd.grad(sum(parts), case["logps"])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(summed, grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_token_all_is_zero_and_finite(tokens):
    case = random_case(tokens, dtype=torch.float32) | {"mask": torch.zeros(tokens).bool()}
    loss, stats = policy_loss(**case, normalizer=2)
    loss.backward()
    assert loss == 0 and not case["logps"].grad.any()
    assert all(not stats[name].any() for name in stats.keys() - {"logps"})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(old_logps=torch.zeros(2)), "old_logps"),
        (dict(advantages=torch.zeros(2)), "advantages"),
        (dict(mask=torch.zeros(3)), "mask"),
        (dict(normalizer=0), "normalizer"),
        (dict(normalizer=torch.ones(2)), "normalizer"),
        (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens"),
        (dict(importance_weights=torch.zeros(4)), "importance_weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    three = torch.zeros(3)
    arguments = dict(logps=three, old_logps=three, advantages=three, normalizer=1)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        policy_loss(**arguments | change)


@pytest.mark.parametrize(
    "change", [dict(kind="reinforce"), dict(epsilon_low=1.0), dict(dual_clip=0.5)], ids=str
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must be"):
        PolicyLoss(**change)
