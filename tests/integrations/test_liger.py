"""codistill_kernels.integrations.liger: the example, signatures, what Liger does not have and what
is refused. Its numbers are tested in conformance/test_liger.py."""

import inspect

import pytest
import torch
import torch.distributed as dist
from peers import log_softmax_head
from processes import spawn

from codistill_kernels.integrations import liger as ours
from examples import liger_grpo as example

peer = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
B, T, H, V = 3, 7, 8, 31


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(beta=0.0, loss_type="grpo", importance_sampling_level="sequence"),
        dict(loss_type="cispo", epsilon_high=1.5, use_bias_correction_kl=True),
    ],
    ids=["dapo, KL", "sequences", "cispo, corrected KL"],
)
def test_example_trains_as_liger_does(settings, single_thread):
    theirs = example.train(peer.LigerFusedLinearGRPOLoss, compiled=False, **settings)
    fused = example.train(ours.LigerFusedLinearGRPOLoss, **settings)
    assert len(fused) == 20 and len(set(fused)) > 15
    assert fused == pytest.approx(theirs, abs=1e-4)


def arguments_of(function) -> dict:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"}


def test_signatures_are_those_of_liger():
    module = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")
    ops = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    pairs = [
        (getattr(module, name), getattr(ours, name), method)
        for module, name in (
            (peer, "LigerFusedLinearGRPOLoss"),
            (module, "LigerFusedLinearCrossEntropyLoss"),
        )
        for method in ("__init__", "forward")
    ]
    names = ("Function", "TPFunction")
    for name in (f"LigerFusedLinearScaledCrossEntropy{name}" for name in names):
        pairs.append((getattr(ops, name), getattr(ours, name), "apply"))
    for theirs, mine, method in pairs:
        expected, got = (arguments_of(getattr(owner, method)) for owner in (theirs, mine))
        assert got == expected, (mine, method)


def make_case():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in ((B, T, H), (V, H)))
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.3
    return x, weight, ids, mask, torch.randn(B, generator=generator)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo", "sapo"])
