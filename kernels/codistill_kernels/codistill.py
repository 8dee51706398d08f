"""Both models of CoDistill-GRPO at once: their advantages, and their losses."""

from typing import Literal, NamedTuple, TypeAlias

import torch.distributed as dist
from torch import Tensor

from codistill_kernels._checks import (
    of_both,
    require,
    require_logps,
    require_shape,
    require_tensor,
)
from codistill_kernels._estimators import OF_REWARDS
from codistill_kernels.linear_policy_loss import linear_policy_loss
from codistill_kernels.policy_loss import PolicyLoss
from codistill_kernels.rewards import downsample, group_advantages, kd_rewards

Model: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


class Scores(NamedTuple):
    """What training needs to know of S = prompts x M rollouts."""

    kd_rewards: Tensor
    """[S] alpha-weighted KD reward."""
    effective_rewards: Tensor
    """[S] reward plus KD reward, r~ of Eq. 6."""
    kept: Tensor
    """[prompts x G] int64, rows of the rollouts to train on, rising."""
    small_advantages: Tensor
    """[prompts x G] from the effective reward."""
    large_advantages: Tensor
    """[prompts x G] from the reward alone."""


def check_model(name: str, model: Model, token_ids: Tensor) -> None:
    """The model is a pair or a triple of tensors whose shapes and devices fit the tokens."""
    letters = "([N, H], [V, H]) or ([N, H], [V, H], [V] or None)"
    is_model = isinstance(model, tuple | list) and len(model) in (2, 3)
    require(is_model, name, letters, type(model).__name__)
    hidden_states, lm_head_weight, *bias = model
    for tensor in (hidden_states, lm_head_weight, *bias):
        if tensor is not None:
            require_tensor(name, tensor, "token_ids", token_ids)
    expected = (*token_ids.shape, lm_head_weight.shape[-1])
    require_shape(name, hidden_states, expected, letters)
    if bias and bias[0] is not None:
        require_shape(name, bias[0], tuple(lm_head_weight.shape[:1]), letters)


# --- public functions --------------------------------------------------------------------------


def codistill_scores(
    rewards: Tensor,
    small_logps: Tensor,
    large_logps: Tensor,
    cu_seqlens: Tensor,
    *,
    group_size: int,
    keep: int,
    alpha: float,
    max_completion_tokens: int,
    mask: Tensor | None = None,
    estimator: str = "k1",
    scale: Literal["std"] | None = None,
    eps: float = 0.0,
    method: str = "top_bottom",
    seed: int | None = None,
) -> Scores:
    """From the scored rollouts of the small model to what both models are trained on.

    effective = rewards + alpha/max_completion_tokens sum_t (large_logps[t] - small_logps[t])
    kept = `keep` of the `group_size` rollouts of each prompt, by effective reward
    small_advantages = effective[kept] - mean of the group's kept; large_advantages: of rewards

    Args:
        rewards: [S], prompt after prompt.
        small_logps, large_logps: [N] log-probabilities (nats) of the rollouts' tokens.
        cu_seqlens: [S + 1]; tokens of rollout s are cu_seqlens[s] : cu_seqlens[s + 1].
        group_size: M, rollouts per prompt.
        keep: G, rollouts kept per prompt.
        alpha, max_completion_tokens, mask, estimator: as in `kd_rewards`; no "exact", which takes
            hidden states.
        scale, eps: as in `group_advantages`; None is Eq. 7.
        method, seed: as in `downsample`.

    Returns:
        `Scores`, all detached; fp32 (fp64 for fp64 rewards), but for `kept`.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value, or is one that the
            method or the scale does not use. The message names it.

    Source: Eq. 6, section 3.3, Eq. 7. Definition: codistill_kernels.reference.codistill_scores.
    """
    expected = f"one of {', '.join(OF_REWARDS)}"
    require(estimator in OF_REWARDS, "estimator", expected, repr(estimator))
    require_tensor("rewards", rewards)
    for name, logps in (("small_logps", small_logps), ("large_logps", large_logps)):
        require_tensor(name, logps, "rewards", rewards)
        require_logps(name, logps)
    require_shape("large_logps", large_logps, tuple(small_logps.shape), "[N]")
    effective = kd_rewards(
        rewards,
        large_logps,
        small_logps,
        cu_seqlens,
        alpha=alpha,
        max_completion_tokens=max_completion_tokens,
        mask=mask,
        estimator=estimator,
    )
    kept = downsample(effective, group_size, keep, method=method, seed=seed)
    rewards = rewards.detach().to(effective.dtype)
    return Scores(
        kd_rewards=effective - rewards,
        effective_rewards=effective,
        kept=kept,
        small_advantages=group_advantages(effective[kept], keep, scale=scale, eps=eps),
        large_advantages=group_advantages(rewards[kept], keep, scale=scale, eps=eps),
    )


