"""verl's functions by these kernels: its fused head and its registered policy losses.

SkyRL, slime and AReaL have taken over `linear_cross_entropy` from verl. Signatures are those
of verl in August 2026; nothing of verl is imported.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from codistill_kernels._checks import require
from codistill_kernels.integrations._batches import (
    clipped_share,
    counts,
    masked_mean,
    sequence_means,
)
from codistill_kernels.kl_penalty import kl_penalty
from codistill_kernels.linear_logps import linear_logps
from codistill_kernels.policy_loss import PolicyLoss, policy_loss

# --- the head ----------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl.utils.kernel.linear_cross_entropy.linear_cross_entropy: log-probabilities and entropy.

    z = hidden @ weight.T / temperature
    logprobs[n] = z[n, labels[n]] - logsumexp_v z[n, v],  entropy[n] = -sum_v p[n, v] log p[n, v]

    Args:
        hidden: [..., H], fp32, bf16, fp16 or fp64; its N tokens are taken flat. Differentiable.
        weight: [V, H]; with `group` this process's shard of the vocabulary. Differentiable.
        labels: N integers in any shape and integer dtype, over the whole vocabulary. A label of
            -100, which verl does not allow, gives 0, entropy 0 and no gradient.
        temperature: > 0; a number, or [N] for one per token, which verl's function does not take.
        reduction: "none", "sum" or "mean" (over all N) of the log-probabilities.
        group: tensor-parallel processes, in rank order, with the same hidden states and labels. As
            in verl, each process gets the gradient of `hidden` through its own rows alone, and the
            caller sums it, as the backward pass of Megatron's gather does.

    Returns:
        (logprobs, entropy): fp32, nats (fp64 for fp64 hidden states), [N] each, or a scalar and [N]
        with a reduction.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names it.
    """
    reductions = {"none": lambda x: x, "sum": Tensor.sum, "mean": Tensor.mean}
    require(reduction.lower() in reductions, "reduction", "none, sum or mean", repr(reduction))
    logprobs, entropy = linear_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        temperature=temperature,
        return_entropy=True,
        group=group,
        reduce_hidden_gradient=False,
    )
    return reductions[reduction.lower()](logprobs), entropy


