"""TRL's GRPO loss without its trainer: on padded log-probabilities in fp64."""

from collections import defaultdict
from types import SimpleNamespace

import torch

B, T, LIMIT = 6, 9, 12


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
        beta=0.0,
        has_bias_correction=True,
        adaptive_entropy=None,
    ):
        from trl import GRPOTrainer

        self.loss_type, self.importance_sampling_level = loss_type, level
        self.epsilon_low, self.epsilon_high, self.beta = 0.1, epsilon_high, beta
        self.entropy_coef, self._entropy_bonus_enabled = entropy_coef, entropy_coef != 0
        self.use_adaptive_entropy = adaptive_entropy is not None
        self._last_world_entropy, self._entropy_window_stats = adaptive_entropy, None
        self.use_vllm = self.vllm_importance_sampling_correction = is_corrected
        self.max_completion_length, self.current_gradient_accumulation_steps = LIMIT, 1
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.aux_loss_enabled = False
        self.model, self._metrics = SimpleNamespace(training=True), defaultdict(_Metrics)
        self.args = SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=has_bias_correction,
            entropy_target=0.5,
            entropy_coef_delta=0.01,
            entropy_coef_min=0.0,
            entropy_coef_max=1.0,
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


def trl_inputs(case: dict, *, is_corrected: bool) -> dict:
    """What `_compute_loss` is called with, for a `padded_batch`."""
    mask, ids = case["mask"], torch.ones(B, T, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids,
        prompt_mask=ids,
        completion_ids=ids,
        completion_mask=mask.long(),
        advantages=case["advantages"],
        old_per_token_logps=case["old_logps"],
        num_items_in_batch=mask.sum(),
    )
    if is_corrected:
        inputs["importance_sampling_ratio"] = case["importance_weights"].where(mask, 1.0)
    return inputs
