"""policy_loss of every kind: the reference, other trainers' formulas, its promises one by one."""

import math
from dataclasses import asdict

import pytest
import torch
from losses import (
    ENDS,
    LOSSES,
    every_loss,
    flat_case,
    has_bounds,
    sequence_case,
    with_gradient,
)

from codistill_kernels import PolicyLoss, linear_logps, linear_policy_loss, policy_loss, reference
from codistill_kernels._surrogates import SURROGATES, Surrogate
from codistill_kernels.policy_loss import token_gradients

# --- against definitions -----------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_reference(seed, loss):
    case = sequence_case(seed)
    ours, gradient, stats = with_gradient(**case, loss=loss, normalizer=7.0)
    gold = reference.policy_loss(**case, **asdict(loss), normalizer=7.0)
    (gold_gradient,) = torch.autograd.grad(gold, case["logps"])
    torch.testing.assert_close(ours, gold.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, gold_gradient, rtol=1e-12, atol=0)
    fractions = stats["clip_fraction_low"] + stats["clip_fraction_high"]
    if loss.kind in ("clip", "dppo_tv", "dppo_kl") and loss.log_ratio_clamp is None:
        torch.testing.assert_close(fractions, (gradient == 0)[case["mask"]].double().mean())
    if has_bounds(loss):
        assert stats["clip_fraction_low"] > 0
        assert stats["clip_fraction_high"] > 0 or loss == LOSSES["clamped cispo"]
    elif loss.log_ratio_clamp is None:
        assert fractions == 0
    assert (gradient != 0).sum() > 10
    assert torch.equal(stats["entropy"], case["entropy"].detach())


@every_loss
def test_entropy_bonus(loss):
    bonus, case = 0.25, sequence_case()
    case["entropy"].data[~case["mask"]] = torch.nan  # behind the mask it reaches nothing
    settings = asdict(loss) | {"entropy_bonus": bonus}
    value, _ = policy_loss(**case, loss=PolicyLoss(**settings), normalizer=7.0)
    gold = reference.policy_loss(**case, **settings, normalizer=7.0)
    torch.testing.assert_close(value, gold, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value, case["entropy"])
    assert gradient.tolist() == [-bonus / 7 * keep for keep in case["mask"].tolist()]


def test_entropy_bonus_needs_an_entropy():
    with pytest.raises(ValueError, match="^entropy must be given"):
        policy_loss(*torch.zeros(3, 2), loss=PolicyLoss(entropy_bonus=0.1), normalizer=1)


def slopes_and_gradient(loss, seed):
    """The closed form, and what autograd makes of the value."""
    case = sequence_case(seed)
    _, gradient, _ = with_gradient(**case, loss=loss, normalizer=1.0)
    arguments = (case["logps"].detach(), case["old_logps"], case["advantages"], loss)
    weights, keep = case["importance_weights"], case["mask"]
    return token_gradients(*arguments, weights=weights, keep=keep, cu_seqlens=ENDS), gradient


@every_loss
def test_slopes_are_those_of_autograd(loss):
    for seed in range(3):
        closed, gradient = slopes_and_gradient(loss, seed)
        torch.testing.assert_close(closed, gradient, rtol=1e-14, atol=1e-18)


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s._replace(slope=s.slope * 1.001),
        lambda s: s._replace(slope=s.slope * (torch.arange(60) < 50)),
        lambda s: s._replace(value=s.value + 1e-9 * s.value.detach().square() * s.value),
    ],
    ids=["slope", "slope of some tokens", "value"],
)
def test_a_wrong_line_of_the_table_is_found(kind, wrong, monkeypatch):
    """A kind added without a right slope, or value, fails the comparisons above."""
    line = SURROGATES[kind]

    def mutant(*arguments) -> Surrogate:
        return wrong(line.surrogate(*arguments))

    monkeypatch.setitem(SURROGATES, kind, line._replace(surrogate=mutant))
    with pytest.raises(AssertionError):
        test_slopes_are_those_of_autograd(LOSSES[kind])
        test_equals_reference(0, LOSSES[kind])


@every_loss
def test_gradients_are_those_of_finite_differences(loss):
    if loss.kind == "cispo":  # c is held fixed in its gradient; with both bounds at 1 it is fixed
        loss = PolicyLoss("cispo", epsilon_low=0.0, epsilon_high=0.0)
    elif not SURROGATES[loss.kind].follows_ratio and loss.kind != "reinforce":
        return  # the weight is held fixed
    case = sequence_case(3)
    logps = case.pop("logps")
    assert torch.autograd.gradcheck(
        lambda logps: policy_loss(logps, **case, loss=loss, normalizer=3.0)[0], logps, eps=1e-7
    )


