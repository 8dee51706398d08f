"""codistill_scores and codistill_losses: both models of the paper at once."""

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch._dynamo.testing import CompileCounterWithBackend

from codistill_kernels import (
    PolicyLoss,
    codistill_losses,
    codistill_scores,
    linear_logps,
    linear_policy_loss,
    reference,
)

TERMS = dict(group_size=3, keep=2, alpha=2.0, max_completion_tokens=10)
# Two prompts, three rollouts of 1, 2 and 0 tokens, then 1, 1, 2.
ENDS = torch.tensor([0, 1, 3, 3, 4, 5, 7])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
SMALL = torch.tensor([-1.0, -1.0, -2.0, -1.0, -1.0, -1.0, -1.0])
LARGE = torch.tensor([-2.0, -0.5, -0.5, -1.0, -3.0, -1.5, -1.0])


def test_scores_by_hand():
    scores = codistill_scores(REWARDS, SMALL, LARGE, ENDS, **TERMS)
    # 2/10 times the summed log-ratios -1, 2, 0 and 0, -2, -0.5
    assert scores.kd_rewards.tolist() == pytest.approx([-0.2, 0.4, 0.0, 0.0, -0.4, -0.1])
    assert scores.effective_rewards.tolist() == pytest.approx([0.8, 0.4, 0.0, 1.0, 0.6, -0.1])
    assert scores.kept.tolist() == [0, 2, 3, 5]
    assert scores.small_advantages.tolist() == pytest.approx([0.4, -0.4, 0.55, -0.55])
    assert scores.large_advantages.tolist() == pytest.approx([0.5, -0.5, 0.5, -0.5])
    for found, expected in zip(
        scores, reference.codistill_scores(REWARDS, SMALL, LARGE, ENDS, **TERMS), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_scores_pass_their_options_on():
    options = dict(estimator="k3", scale="std", method="random", seed=1)
    first = codistill_scores(REWARDS, SMALL, LARGE, ENDS, **TERMS, **options)
    again = codistill_scores(REWARDS, SMALL, LARGE, ENDS, **TERMS, **options)
    assert all(map(torch.equal, first, again))
    assert (first.kd_rewards <= 0).all()
    deviations = first.small_advantages.view(2, 2).std(dim=1)
    assert deviations.tolist() == pytest.approx([1.0, 1.0])


def test_scores_leave_masked_tokens_out():
    small = SMALL.clone()
    small[2] = torch.nan
    scores = codistill_scores(REWARDS, small, LARGE, ENDS, **TERMS, mask=torch.arange(7) != 2)
    # the second rollout keeps 0.5 of its log-ratios 0.5 and 1.5
    assert scores.kd_rewards.tolist() == pytest.approx([-0.2, 0.1, 0.0, 0.0, -0.4, -0.1])


def test_scores_of_halves_are_fp32():
    small, large, rewards = (t.bfloat16() for t in (SMALL / 480, LARGE, REWARDS))
    scores = codistill_scores(rewards, small, large, ENDS, **TERMS)
    wide = codistill_scores(*(t.double() for t in (rewards, small, large)), ENDS, **TERMS)
    for found, gold in zip(scores, wide, strict=True):
        assert found.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(found, gold.to(found.dtype), rtol=1e-6, atol=1e-7)


def test_scores_without_a_rollout():
    none = torch.zeros(0)
    scores = codistill_scores(none, none, none, torch.tensor([0]), **TERMS)
    assert [len(part) for part in scores] == [0] * 5


def test_scores_of_all_lengths_share_a_graph():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled = torch.compile(codistill_scores, fullgraph=True, dynamic=True, backend=count)
    for length in range(9, 42, 3):
        tokens = torch.arange(2.0 * length)
        arguments = (
            tokens[:length].sin(),
            tokens.sin(),
            tokens.cos(),
            2 * torch.arange(length + 1),
        )
        found, expected = (f(*arguments, **TERMS) for f in (compiled, codistill_scores))
        assert all(map(torch.equal, found, expected))
    assert count.frame_count <= 2


def make_models(rows=40, small=(24, 300), large=(32, 310), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    models = tuple((leaf(rows, h), leaf(v, h)) for h, v in (small, large))
    ids = torch.randint(0, 290, (rows,), generator=generator)
    return *models, ids


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_losses_are_eq_5_and_eq_10(backend):
    """Against the definition in fp64; both ratios are over the small model's old policy."""
    small, large, ids = make_models()
    old = linear_logps(*small, ids).detach() + 0.1 * torch.sin(torch.arange(40.0))
    mask = torch.arange(40) % 7 != 0
    advantages = torch.cos(torch.arange(40.0)), torch.sin(3 * torch.arange(40.0))
    terms = (ids, old, *advantages, mask)
    (first, stats), (second, large_stats) = codistill_losses(
        small, large, *terms, normalizer=9.0, backend=backend
    )
    (first + second).backward()
    copies = [
        tuple(t.detach().double().requires_grad_() for t in model) for model in (small, large)
    ]
    expected = reference.codistill_losses(*copies, *terms, normalizer=9.0)
    sum(expected).backward()
    torch.testing.assert_close(first, expected[0].float())
    torch.testing.assert_close(second, expected[1].float())
    for model, copy in zip((small, large), copies, strict=True):
        for ours, gold in zip(model, copy, strict=True):
            torch.testing.assert_close(ours.grad, gold.grad.float(), rtol=1e-4, atol=1e-5)
    ratio = (stats["logps"] - old)[mask].exp()
    torch.testing.assert_close(stats["ratio_mean"], ratio.mean())
    assert large_stats["ess"] < stats["ess"]  # it did not write the tokens


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("biased", ["both", "small", "large"])
def test_heads_with_bias(backend, biased):
    """Each model's own; None is no bias. Against the definition in fp64."""
    small, large, ids = make_models()
    bias, large_bias = (torch.linspace(-2, 2, v).sin().requires_grad_() for v in (300, 310))
    small = (*small, None if biased == "large" else bias)
    large = large if biased == "small" else (*large, large_bias)
    numbers = torch.arange(40.0)
    terms = (ids, torch.full((40,), -6.0), torch.cos(numbers), torch.sin(3 * numbers))
    first, second = codistill_losses(small, large, *terms, normalizer=9.0, backend=backend)
    losses = torch.stack((first[0], second[0]))
    losses.sum().backward()
    copies = [
        tuple(None if t is None else t.detach().double().requires_grad_() for t in model)
        for model in (small, large)
    ]
    expected = torch.stack(reference.codistill_losses(*copies, *terms, normalizer=9.0))
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.float())
    for ours, gold in zip((*small, *large), (*copies[0], *copies[1]), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad, gold.grad.float(), rtol=1e-4, atol=1e-5)


def losses_and_gradients(models, terms, **options):
    """Both losses, and the gradients of their sum by every tensor of the models."""
    leaves = [[t.detach().clone().requires_grad_() for t in model] for model in models]
    (first, _), (second, _) = codistill_losses(*leaves, *terms, normalizer=9.0, **options)
    (first + second).backward()
    grads = [[leaf.grad for leaf in model] for model in leaves]
    return [first.detach(), second.detach()], grads


def halves_of_both(rank: int, folder: str) -> None:
    """One of two processes: its halves of both heads and biases give what the whole gives."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    *models, ids = make_models()
    models = [(*model, torch.linspace(-1, 1, len(model[1]))) for model in models]
    numbers = torch.arange(40.0)
    terms = (ids, torch.full((40,), -6.0), torch.cos(numbers), torch.sin(3 * numbers))

    def mine(model):
        hidden_states, *head = model
        return hidden_states, *(part.chunk(2)[rank] for part in head)

    losses, grads = losses_and_gradients(models, terms)
    found, parts = losses_and_gradients(map(mine, models), terms, group=dist.group.WORLD)
    torch.testing.assert_close(found, losses)
    for one, other in zip(parts, map(mine, grads), strict=True):
        torch.testing.assert_close(tuple(one), other, rtol=2e-5, atol=2e-6)
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


def test_sharded_heads_equal_whole(tmp_path):
    spawn(halves_of_both, str(tmp_path), processes=2)


def test_options_reach_both_models_and_large_loss_only_one():
    small, large, ids = make_models()
    ends = torch.tensor([0, 15, 40])
    old = torch.full((40,), -6.0)
    advantages = torch.tensor([1.0, -1.0]), torch.tensor([-0.5, 2.0])
    options = dict(normalizer=3.0, cu_seqlens=ends, temperature=0.8, vocab_size=295, softcap=9.0)
    results = codistill_losses(
        small,
        large,
        ids,
        old,
        *advantages,
        large_loss=PolicyLoss("gspo"),
        logit_scale=(0.5, 1.5),
        **options,
    )
    settings = (dict(logit_scale=0.5), dict(loss=PolicyLoss("gspo"), logit_scale=1.5))
    for model, (loss, _), advantage, setting in zip(
        (small, large), results, advantages, settings, strict=True
    ):
        expected, _ = linear_policy_loss(*model, ids, old, advantage, **setting, **options)
        assert torch.equal(loss, expected)


def test_mistakes_are_named():
    small, large, ids = make_models()
    old = torch.zeros(40)
    with pytest.raises(ValueError, match="^large must be"):
        codistill_losses(small, (large[0][:39], large[1]), ids, old, old, old, normalizer=1.0)
    for change in (
        dict(small=large[0]),
        dict(small=(*small, old)),
        dict(large=(*large, None, None)),
        dict(large=(large[0].numpy(force=True), large[1])),
        dict(token_ids=ids.numpy()),
        dict(small_old_logps=None),
        dict(small_advantages=1.0),
        dict(large_advantages=old.to("meta")),
        dict(logit_scale=(1.0, 1.0, 1.0)),
    ):
        terms = dict(small=small, large=large, token_ids=ids, small_old_logps=old)
        terms |= dict(small_advantages=old, large_advantages=old, normalizer=1.0)
        with pytest.raises(ValueError, match=f"^{next(iter(change))} must be"):
            codistill_losses(**terms | change)


@pytest.mark.parametrize(
    "change",
    [
        dict(keep=5),
        dict(estimator="exact"),
        dict(seed=1),
        dict(eps=0.1),
        dict(mask=torch.ones(7)),
        dict(small_logps=SMALL.numpy()),
        dict(large_logps=LARGE.to("meta")),
        dict(large_logps=LARGE[:6]),
        dict(cu_seqlens=ENDS.short()),
    ],
    ids=lambda change: next(iter(change)),
)
def test_mistakes_in_scores_are_named(change):
    terms = dict(rewards=REWARDS, small_logps=SMALL, large_logps=LARGE, cu_seqlens=ENDS)
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must be"):
        codistill_scores(**terms | TERMS | change)
