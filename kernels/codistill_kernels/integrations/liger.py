"""Liger-Kernel's fused linear losses by these kernels, under their names and signatures.

    from codistill_kernels.integrations.liger import LigerFusedLinearGRPOLoss

Signatures are those of liger-kernel 0.8.5; nothing of it is imported. Options that say how Liger
computes (compiled, chunk_size, accum_dtype, tiles) are accepted and ignored: logits are never
rounded, and gradients of the head are summed in fp32.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from codistill_kernels._checks import require, require_shape
from codistill_kernels._estimators import Estimate
from codistill_kernels.integrations._batches import (
    clipped_share,
    counts,
    masked_mean,
    sequence_means,
)
from codistill_kernels.linear_logps import linear_logps
from codistill_kernels.linear_policy_loss import linear_policy_loss
from codistill_kernels.linear_token_loss import linear_token_loss
from codistill_kernels.policy_loss import PolicyLoss, policy_loss

# --- GRPO --------------------------------------------------------------------------------------

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO's losses from hidden states; one pass over the logits if beta is 0.

    The arguments are Liger's. Some that Liger accepts are refused: delta below 1 + epsilon_high or
    with a loss_type that has no bounds, and luspo with token-level ratios.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.loss_type = loss_type
        self.of_sequence = importance_sampling_level == "sequence"
        self.check(importance_sampling_level, max_completion_length, delta, epsilon_high)
        # The bounds beyond which Liger's metric counts a token as clipped.
        self.bounds = (1 - epsilon_low, 1 + epsilon_high)
        if loss_type == "cispo":  # epsilon_high bounds the ratio itself; there is no lower bound
            self.loss = PolicyLoss("cispo", epsilon_low=1.0, epsilon_high=epsilon_high - 1)
            self.bounds = (0.0, epsilon_high)
        elif loss_type == "sapo":
            self.loss = PolicyLoss(
                "sapo",
                sapo_temperature_positive=sapo_temperature_pos,
                sapo_temperature_negative=sapo_temperature_neg,
            )
            self.bounds = (0.0, math.inf)
        elif loss_type == "vespo":
            self.loss = PolicyLoss(
                "vespo",
                vespo_k_positive=vespo_k_pos,
                vespo_lambda_positive=vespo_lambda_pos,
                vespo_k_negative=vespo_k_neg,
                vespo_lambda_negative=vespo_lambda_neg,
            )
            self.bounds = (0.0, math.inf)
        else:
            kind = "gspo" if self.of_sequence else "clip"
            self.loss = PolicyLoss(kind, epsilon_low, epsilon_high, dual_clip=delta)
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.use_bias_correction_kl = use_bias_correction_kl

    def check(
        self, level: str, max_length: int | None, delta: float | None, epsilon_high: float
    ) -> None:
        """Raise ValueError for settings that Liger or this class refuses."""
        kind = self.loss_type
        require(kind in LOSS_TYPES, "loss_type", f"one of {', '.join(LOSS_TYPES)}", repr(kind))
        levels = ("token", "sequence") if kind in CLIPPED else ("token",)
        levels = ("sequence",) if kind == "luspo" else levels
        allowed = f"{' or '.join(levels)} with {kind}"
        require(level in levels, "importance_sampling_level", allowed, repr(level))
        has_length = kind != "dr_grpo" or max_length is not None
        require(has_length, "max_completion_length", "given with dr_grpo", None)
        if kind not in CLIPPED:
            require(delta is None, "delta", f"None with {kind}", delta)
        outer = delta is None or delta >= 1 + epsilon_high
        require(outer, "delta", f"at least 1 + epsilon_high = {1 + epsilon_high}", delta)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """loss = (1/d) sum over tokens (-w surrogate + beta KL), d and surrogate by loss_type.

        Args:
            _input: [B, T, H]; lin_weight: [V, H]; bias: [V]. Differentiable.
            selected_token_ids: [B, T] int64. attention_mask: [B, T] of 0 and 1 in any dtype.
            advantages: [B], or [B, T] with token-level ratios.
            vllm_is_ratio: w; [B, T], [B, 1] or [B].
            ref_per_token_logps: [B, T] nats; or hidden states, weight and bias of the reference.
            old_per_token_logps: [B, T] nats. None: ratio 1.
            num_items_in_batch: number of tokens on all processes, for dapo, cispo and vespo.

        Returns:
            (loss, metrics): an fp32 scalar, and detached scalars: the mean KL (only if beta is not
            0) and the share of clipped tokens.

        Raises:
            ValueError: an argument has a wrong shape, dtype, device or value. The message names it.
        """
        mask = attention_mask != 0
        require_shape("selected_token_ids", selected_token_ids, tuple(mask.shape), "[B, T]")
        weights = self.importance_weights(vllm_is_ratio, mask)
        scale, normalizer = self.reduction(mask, num_items_in_batch)
        if self.loss_type == "luspo" and weights is not None:
            scale, weights = scale * weights.mean(-1), None  # padding included
        terms: dict = dict(loss=self.loss, normalizer=normalizer, importance_weights=weights)
        head: dict = dict(bias=bias, temperature=self.temperature)
        old, metrics = old_per_token_logps, []
        scaled = advantages * (scale if advantages.ndim == 1 else scale[:, None])
        if self.beta == 0:
            loss, statistics = linear_policy_loss(
                _input, lin_weight, selected_token_ids, old, scaled, mask, **head, **terms
            )
            logps = statistics["logps"]
        else:
            counted = self.counted_in_kl(mask)
            ids = torch.where(counted, selected_token_ids, -100)
            logps = linear_logps(_input, lin_weight, ids, **head)
            loss, _ = policy_loss(logps, old, scaled, mask, **terms)
            reference = (ref_per_token_logps, ref_input, ref_weight, ref_bias)
            distance = self.reference_logps(reference, ids, logps) - logps
            kl = self.kl(torch.where(counted, distance, 0.0), self.ratio(logps, old, mask))
            loss = loss + self.beta * self.kl_sum(kl, mask, scale) / normalizer
            metrics = [masked_mean(kl.detach(), mask)]
        ratio, each = self.ratio(logps.detach(), old, mask), advantages.reshape(len(mask), -1)
        return loss, (*metrics, clipped_share(ratio, each, mask, self.bounds))

    def reduction(
        self, mask: Tensor, num_items: float | Tensor | None
    ) -> tuple[Tensor, float | Tensor]:
        """The factor [B] of each sequence's tokens, and the divisor of the sum over all tokens."""
        one = mask.new_ones(len(mask), dtype=torch.float32)
        if self.loss_type in ("grpo", "sapo"):
            return one / counts(mask), len(mask)
        if self.loss_type == "luspo":
            return one, len(mask)
        if self.loss_type == "bnpo":
            return one, mask.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return one, len(mask) * self.max_completion_length
        has_processes = dist.is_available() and dist.is_initialized()
        total = torch.as_tensor(mask.sum() if num_items is None else num_items, device=mask.device)
        total = total.float()
        if has_processes and num_items is None:
            dist.all_reduce(total)
        return one, (total / (dist.get_world_size() if has_processes else 1)).clamp(min=1)

    def importance_weights(self, ratio: Tensor | None, mask: Tensor) -> Tensor | None:
        """vllm_is_ratio as one weight per token, [B, T]."""
        if ratio is None:
            return None
        ratio = ratio[:, None] if ratio.ndim == 1 else ratio
        if self.loss_type == "vespo":
            # In Liger a sequence's weight is the product of all given ratios, padding included.
            total = ratio.log().clamp(math.log(1e-8), 20.0).sum(-1, keepdim=True)
            ratio = (total / counts(mask)[:, None]).exp()
        return ratio.expand(mask.shape)

    def ratio(self, logps: Tensor, old: Tensor | None, mask: Tensor) -> Tensor:
        """Importance ratios: [B, T] for tokens, or [B, 1] for sequences."""
        log_ratio = logps - (logps.detach() if old is None else old)
        if self.of_sequence:
            return sequence_means(log_ratio, mask)[:, None].exp()
        # Padding may hold anything: a ratio there must not overflow before the KL masks it.
        return torch.where(mask, log_ratio, 0.0).exp()

    def reference_logps(self, reference: tuple, ids: Tensor, logps: Tensor) -> Tensor:
        """[B, T], detached. Without a reference model they are those of the policy itself."""
        if not self.use_ref_model:
            return logps.detach()
        given, hidden_states, weight, bias = reference
        if given is not None:
            return given.detach()
        names = "ref_per_token_logps or ref_input"
        require(hidden_states is not None, names, "given with use_ref_model and beta", None)
        with torch.no_grad():
            head: dict = dict(bias=bias, temperature=self.temperature)
            return linear_logps(hidden_states, weight, ids, **head)

    def kl(self, distance: Tensor, ratio: Tensor) -> Tensor:
        kl = Estimate.apply(distance, "k3")
        return kl * ratio if self.use_bias_correction_kl else kl

    def counted_in_kl(self, mask: Tensor) -> Tensor:
        """[B, T] bool. As in Liger, luspo's KL is a mean over all positions, padding included."""
        return torch.ones_like(mask) if self.loss_type == "luspo" else mask

    def kl_sum(self, kl: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        if self.loss_type == "luspo":
            return (mask.sum(-1) * kl.mean(-1)).sum()
        return (scale * torch.where(mask, kl, 0.0).sum(-1)).sum()


# --- cross-entropy -----------------------------------------------------------------------------


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross-entropy from hidden states, in one pass for a mean or a sum.

    The arguments are Liger's. ce_weight, lse_square_scale, label_smoothing, return_z_loss,
    return_token_accuracy and return_predicted_tokens are refused: they need more of the logits than
    the kernels keep.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        require(ce_weight is None, "ce_weight", "None", "weights")
        unused = dict(lse_square_scale=lse_square_scale, label_smoothing=label_smoothing)
        unused |= dict(return_z_loss=return_z_loss, return_token_accuracy=return_token_accuracy)
        unused |= dict(return_predicted_tokens=return_predicted_tokens)
        for name, value in unused.items():
            require(not value, name, "left at its default", value)
        reductions = ("mean", "sum", "none")
        require(reduction in reductions, "reduction", "mean, sum or none", repr(reduction))
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.softcap = softcap
        self.use_token_scaling = use_token_scaling

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """-log p of each target, times p (detached) if tokens are scaled; 0 where ignored.

        lin_weight [V, H], _input [N, H] and bias [V] are differentiable; target [N] int64. Returns
        an fp32 scalar, or [N] without a reduction. The mean is over targets that are not ignored,
        and 0 if all are.
        """
        mask = target != self.ignore_index

        def nll(logps: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
            return -logps * logps.detach().exp() if self.use_token_scaling else -logps

        return linear_token_loss(
            _input,
            lin_weight,
            target,
            nll,
            mask,
            normalizer=mask.sum() if self.reduction == "mean" else 1.0,
            reduction="none" if self.reduction == "none" else "sum",
            bias=bias,
            softcap=self.softcap,
        )[0]


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probabilities and entropies at a temperature."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """nll [N], or (nll, entropy): fp32 nats, differentiable; 0 where ignored.

        _input [N, H], weight [V, H], target [N] int64. Liger rounds the entropy to the dtype of
        _input. selected_token_ids, for more log-probabilities per row, is refused.
        """
        require(selected_token_ids is None, "selected_token_ids", "None", "ids")
        return scaled_cross_entropy(
            _input, weight, target, temperature, ignore_index, return_entropy, None
        )


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """`LigerFusedLinearScaledCrossEntropyFunction` with the vocabulary in shards."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        tp_group: dist.ProcessGroup | None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """weight is this process's [V / processes, H]; targets count over the whole vocabulary.

        Each process gets the whole result and the whole gradient of _input. tp_group None stands
        for all processes.
        """
        group = dist.group.WORLD if tp_group is None else tp_group
        return scaled_cross_entropy(
            _input, weight, target, temperature, ignore_index, return_entropy, group
        )


def scaled_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
    group: dist.ProcessGroup | None,
) -> Tensor | tuple[Tensor, Tensor]:
    logps, entropy = linear_logps(
        hidden_states,
        weight,
        target,
        temperature=temperature,
        ignore_index=ignore_index,
        return_entropy=True,
        group=group,
    )
    return (-logps, entropy) if return_entropy else -logps
