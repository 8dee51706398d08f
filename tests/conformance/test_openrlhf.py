"""OpenRLHF's cases: its policy loss, aggregation over ranks, log-probabilities and entropy."""

import pytest
import torch
from peers import log_softmax_head, openrlhf_loss

from codistill_kernels.integrations import openrlhf
from conformance.cases import grid
from conformance.test_verl import loss_case, run


@grid(
    default=60,
    kind=["ppo", "gspo"],
    far=[None, 1.5, 3.0],
    correction=[None, "tis", "icepop", "seq-mask-tis"],
    by_token=[False, True],
    copies=[1, 2],
    per_token=[False, True],
)
def test_policy_loss(kind, far, correction, by_token, copies, per_token):
    logps, old, advantages, mask, weights = loss_case(per_token)
    mask[-1, 0] = correction is not None  # in OpenRLHF a sequence without a token would be 0 / 0
    # Ratios of tokens and of sequences are on both sides of both thresholds.
    rollout = old + 1.5 * (weights - 1).roll(1)
    rollout[0], rollout[1] = rollout[0] - 0.6, rollout[1] + 0.6
    loss = openrlhf.PolicyLoss(
        dual_clip=far,
        token_level_loss=by_token,
        policy_loss_type=kind,
        enable_vllm_is_correction=correction is not None,
        vllm_is_truncated_threshold=[0.8, 1.3],
        vllm_is_correction_type=correction or "tis",
    )
    counts = dict(dp_size=2, batch_num_tokens=50, global_batch_size=7) if copies == 2 else {}
    got = run(lambda leaf: loss(leaf, old, advantages, mask.double(), rollout, **counts), logps)
    counted = dict(copies=2, tokens=50, sequences=7) if copies == 2 else {}
    settings: dict = dict(kind=kind, far=far, correction=correction, by_token=by_token)
    expected = run(
        lambda leaf: openrlhf_loss(leaf, old, advantages, mask, rollout, **settings, **counted),
        logps,
    )
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-6)
    _, clip_ratio, ppo_kl, vllm_kl = loss(logps, old, advantages, mask, rollout)
    difference = logps - (rollout if kind == "gspo" and correction else old)
    if kind == "gspo":
        difference = torch.where(mask, difference, 0.0).sum(-1, keepdim=True)
        difference = (difference / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape)
    ratio = difference.exp()
    cut = (ratio > 1.2) & (advantages > 0) | (ratio < 0.8) & (advantages < 0)
    torch.testing.assert_close(clip_ratio.double(), cut[mask].double().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ppo_kl, (old - logps)[mask].mean())
    assert (vllm_kl is not None) == (kind == "ppo" and correction is not None)
    if vllm_kl is not None:
        torch.testing.assert_close(vllm_kl, (rollout - old)[mask].mean())


@pytest.mark.parametrize("by_token", [False, True])
def test_split_over_ranks(by_token):
    """The mean of the ranks' losses is the whole batch's; an empty sequence is left out."""
    logps, old, advantages, mask, _ = loss_case(per_token=True)
    loss = openrlhf.PolicyLoss(token_level_loss=by_token)
    whole = loss(logps, old, advantages, mask)[0]
    counts = dict(dp_size=2, batch_num_tokens=mask.sum(), global_batch_size=4)
    parts = [
        loss(*(t[rows] for t in (logps, old, advantages, mask)), **counts)[0]
        for rows in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy_of_unscaled_logits(temperature):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in ((3, 7, 16), (61, 16)))
    labels = torch.randint(0, 61, (3, 7), generator=generator)
    results = []
    for ours in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        if ours:
            outputs = openrlhf.linear_log_probs(*leaves, labels, temperature, return_entropy=True)
            alone = openrlhf.linear_log_probs(*leaves, labels, temperature)
            assert torch.equal(alone, outputs[0])
        else:
            _, entropy = log_softmax_head(*leaves, labels)
            outputs = log_softmax_head(*leaves, labels, temperature=temperature)[0], entropy
        (outputs[0] - 0.3 * outputs[1]).sum().backward()
        results.append([*(t.detach() for t in outputs), *(t.grad for t in leaves)])
    for other, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_from_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 31, generator=generator).to(dtype)
    labels = torch.randint(0, 31, (2, 5), generator=generator)
    before = logits.clone()
    got = openrlhf.log_probs_from_logits(logits, labels, 0.7)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(logits, before)