def codistill_losses(
    small: Model,
    large: Model,
    token_ids: Tensor,
    small_old_logps: Tensor,
    small_advantages: Tensor,
    large_advantages: Tensor,
    mask: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    loss: PolicyLoss = PolicyLoss(),  # noqa: B008  (frozen)
    large_loss: PolicyLoss | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
    workspace_mib: int | None = None,
    backend: str = "auto",
) -> tuple[tuple[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """The losses of both models on the same tokens, which the small model wrote.

    ratio of either model = exp(its logps - small_old_logps)

    Tokens are flat, or rows of sequences, [B, T], as in `linear_policy_loss`.

    Args:
        small, large: (hidden states [N, H], lm_head weight [V, H]), or with the head's bias [V] or
            None as the third, each with its own H and V. Differentiable. Heads may be DTensors.
        token_ids: [N] int64.
        small_old_logps: [N] under the small model that wrote the tokens: the denominator of both
            importance ratios.
        small_advantages, large_advantages: [N], or [S] with `cu_seqlens`.
        large_loss: the large model's loss; None: `loss`, as for the small model.
        logit_scale: one number for both, or (the small model's, the large one's).
        The others: as in `linear_policy_loss`, the same for both models; `group` holds shards of
            both heads.

    Returns:
        (loss, statistics) of the small model and (loss, statistics) of the large one, each as
        `linear_policy_loss`. On a GPU each keeps the exponentials of its logits until its backward
        pass: one linear_policy_loss and its backward pass after the other take less memory.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names it.

    Source: Eq. 5 (small), Eq. 10 (large). Definition: codistill_kernels.reference.codistill_losses.
    """
    require_tensor("token_ids", token_ids)
    for name, model in (("small", small), ("large", large)):
        check_model(name, model, token_ids)
    # By the names they have here; and without small_old_logps the large model's ratio would be 1.
    for name, tensor in (
        ("small_old_logps", small_old_logps),
        ("small_advantages", small_advantages),
        ("large_advantages", large_advantages),
    ):
        require_tensor(name, tensor, "token_ids", token_ids)
    scales = of_both("logit_scale", logit_scale, "the small model's, the large one's")
    models = (
        (small, small_advantages, loss, scales[0]),
        (large, large_advantages, loss if large_loss is None else large_loss, scales[1]),
    )
    first, second = (
        linear_policy_loss(
            hidden_states,
            lm_head_weight,
            token_ids,
            small_old_logps,
            advantages,
            mask,
            bias=bias[0] if bias else None,
            group=group,
            reduce_hidden_gradient=reduce_hidden_gradient,
            loss=model_loss,
            normalizer=normalizer,
            importance_weights=importance_weights,
            cu_seqlens=cu_seqlens,
            temperature=temperature,
            softcap=softcap,
            logit_scale=scale,
            vocab_size=vocab_size,
            workspace_mib=workspace_mib,
            backend=backend,
        )
        for (hidden_states, lm_head_weight, *bias), advantages, model_loss, scale in models
    )
    return first, second