def test_cispo_in_linear_policy_loss():
    generator = torch.Generator().manual_seed(0)
    case = sequence_case() | {"token_ids": torch.randint(0, 11, (60,), generator=generator)}
    del case["logps"], case["entropy"]
    case["old_logps"] = case["old_logps"] / 4 - 1.8  # near log(1/11): some ratios are within bounds
    hidden = torch.randn(60, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = 0.3 * torch.randn(11, 5, generator=generator, dtype=torch.float64)
    fused, _ = linear_policy_loss(hidden, weight, **case, loss=LOSSES["cispo"], normalizer=2.0)
    logps = linear_logps(hidden, weight, case.pop("token_ids"))
    plain, stats = policy_loss(logps, **case, loss=LOSSES["cispo"], normalizer=2.0)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss, hidden)[0] for loss in (fused, plain))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=0)
    assert 0 < stats["clip_fraction_low"] + stats["clip_fraction_high"] < 1


def padded_token_losses(kind, case, width):
    """[S, T] losses as TRL writes them, and the mask. MiniMax's cispo has no lower bound there."""
    lengths = ENDS.diff()
    inside = torch.arange(width) < lengths[:, None]
    logps, old = torch.zeros(2, 8, width, dtype=torch.float64)
    mask = torch.zeros(8, width, dtype=torch.bool)
    logps = logps.masked_scatter(inside, case["logps"])
    old = old.masked_scatter(inside, case["old_logps"])
    mask = mask.masked_scatter(inside, case["mask"])
    advantages = case["advantages"][:, None]
    log_weights = logps - old
    if kind == "gspo":
        log_weights = (log_weights * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        log_weights = log_weights[:, None]
    coef_1 = torch.exp(log_weights)
    if kind == "cispo":
        losses = -torch.clamp(coef_1, max=1.3).detach() * advantages * logps
    else:
        coef_2 = torch.clamp(coef_1, 1 - 0.1, 1 + 0.3)
        losses = -torch.min(coef_1 * advantages, coef_2 * advantages)
    return losses, mask


@pytest.mark.parametrize("kind", ["clip", "cispo", "gspo"])
@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_normalizers_of_other_trainers(aggregation, kind):
    case = sequence_case()
    del case["importance_weights"]
    case["mask"][20] = True  # GRPO divides by the length of each
    losses, mask = padded_token_losses(kind, case, width=32)
    if aggregation == "grpo":
        expected = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        lengths = torch.segment_reduce(case["mask"].double(), "sum", lengths=ENDS.diff())
        case["advantages"] = case["advantages"] / lengths.clamp(min=1)
    elif aggregation == "dr_grpo":
        expected = (losses * mask).sum() / (losses.size(0) * 32)
    elif aggregation == "bnpo":
        expected = (losses * mask).sum() / mask.sum().clamp(min=1.0)
    else:  # 100 other tokens are in other processes
        expected = (losses * mask).sum() / (mask.sum() + 100)
    tokens = case["mask"].sum()
    normalizer = {"grpo": 8, "dr_grpo": 8 * 32, "bnpo": tokens, "dapo": tokens + 100}[aggregation]
    settings = PolicyLoss(kind, 1.0 if kind == "cispo" else 0.1, 0.3)
    ours, gradient, _ = with_gradient(**case, loss=settings, normalizer=normalizer)
    (gold_gradient,) = torch.autograd.grad(expected, case["logps"])
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, gold_gradient, rtol=1e-12, atol=0)


# --- promises ----------------------------------------------------------------------------------


@every_loss
def test_without_old_logps_it_is_the_policy_gradient(loss):
    case = sequence_case() | {"old_logps": None, "mask": None, "importance_weights": None}
    _, gradient, stats = with_gradient(**case, loss=loss, normalizer=5)
    slope = 1 + min(loss.epsilon_high, 0.0)  # a cispo bound below 1
    expected = -slope * case["advantages"].repeat_interleave(ENDS.diff()) / 5
    torch.testing.assert_close(gradient, expected)
    assert stats["ratio_max"] == stats["ess"] == 1 and stats["approx_kl"] == 0


@pytest.mark.parametrize("name", ["clip", "dual clip", "cispo"])
def test_advantages_of_sequences_are_those_of_their_tokens(name):
    case = sequence_case()
    whole = with_gradient(**case, loss=LOSSES[name], normalizer=1)
    flat = case | {"advantages": case["advantages"].repeat_interleave(ENDS.diff())}
    flat = with_gradient(**flat | {"cu_seqlens": None}, loss=LOSSES[name], normalizer=1)
    assert torch.equal(whole[0], flat[0]) and torch.equal(whole[1], flat[1])


