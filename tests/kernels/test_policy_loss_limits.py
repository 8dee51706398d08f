"""policy_loss at its limits: on the bounds, behind the mask, at an overflow, without tokens."""

import math
from dataclasses import asdict

import pytest
import torch
from losses import (
    ENDS,
    LOSSES,
    every_loss,
    first_step_value,
    flat_case,
    leaf,
    sequence_case,
    with_gradient,
)

from codistill_kernels import PolicyLoss, policy_loss, reference
from codistill_kernels._surrogates import SURROGATES
from codistill_kernels.policy_loss import token_gradients

# 0.25 and 1.25 are exact in binary: the ratio (gmpo: its logarithm) is exactly on the bound.
UP, DOWN = (math.log(1.25), 1.0, 1.25), (math.log(0.75), -1.0, 0.75)
EDGES = [
    (PolicyLoss(kind, 0.25, 0.25), *edge)
    for kind in ("clip", "cispo", "gspo")
    for edge in (UP, DOWN)
]
EDGES += [
    (PolicyLoss("gmpo", 0.25, 0.25), 0.25, 1.0, math.exp(0.25)),
    (PolicyLoss("gmpo", 0.25, 0.25), -0.25, -1.0, math.exp(-0.25)),
    (PolicyLoss("clip", 0.25, 9.0, dual_clip=1.25), math.log(1.25), -1.0, 1.25),
]


@pytest.mark.parametrize(
    ("loss", "edge", "advantage", "ratio"),
    EDGES,
    ids=[f"{case[0].kind} {'high' if case[1] > 0 else 'low'}" for case in EDGES[:-1]]
    + ["dual clip"],
)
def test_on_the_bound_the_gradient_is_the_unclipped_one(loss, edge, advantage, ratio):
    terms = dict(loss=loss, normalizer=1, cu_seqlens=torch.tensor([0, 2]))
    zeros, advantages = torch.zeros(2, dtype=torch.float64), torch.tensor([advantage])
    _, gradient, stats = with_gradient(leaf([edge, edge]), zeros, advantages, **terms)
    assert gradient.tolist() == [-ratio * advantage] * 2
    assert stats["clip_fraction_low"] == stats["clip_fraction_high"] == 0
    beyond = edge + math.copysign(1e-12, edge)
    _, gradient, stats = with_gradient(leaf([beyond, beyond]), zeros, advantages, **terms)
    assert stats["clip_fraction_low"] + stats["clip_fraction_high"] == 1
    assert gradient.tolist() == ([-ratio * advantage] * 2 if loss.kind == "cispo" else [0, 0])


@every_loss
def test_nan_behind_the_mask_reaches_nothing(loss):
    case = sequence_case(dtype=torch.float32)
    masked = ~case["mask"]
    clean, clean_gradient, clean_stats = with_gradient(**case, loss=loss, normalizer=3)
    dirty = {name: tensor.detach().clone() for name, tensor in case.items()}
    for name in ("logps", "old_logps", "importance_weights"):
        dirty[name][masked] = torch.nan
    dirty["advantages"][[1, 3, 7]] = torch.nan  # of sequences without an unmasked token
    dirty["logps"].requires_grad_()
    value, gradient, stats = with_gradient(**dirty, loss=loss, normalizer=3)
    assert torch.equal(value, clean) and torch.equal(gradient, clean_gradient)
    assert (clean_gradient[masked] == 0).all()
    for name in clean_stats.keys() - {"logps"}:
        assert torch.equal(stats[name], clean_stats[name]), name
    closed = token_gradients(
        dirty["logps"].detach(),
        dirty["old_logps"],
        dirty["advantages"],
        loss,
        weights=dirty["importance_weights"],
        keep=case["mask"],
        cu_seqlens=ENDS,
    )
    torch.testing.assert_close(closed / 3, gradient)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reason", ["cut", "no advantage", "no weight"])
def test_ratio_that_overflows_reaches_no_gradient(reason, name):
    # exp(99) is inf in fp32; the gradient of the token is cut, or 0 by its advantage or weight
    advantage = -1.0 if name == "dual clip" or reason == "no weight" else 1.0
    old, logps = torch.tensor([-100.0, -1.0]), leaf([-1.0, -1.0], torch.float32)
    loss, gradient, stats = with_gradient(
        logps,
        old,
        torch.tensor([0.0 if reason == "no advantage" else advantage, 1.0]),
        loss=LOSSES[name],
        normalizer=1,
        importance_weights=torch.tensor([float(reason != "no weight"), 1.0]),
        entropy=torch.zeros(2),
        cu_seqlens=torch.tensor([0, 1, 2]),
    )
    # the weight is bounded
    bounded = {
        "cispo": -1.3,
        "cispo below 1": -0.8,
        "clamped cispo": -math.exp(0.5),
        "clamped vespo": -math.exp(1.0 - 3 * math.expm1(0.5)),
        "reinforce": -1.0,
    }
    pushed = bounded.get(name, 0.0) if reason == "cut" else 0.0
    other = -0.8 if name == "cispo below 1" else -1.0
    assert loss.isfinite() and gradient.tolist() == pytest.approx([pushed, other])
    assert stats["ess"].item() == pytest.approx(0.5)  # one token has all the weight


