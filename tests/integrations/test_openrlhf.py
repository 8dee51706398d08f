"""codistill_kernels.integrations.openrlhf: what is refused. Its numbers are tested in
conformance/test_openrlhf.py."""

import pytest
import torch

from codistill_kernels.integrations.openrlhf import PolicyLoss

CORRECTION = dict(enable_vllm_is_correction=True, vllm_is_truncated_threshold=[0.5, 2.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(policy_loss_type="dpo"), "policy_loss_type must be ppo or gspo"),
        (dict(vllm_is_correction_type="cut"), "vllm_is_correction_type must be one of tis"),
        (dict(dual_clip=1.0), "dual_clip must be > 1"),
        (dict(enable_vllm_is_correction=True), "vllm_is_truncated_threshold must be"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**settings)


def test_refused_arguments():
    tensors = [torch.zeros(2, 3)] * 3
    with pytest.raises(ValueError, match="rollout_log_probs must be given"):
        PolicyLoss(**CORRECTION)(*tensors)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("correction", ["tis", "icepop", "seq-mask-tis"])
def test_padding_counts_for_nothing(kind, correction):
    generator = torch.Generator().manual_seed(0)
    logps, old, advantages, rollout = torch.randn(4, 3, 5, generator=generator)
    mask = torch.rand(3, 5, generator=generator) > 0.3
    mask[-1] = False
    loss = PolicyLoss(policy_loss_type=kind, vllm_is_correction_type=correction, **CORRECTION)
    results = []
    for value in (0.0, torch.nan):
        dirty = [torch.where(mask, t, value) for t in (logps, old, advantages, rollout)]
        dirty[0].requires_grad_()
        outputs = loss(*dirty[:3], mask.long(), dirty[3])
        outputs[0].backward()
        results.append([*(t.detach() for t in outputs if t is not None), dirty[0].grad])
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)
