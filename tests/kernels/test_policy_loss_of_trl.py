"""policy_loss against the very lines of TRL's GRPO trainer, on padded log-probabilities in fp64."""

import pytest
import torch
from fake_trl import LIMIT, B, FakeTrainer, T, padded_batch, trl_inputs

from codistill_kernels import PolicyLoss, policy_loss

# TRL's arguments, and the PolicyLoss that is the same.
CASES = {
    "grpo": (dict(loss_type="grpo"), PolicyLoss(epsilon_low=0.1, epsilon_high=0.3)),
    "dr_grpo": (dict(loss_type="dr_grpo"), PolicyLoss(epsilon_low=0.1, epsilon_high=0.3)),
    "bnpo": (dict(loss_type="bnpo"), PolicyLoss(epsilon_low=0.1, epsilon_high=0.3)),
    "dapo": (dict(loss_type="dapo"), PolicyLoss(epsilon_low=0.1, epsilon_high=0.3)),
    "dapo, delta": (
        dict(loss_type="dapo", delta=1.5),
        PolicyLoss(epsilon_low=0.1, epsilon_high=0.3, dual_clip=1.5),
    ),
    "dapo, entropy": (
        dict(loss_type="dapo", entropy_coef=0.2),
        PolicyLoss(epsilon_low=0.1, epsilon_high=0.3, entropy_bonus=0.2),
    ),
    "grpo, sequence": (
        dict(loss_type="grpo", level="sequence"),
        PolicyLoss("gspo", epsilon_low=0.1, epsilon_high=0.3),
    ),
    "grpo, sequence, delta": (
        dict(loss_type="grpo", level="sequence", delta=1.4),
        PolicyLoss("gspo", epsilon_low=0.1, epsilon_high=0.3, dual_clip=1.4),
    ),
    "luspo": (
        dict(loss_type="luspo", level="sequence"),
        PolicyLoss("luspo", epsilon_low=0.1, epsilon_high=0.3),
    ),
    "cispo": (
        dict(loss_type="cispo", epsilon_high=1.2),
        PolicyLoss("cispo", epsilon_low=1.0, epsilon_high=0.2),
    ),
    "cispo below 1": (
        dict(loss_type="cispo", epsilon_high=0.3),
        PolicyLoss("cispo", epsilon_low=1.0, epsilon_high=-0.7),
    ),
    "sapo": (dict(loss_type="sapo"), PolicyLoss("sapo", sapo_temperature_negative=1.25)),
    "vespo": (dict(loss_type="vespo"), PolicyLoss("vespo")),
}


@pytest.mark.parametrize("is_corrected", [False, True], ids=["", "importance weights"])
@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name, is_corrected):
    pytest.importorskip("trl")
    arguments, settings = CASES[name]
    case = padded_batch()
    mask, tokens = case["mask"], case["mask"].sum()
    trainer = FakeTrainer(case["logps"], case["entropy"], **arguments, is_corrected=is_corrected)
    inputs = trl_inputs(case, is_corrected=is_corrected)
    theirs = trainer.compute_loss(trainer, None, inputs)

    lengths, normalizer = mask.sum(1), tokens
    advantages = case.pop("advantages")
    if arguments["loss_type"] in ("grpo", "sapo"):
        advantages, normalizer = advantages / lengths, B
    elif arguments["loss_type"] == "luspo":
        normalizer = B
    elif arguments["loss_type"] == "dr_grpo":
        normalizer = B * LIMIT
    if not is_corrected:
        case["importance_weights"] = None
    flat = {key: None if t is None else t.flatten() for key, t in case.items()}
    ends = torch.arange(0, B * T + 1, T)
    ours, _ = policy_loss(
        **flat, advantages=advantages, loss=settings, normalizer=normalizer, cu_seqlens=ends
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [
        torch.autograd.grad(loss, [case["logps"], case["entropy"]], allow_unused=True)
        for loss in (ours, theirs)
    ]
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-12, atol=1e-18)
    if settings.entropy_bonus:
        torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-12, atol=0)