@every_loss
@pytest.mark.parametrize("infinite", ["weights", "advantages"])
def test_0_times_an_infinite_factor_adds_0(infinite, loss):
    # sequence 0 has advantage 0 and weight inf, or the other way round; sequence 1 adds -1
    advantages, weights = torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, 1.0])
    if infinite == "advantages":
        advantages, weights = weights, advantages
    ends = torch.tensor([0, 1, 2])
    value, gradient, _ = with_gradient(
        leaf([-1.0, -1.0], torch.float32),
        torch.full((2,), -1.0),
        advantages,
        loss=loss,
        normalizer=1,
        importance_weights=weights,
        entropy=torch.zeros(2),
        cu_seqlens=ends,
    )
    slope = 1 + min(loss.epsilon_high, 0.0)  # a cispo bound below 1
    assert value.item() == pytest.approx(-slope * first_step_value(loss, -1.0))
    assert gradient.tolist() == pytest.approx([0, -slope])
    logps, terms = torch.full((2,), -1.0), dict(weights=weights, keep=torch.ones(2).bool())
    closed = token_gradients(logps, logps, advantages, loss, **terms, cu_seqlens=ends)
    assert closed.tolist() == pytest.approx([0, -slope])


@every_loss
def test_nan_is_not_hidden_by_0(loss):
    for factors in ((0.0, torch.nan), (torch.nan, 0.0)):
        advantages, weights = torch.tensor(factors)[:, None]
        terms = dict(cu_seqlens=torch.tensor([0, 1]), importance_weights=weights, normalizer=1)
        terms |= dict(entropy=torch.zeros(1))
        assert policy_loss(torch.zeros(1), None, advantages, loss=loss, **terms)[0].isnan()


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("normalizer", [0, torch.tensor(0)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["clip", "gspo"])
def test_nothing_to_train_on_is_0(name, normalizer, way):
    ends = torch.tensor([0, 1, 3])

    def step(logps, mask):
        terms = dict(loss=LOSSES[name], normalizer=normalizer, cu_seqlens=ends)
        return policy_loss(logps, None, torch.ones(2), mask, **terms)[0]

    torch._dynamo.reset()
    run = step if way == "eager" else torch.compile(step, backend="aot_eager", fullgraph=True)
    logps = leaf([-1.0, -1.0, -1.0], torch.float32)
    value = run(logps, torch.zeros(3, dtype=torch.bool))
    assert value == 0 and torch.autograd.grad(value, logps)[0].tolist() == [0, 0, 0]
    some = run(logps, torch.ones(3, dtype=torch.bool))
    assert some.isinf()  # as the formula has it, in sight


@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SURROGATES)
def test_dtypes_mix_freely(name, other, ours):
    """Against the reference in fp64 of the very numbers that the dtypes hold."""
    case = {key: value.detach() for key, value in sequence_case().items()}
    for key in ("old_logps", "advantages", "importance_weights", "entropy"):
        case[key] = case[key].to(other)
    case["logps"] = case["logps"].to(ours).requires_grad_()
    wide = {key: t.detach().double() if t.is_floating_point() else t for key, t in case.items()}
    gold = reference.policy_loss(**wide, **asdict(LOSSES[name]), normalizer=7.0)
    for normalizer in (7.0, torch.tensor(7.0, dtype=other), torch.tensor(7)):
        value, gradient, stats = with_gradient(**case, loss=LOSSES[name], normalizer=normalizer)
        assert value.dtype == (torch.float64 if ours == torch.float64 else torch.float32)
        assert all(t.dtype == value.dtype for t in stats.values()) and gradient.dtype == ours
        assert value.item() == pytest.approx(gold.item(), rel=1e-5)


def test_slopes_have_the_dtype_of_logps():
    # What the fused op computes: its gradients have the dtype of the log-probabilities.
    old, advantages = torch.full((2,), -1.0, dtype=torch.float64), torch.ones(2).double()
    keep = torch.ones(2, dtype=torch.bool)
    closed = token_gradients(torch.tensor([-0.9, -1]), old, advantages, PolicyLoss(), keep=keep)
    assert closed.dtype == torch.float32 and closed.tolist() == pytest.approx([-(math.e**0.1), -1])


@every_loss
@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 3], [0, 0, 2, 3]], ids=str)
def test_without_a_token_all_is_zero_and_finite(ends, loss):
    tokens = ends[-1]
    case = flat_case(tokens, dtype=torch.float32) | {"mask": torch.zeros(tokens).bool()}
    case |= {"advantages": torch.ones(len(ends) - 1), "cu_seqlens": torch.tensor(ends)}
    value, gradient, stats = with_gradient(**case, loss=loss, normalizer=2)
    assert value == 0 and gradient.shape == (tokens,) and not gradient.any()
    assert all(not stats[name].any() for name in stats.keys() - {"logps", "entropy"})