def test_advantages_of_tokens(kind, beta):
    x, weight, ids, mask, advantages = make_case()
    loss = ours.LigerFusedLinearGRPOLoss(beta=beta, use_ref_model=False, loss_type=kind)
    old = log_softmax_head(x, weight, ids)[0] + 0.3 * torch.sin(torch.arange(T))
    of_sequences = loss(x, weight, ids, mask, advantages, old_per_token_logps=old)
    each = advantages[:, None].expand(B, T)
    of_tokens = loss(x, weight, ids, mask, each, old_per_token_logps=old)
    torch.testing.assert_close(of_tokens, of_sequences)
    flipped = loss(x, weight, ids, mask, each * torch.linspace(-1, 1, T), old_per_token_logps=old)
    assert not torch.allclose(flipped[0], of_sequences[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_masks_of_any_dtype_hide_what_is_behind(dtype, beta):
    x, weight, ids, mask, advantages = make_case()
    loss = ours.LigerFusedLinearGRPOLoss(beta=beta, use_bias_correction_kl=beta > 0)
    logps = log_softmax_head(x, weight, ids)[0]
    results = []
    for value in (0.0, torch.nan):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        hidden = torch.where(mask[..., None], leaves[0], value)
        old, reference = (torch.where(mask, logps + d, value) for d in (0.1, 0.2))
        terms = dict(old_per_token_logps=old, ref_per_token_logps=reference)
        result, metrics = loss(hidden, leaves[1], ids, mask.to(dtype), advantages, **terms)
        result.backward()
        results.append([result.detach(), *metrics, *(leaf.grad for leaf in leaves)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_no_token_at_all():
    x, weight, ids, mask, advantages = make_case()
    for kind in ("grpo", "bnpo", "dapo"):
        loss = ours.LigerFusedLinearGRPOLoss(beta=0.0, loss_type=kind)
        value, metrics = loss(x.requires_grad_(), weight, ids, mask & False, advantages)
        value.backward()
        assert value == 0 and metrics == (0,) and not x.grad.any()
    nothing = ours.LigerFusedLinearCrossEntropyLoss()(weight, x[0], torch.full((T,), -100))
    assert nothing == 0


def shards(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    x, weight, ids, mask, advantages = make_case()
    x, weight, ids = x.flatten(0, 1), weight[:30], ids.flatten() % 30
    results = []
    for sharded in (False, True):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        if sharded:
            nll, entropy = ours.LigerFusedLinearScaledCrossEntropyTPFunction.apply(
                leaves[0], leaves[1].chunk(2)[rank], ids, None, 0.8, -100, 1, True
            )
        else:
            nll, entropy = log_softmax_head(*leaves, ids, temperature=0.8)
            nll = -nll
        (nll - 0.3 * entropy).sum().backward()
        results.append([nll.detach(), entropy.detach(), leaves[0].grad, leaves[1].grad])
    rows = slice(15 * rank, 15 * rank + 15)
    results[0][3], results[1][3] = (result[3][rows] for result in results)
    for other, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)
    # dapo divides by the tokens of all processes, and gradients are averaged. At a ratio of 1 the
    # loss is the mean advantage.
    loss = ours.LigerFusedLinearGRPOLoss(beta=0.0)
    x, weight, ids, mask, advantages = make_case()
    mine = slice(0, 1) if rank == 0 else slice(1, B)
    expected = -(advantages[:, None] * mask).sum() / mask.sum()
    for given in (None, mask.sum()):
        arguments = (t[mine] for t in (ids, mask, advantages))
        part = loss(x[mine], weight, *arguments, num_items_in_batch=given)[0]
        dist.all_reduce(part)
        torch.testing.assert_close(part / 2, expected)
    dist.barrier()
    dist.destroy_process_group()


def test_processes(tmp_path):
    spawn(shards, str(tmp_path), processes=2)


GRPO, CE = ours.LigerFusedLinearGRPOLoss, ours.LigerFusedLinearCrossEntropyLoss


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (GRPO, dict(loss_type="ppo"), "loss_type must be one of grpo"),
        (GRPO, dict(delta=1.1), "delta must be at least 1 \\+ epsilon_high = 1.2"),
        (GRPO, dict(delta=2.0, loss_type="sapo"), "delta must be None with sapo"),
        (GRPO, dict(loss_type="dr_grpo"), "max_completion_length must be given"),
        (GRPO, dict(loss_type="luspo"), "importance_sampling_level must be sequence with luspo"),
        (
            GRPO,
            dict(loss_type="vespo", importance_sampling_level="sequence"),
            "importance_sampling_level must be token with vespo",
        ),
        (CE, dict(ce_weight=torch.ones(3)), "ce_weight must be None"),
        (CE, dict(label_smoothing=0.1), "label_smoothing must be left at its default"),
        (CE, dict(lse_square_scale=1e-4), "lse_square_scale must be left at its default"),
        (CE, dict(return_z_loss=True), "return_z_loss must be left at its default"),
        (CE, dict(return_token_accuracy=True), "return_token_accuracy must be left"),
        (CE, dict(return_predicted_tokens=True), "return_predicted_tokens must be left"),
        (CE, dict(reduction="max"), "reduction must be mean, sum or none"),
    ],
)
def test_refused_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_arguments():
    x, weight, ids, mask, advantages = make_case()
    with pytest.raises(ValueError, match="ref_per_token_logps or ref_input must be given"):
        GRPO()(x, weight, ids, mask, advantages)
    with pytest.raises(ValueError, match="selected_token_ids must be"):
        GRPO(beta=0.0)(x, weight, ids[:, 1:], mask, advantages)
    with pytest.raises(ValueError, match="selected_token_ids must be None"):
        ours.LigerFusedLinearScaledCrossEntropyFunction.apply(
            x[0], weight, ids[0], selected_token_ids=ids[0]
        )
