"""policy_loss against the very lines of TRL's GRPO trainer, on padded log-probabilities in fp64."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from codistill_kernels import PolicyLoss, policy_loss

B, T, LIMIT = 6, 9, 12

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


class FakeTrainer:
    """What `_compute_loss` asks of its trainer."""

    def __init__(
        self,
        logps,
        entropy,
        *,
        loss_type,
        level="token",
        delta=None,
        entropy_coef=0.0,
        epsilon_high=0.3,
        is_corrected=False,
    ):
        from trl import GRPOTrainer

        self.loss_type, self.importance_sampling_level = loss_type, level
        self.epsilon_low, self.epsilon_high, self.beta = 0.1, epsilon_high, 0.0
        self.entropy_coef, self._entropy_bonus_enabled = entropy_coef, entropy_coef != 0
        self.use_vllm = self.vllm_importance_sampling_correction = is_corrected
        self.max_completion_length, self.current_gradient_accumulation_steps = LIMIT, 1
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.use_adaptive_entropy = self.aux_loss_enabled = False
        self.model, self._metrics = SimpleNamespace(training=True), defaultdict(_Metrics)
        self.args = SimpleNamespace(
            delta=delta,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.25,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        )
        self.accelerator = SimpleNamespace(
            gather=lambda tensor: tensor,
            reduce=lambda tensor, reduction: tensor,
            num_processes=1,
            sync_gradients=True,
        )
        self.get_gamma_weights = GRPOTrainer.get_gamma_weights
        self.compute_loss = GRPOTrainer._compute_loss
        self._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropy, None)


class _Metrics(defaultdict):
    def __init__(self):
        super().__init__(list)


def padded_batch():
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([9, 5, 1, 7, 9, 3])
    old = -0.6 - 3 * rand(B, T)
    logps = (old + 0.8 * (rand(B, T) - 0.5)).requires_grad_()
    return dict(
        logps=logps,
        old_logps=old,
        entropy=rand(B, T).requires_grad_(),
        advantages=torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3, -0.2]).double(),
        mask=torch.arange(T) < lengths[:, None],
        importance_weights=0.5 + rand(B, T),
    )


@pytest.mark.parametrize("is_corrected", [False, True], ids=["", "importance weights"])
@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name, is_corrected):
    pytest.importorskip("trl")
    arguments, settings = CASES[name]
    case = padded_batch()
    mask, tokens = case["mask"], case["mask"].sum()
    trainer = FakeTrainer(case["logps"], case["entropy"], **arguments, is_corrected=is_corrected)
    ids = torch.ones(B, T, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids,
        prompt_mask=ids,
        completion_ids=ids,
        completion_mask=mask.long(),
        advantages=case["advantages"],
        old_per_token_logps=case["old_logps"],
        num_items_in_batch=tokens,
    )
    if is_corrected:
        inputs["importance_sampling_ratio"] = case["importance_weights"].where(mask, 1.0)
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