@every_loss
@pytest.mark.parametrize("sequences", [3, 5])
def test_micro_batches_sum_to_the_batch(sequences, loss):
    case = sequence_case()
    whole, gradient, _ = with_gradient(**case, loss=loss, normalizer=40)
    parts = []
    for rows in (slice(0, sequences), slice(sequences, 8)):
        ends = ENDS[rows.start : rows.stop + 1]
        tokens = slice(int(ends[0]), int(ends[-1]))
        part = {name: tensor[tokens] for name, tensor in case.items()}
        part |= {"advantages": case["advantages"][rows], "cu_seqlens": (ends - ends[0]).int()}
        parts.append(with_gradient(**part, loss=loss, normalizer=40))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole, rtol=1e-12, atol=0)
    assert torch.equal(torch.cat([part[1] for part in parts]), gradient)  # to the bit


def test_flat_tokens_may_be_split_anywhere():
    case = flat_case(50)
    whole, gradient, _ = with_gradient(**case, normalizer=40)
    parts = [
        policy_loss(**{name: tensor[rows] for name, tensor in case.items()}, normalizer=40)[0]
        for rows in torch.arange(50).split(7)
    ]
    (summed,) = torch.autograd.grad(sum(parts), case["logps"])
    torch.testing.assert_close(sum(parts).detach(), whole, rtol=1e-12, atol=0)
    assert torch.equal(summed, gradient)


@pytest.mark.parametrize("kind", ["gspo", "gmpo"])
def test_long_sequences_lose_no_digits(kind):
    # One fp32 sum after the other would be off by 2e-4 of the mean.
    logps, old = torch.full((20000,), 0.1), torch.zeros(20000)
    terms = dict(loss=PolicyLoss(kind, 0.2, 0.2), normalizer=1, cu_seqlens=torch.tensor([0, 20000]))
    loss, _ = policy_loss(logps, old, torch.ones(1), **terms)
    assert loss.item() == pytest.approx(-20000 * math.exp(logps[0].item()), rel=1e-6)


@every_loss
def test_compiles_as_one_graph(loss):
    case = sequence_case(dtype=torch.float32)
    logps = case.pop("logps")

    def step(logps):
        return policy_loss(logps, **case, loss=loss, normalizer=3.0)

    torch._dynamo.reset()
    found, found_stats = torch.compile(step, fullgraph=True, backend="aot_eager")(logps)
    (found_gradient,) = torch.autograd.grad(found, logps)
    value, gradient, stats = with_gradient(logps, **case, loss=loss, normalizer=3.0)
    torch.testing.assert_close(found.detach(), value)
    torch.testing.assert_close(found_gradient, gradient)
    for name in stats:
        torch.testing.assert_close(found_stats[name], stats[name])


# --- mistakes ----------------------------------------------------------------------------------

META = torch.zeros(3, device="meta")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(old_logps=torch.zeros(2)), "old_logps"),
        (dict(advantages=torch.zeros(2)), "advantages"),
        (dict(mask=torch.zeros(3)), "mask"),
        (dict(normalizer=-1), "normalizer"),
        (dict(normalizer=torch.tensor(-1.0)), "normalizer"),
        (dict(normalizer=math.nan), "normalizer"),
        (dict(normalizer="3"), "normalizer"),
        (dict(normalizer=torch.tensor(1.0, device="meta")), "normalizer"),
        (dict(loss="clip"), "loss"),
        (dict(logps=torch.zeros(3).numpy()), "logps"),
        (dict(old_logps=torch.zeros(3).numpy()), "old_logps"),
        (dict(advantages=1.0), "advantages"),
        (dict(mask=torch.ones(3).bool().numpy()), "mask"),
        (dict(cu_seqlens=[0, 3]), "cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0, 1, 2, 3]).short()), "cu_seqlens"),
        (dict(old_logps=META), "old_logps"),
        (dict(advantages=META), "advantages"),
        (dict(importance_weights=META), "importance_weights"),
        (dict(mask=META.bool()), "mask"),
        (dict(cu_seqlens=torch.zeros(4, dtype=torch.int64, device="meta")), "cu_seqlens"),
        (dict(normalizer=torch.ones(2)), "normalizer"),
        (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0, 1, 3])), "advantages"),
        (dict(loss=PolicyLoss("gspo")), "cu_seqlens"),
        (dict(loss=PolicyLoss("gmpo")), "cu_seqlens"),
        (dict(importance_weights=torch.zeros(4)), "importance_weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    three = torch.zeros(3)
    arguments = dict(logps=three, old_logps=three, advantages=three, normalizer=1)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        policy_loss(**arguments | change)