class FusedLinearForPPO(nn.Module):
    """verl.utils.experimental.torch_functional.FusedLinearForPPO: results have the tokens' shape.

    chunk_size is accepted and ignored: the kernels' workspace bounds the memory.
    """

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [..., H], vocab_weights [V, H], input_ids [...] -> log-probabilities and
        entropy [...], fp32 nats both (verl rounds the entropy to the dtype of hidden_states)."""
        return linear_logps(
            hidden_states,
            vocab_weights,
            input_ids.long(),
            temperature=temperature,
            return_entropy=True,
        )


# --- policy losses -----------------------------------------------------------------------------

NAMES = ("vanilla", "gspo", "sapo", "geo_mean", "cispo", "dppo_tv", "dppo_kl", "gpg", "dro")


def get_policy_loss_fn(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """verl.trainer.ppo.core_algos.get_policy_loss_fn, by `policy_loss` of these kernels.

    name: vanilla, gspo (GSPO-token, as verl has it), sapo, geo_mean, cispo, dppo_tv, dppo_kl, gpg
    or dro. clip_cov and kl_cov select tokens over the whole batch and are not here.

    Returns:
        a function (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean",
        config=None, rollout_is_weights=None) -> (loss, metrics), tensors [B, T], config verl's
        ActorConfig. Its settings mean what they mean in verl, defaults included: dual clip 3 in
        vanilla, log-ratios within 20 nats (gspo: 10), sequence means in gspo, sapo and geo_mean
        whatever loss_agg_mode says, dp_size and global counts of config.global_batch_info. Masked
        values have no effect, not even NaN; without an unmasked token the loss is 0.

        metrics: actor/pg_clipfrac, actor/pg_clipfrac_lower and actor/ppo_kl, as numbers. They equal
        verl's except in geo_mean and dppo, where clipfrac counts tokens whose gradient is cut and
        clipfrac_lower is 0.

    Raises:
        ValueError: the name, a setting or a tensor is wrong. The message names it.
    """
    require(name in NAMES, "name", f"one of {', '.join(NAMES)}", repr(name))
    return partial(_policy_loss, name)


def loss_settings(name: str, config: Any) -> PolicyLoss:
    """The PolicyLoss that equals verl's loss `name` with the settings of its ActorConfig. For gspo
    the caller replaces the ratio by the sequence's, for dro it adds the penalty."""
    low, high = (
        config.clip_ratio if value is None else value
        for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    bounds = dict(epsilon_low=low, epsilon_high=high)
    if name == "vanilla":
        dual_clip = config.get("clip_ratio_c", 3.0)
        return PolicyLoss("clip", **bounds, dual_clip=dual_clip, log_ratio_clamp=20.0)
    if name == "gspo":
        return PolicyLoss("clip", **bounds, log_ratio_clamp=10.0)
    if name == "geo_mean":
        return PolicyLoss("gmpo", **bounds)
    if name == "cispo":
        return PolicyLoss("cispo", **bounds, log_ratio_clamp=20.0)
    if name == "sapo":
        return PolicyLoss(
            "sapo",
            sapo_temperature_positive=config.tau_pos,
            sapo_temperature_negative=config.tau_neg,
            log_ratio_clamp=20.0,
        )
    if name in ("dppo_tv", "dppo_kl"):
        truncate = config.get("clip_ratio_c", 20.0)
        return PolicyLoss(name, **bounds, truncate=truncate, log_ratio_clamp=20.0)
    assert name in ("gpg", "dro"), name
    return PolicyLoss("reinforce")


def aggregation(
    mode: str,
    mask: Tensor,
    *,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, float | Tensor]:
    """verl's agg_loss as a factor [B, 1] for each token and the divisor of their sum.

    mask [B, T] bool. dp_size undoes the mean that data parallelism takes of gradients.
    """
    factor = torch.ones_like(mask[:, :1], dtype=torch.float32)
    normalizer: float | Tensor
    if mode == "token-sum":
        return factor, 1.0 / dp_size
    if mode == "token-mean":
        name, total, local = "batch_num_tokens", batch_num_tokens, mask.sum()
    else:
        known = "token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm"
        known += ", seq-mean-token-mean"
        require(mode in known.split(", "), "loss_agg_mode", f"one of {known}", repr(mode))
        name, total, local = "global_batch_size", global_batch_size, mask.any(-1).sum()
    require(total is not None or dp_size == 1, name, "given with dp_size > 1", None)
    normalizer = (local if total is None else total) / dp_size
    if mode == "seq-mean-token-mean":
        factor = factor / counts(mask)[:, None]
    elif mode == "seq-mean-token-sum-norm":
        normalizer = normalizer * (loss_scale_factor or mask.shape[-1])
    return factor, normalizer


def _policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    require(config is not None, "config", "verl's ActorConfig", None)
    mask, weights, loss = response_mask.bool(), rollout_is_weights, loss_settings(name, config)
    old, log_ratio = old_log_prob, log_prob.detach() - old_log_prob
    mode = "seq-mean-token-mean" if name in ("gspo", "sapo") else loss_agg_mode
    info: Mapping[str, Any] = config.global_batch_info
    factor, normalizer = aggregation(mode, mask, **info)
    if name == "gspo":
        # The tokens of a sequence share its ratio, but each has a gradient of its own.
        old = log_prob.detach() - sequence_means(log_ratio, mask)[:, None]
    if name == "geo_mean":
        factor, normalizer = 1 / counts(mask), len(mask)
        advantages = sequence_means(advantages, mask)
        if weights is not None:
            mean = sequence_means((weights + 1e-10).log(), mask).exp()
            weights = mean[:, None].expand(mask.shape)
    terms: dict = dict(normalizer=normalizer, importance_weights=weights)
    value, statistics = policy_loss(log_prob, old, advantages * factor, mask, loss=loss, **terms)
    if name == "dro":
        beta = config.policy_loss.dro_beta
        require(beta is not None and beta > 0, "policy_loss.dro_beta", "> 0", beta)
        factor = factor if weights is None else factor * weights
        terms = dict(estimator="k2", normalizer=normalizer, weights=factor.expand(mask.shape))
        value = value + beta * kl_penalty(log_prob, old, mask, **terms)[0]
    return value, metrics_of(name, loss, statistics, log_ratio, advantages, mask)


def metrics_of(
    name: str,
    loss: PolicyLoss,
    statistics: dict[str, Tensor],
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> dict[str, float]:
    """verl's metrics of a loss; see `get_policy_loss_fn`."""
    if name == "gpg":
        return {}
    ppo_kl = {"actor/ppo_kl": masked_mean(-log_ratio, mask).item()}
    if name == "dro":
        return ppo_kl
    clipped = statistics["clip_fraction_low"] + statistics["clip_fraction_high"]
    far = torch.zeros_like(clipped)
    if loss.dual_clip is not None:
        # The dual clip is counted apart: verl's clipfrac is that of the two bounds near 1.
        far = masked_mean((advantages < 0) & (log_ratio > math.log(loss.dual_clip)), mask)
        bounds = (1 - loss.epsilon_low, 1 + loss.epsilon_high)
        clipped = clipped_share(log_ratio.exp(), advantages, mask, bounds)
    return ppo_kl | {
        "actor/pg_clipfrac": clipped.item(),
        "actor/pg_clipfrac_lower": far.item(),
    }
