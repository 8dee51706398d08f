"""Every public function from its formula, in plain PyTorch and any dtype. Imports nothing of ours.

These hold the [N, V] logits: they are the definition, not the product.
"""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor


def linear_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    active = token_ids != ignore_index
    hidden_states = torch.where(active[..., None], hidden_states, 0.0)
    logits = hidden_states @ lm_head_weight.T
    if bias is not None:
        logits = logits + bias
    return selective_logps(
        logits,
        token_ids,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
    )


def linear_token_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    mask: Tensor | None = None,
    *,
    normalizer: float | Tensor = 1.0,
    **options,
) -> Tensor:
    keep = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    rows = keep.nonzero().squeeze(1)
    logps, entropy = linear_logps(
        hidden_states,
        lm_head_weight,
        torch.where(keep, token_ids, -100),
        return_entropy=True,
        **options,
    )
    return fn(logps[rows], entropy[rows], rows).sum() / normalizer


def selective_logps(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    active = token_ids != ignore_index
    logits = torch.where(active[..., None], logits, 0.0)[..., :vocab_size]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    scale = (
        temperature[..., None]
        if isinstance(temperature, Tensor) and temperature.ndim
        else temperature
    )
    log_p = (logits / scale).log_softmax(-1)
    logps = log_p.gather(-1, torch.where(active, token_ids, 0)[..., None]).squeeze(-1)
    logps = torch.where(active, logps, 0.0)
    entropy = torch.where(active, -(log_p.exp() * log_p).sum(-1), 0.0)
    return (logps, entropy) if return_entropy else logps


def linear_reverse_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    if vocab_size is None:
        vocab_size = min(len(student[1]), len(teacher[1]))
    scale = torch.as_tensor(temperature, dtype=student[0].dtype).reshape(-1, 1)
    log_p, log_q = (
        ((hidden @ weight.T)[:, :vocab_size] / scale).log_softmax(-1)
        for hidden, weight in (student, teacher)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "clip",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    normalizer: float,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The loss alone. Its gradient on a clip bound is that of the unclipped branch."""
    bounds = (epsilon_low, epsilon_high)
    ends = list(range(len(logps) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    loss = logps.new_zeros(())
    for s, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        tokens = [n for n in range(start, end) if mask is None or mask[n]]
        log_ratios = {
            n: logps[n] - (logps[n].detach() if old_logps is None else old_logps[n]) for n in tokens
        }
        if log_ratio_clamp is not None:
            bound = log_ratio_clamp
            log_ratios = {n: x.clamp(-bound, bound) for n, x in log_ratios.items()}
        for n in tokens:
            weight = 1.0 if importance_weights is None else importance_weights[n]
            if weight == 0 or advantages[s] == 0:
                continue  # exactly 0, whatever the other factors are
            if kind == "clip":
                surrogate = clip_surrogate(log_ratios[n].exp(), advantages[s], bounds, dual_clip)
            elif kind == "cispo":
                ratio = log_ratios[n].exp().clamp(1 - epsilon_low, 1 + epsilon_high)
                surrogate = ratio.detach() * advantages[s] * logps[n]
            elif kind == "gspo":
                ratio = (sum(log_ratios.values()) / len(tokens)).exp()
                surrogate = clip_surrogate(ratio, advantages[s], bounds, None)
            elif kind == "gmpo":
                clipped = [gmpo_clip(x, advantages[s], bounds) for x in log_ratios.values()]
                surrogate = (sum(clipped) / len(tokens)).exp() * advantages[s]
            loss = loss - weight * surrogate
    return divided(loss, normalizer)


def divided(total: Tensor, normalizer: float) -> Tensor:
    """0 / 0 = 0: nothing to train on."""
    return total if total == 0 and normalizer == 0 else total / normalizer


def clip_surrogate(
    ratio: Tensor, advantage: Tensor, bounds: tuple[float, float], dual_clip: float | None
) -> Tensor:
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - bounds[0], 1 + bounds[1]).detach() * advantage
    surrogate = unclipped if unclipped <= clipped else clipped
    if dual_clip is not None and advantage < 0 and surrogate < dual_clip * advantage:
        surrogate = dual_clip * advantage
    return surrogate


def gmpo_clip(log_ratio: Tensor, advantage: Tensor, bounds: tuple[float, float]) -> Tensor:
    if advantage > 0 and log_ratio > bounds[1]:
        return torch.full_like(log_ratio, bounds[1])
    if advantage < 0 and log_ratio < -bounds[0]:
        return torch.full_like(log_ratio, -bounds[0])
    return log_ratio


def importance_weights(
    trainer_logps: Tensor,
    engine_logps: Tensor,
    mask: Tensor | None = None,
    *,
    truncate: float | None = None,
    drop: tuple[float, float] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    weights = torch.zeros_like(trainer_logps)
    ends = list(range(len(weights) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        tokens = [n for n in range(start, end) if mask is None or mask[n]]
        ratio = math.exp(sum(trainer_logps[n].item() - engine_logps[n].item() for n in tokens))
        if drop is not None and not drop[0] <= ratio <= drop[1]:
            ratio = 0.0
        for n in tokens:
            weights[n] = ratio if truncate is None else min(ratio, truncate)
    return weights


def kl_penalty(
    logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: str = "k3",
    normalizer: float,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The loss alone."""
    ends = list(range(len(logps) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    loss = logps.new_zeros(())
    for s, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        for n in range(start, end):
            if (mask is None or mask[n]) and (weights is None or weights[s] != 0):
                log_ratio = reference_logps[n] - logps[n]  # log pi_ref / pi of Eq. 4
                kl = log_ratio**2 / 2 if estimator == "k2" else log_ratio.exp() - log_ratio - 1
                loss = loss + (1.0 if weights is None else weights[s]) * kl
    return divided(loss, normalizer)


def kd_rewards(
    rewards: Tensor,
    teacher_logps: Tensor | None,
    student_logps: Tensor | None,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    max_completion_tokens: int,
    mask: Tensor | None = None,
    estimator: str = "k1",
    teacher: tuple[Tensor, Tensor] | None = None,
    student: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    if estimator == "exact":
        assert student is not None and teacher is not None
        kl = linear_reverse_kl(student, teacher, temperature=temperature, vocab_size=vocab_size)
    else:
        assert student_logps is not None and teacher_logps is not None
        log_ratio = teacher_logps - student_logps  # log pi_ref / pi of Eq. 4
        kl = -log_ratio if estimator == "k1" else log_ratio.exp() - log_ratio - 1
    kl = kl if mask is None else torch.where(mask, kl, 0.0)
    ends = cu_seqlens.tolist()
    out = []
    for reward, start, end in zip(rewards, ends[:-1], ends[1:], strict=True):
        out.append(reward - alpha * kl[start:end].sum() / max_completion_tokens)
    return torch.stack(out) if out else rewards.new_zeros(0)


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: str | None = None, eps: float = 0.0
) -> Tensor:
    out = torch.empty_like(rewards)
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        centred = group - group.mean()
        if scale == "std":
            deviation = group.std()
            centred = centred / (deviation + eps) if deviation > 0 else torch.zeros_like(group)
        out[start : start + group_size] = centred
    return out


def downsample(
    scores: Tensor,
    group_size: int,
    keep: int,
    *,
    method: str = "top_bottom",
    seed: int | None = None,
) -> Tensor:
    rows = []
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(
            len(scores) // group_size, group_size, dtype=torch.float64, generator=generator
        )
        scores = -scores.reshape(-1)  # those of the lowest draws
    for start in range(0, len(scores), group_size):
        group = scores[start : start + group_size].tolist()
        order = sorted(range(group_size), key=lambda i: (-group[i], i))
        splits = [order[:k] + order[group_size - (keep - k) :] for k in range(keep, -1, -1)]
        if method == "top_bottom":
            chosen = splits[keep // 2]
        elif method == "max_variance":
            chosen = max(splits, key=lambda rows: statistics.pvariance([group[i] for i in rows]))
        else:
            chosen = splits[0]
        rows += [start + i for i in sorted(chosen)]
    return torch.tensor(rows, dtype=torch.long, device=scores.device)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KD reward, effective reward (Eq. 6), rows kept (section 3.3), advantages (Eq. 7) of both."""
    effective = kd_rewards(
        rewards,
        large_logps,
        small_logps,
        cu_seqlens,
        alpha=alpha,
        max_completion_tokens=max_completion_tokens,
        mask=mask,
    )
    kept = downsample(effective, group_size, keep)
    small = group_advantages(effective[kept], keep)
    large = group_advantages(rewards[kept], keep)
    return effective - rewards, effective, kept, small, large


def codistill_losses(
    small: tuple[Tensor, ...],
    large: tuple[Tensor, ...],
    token_ids: Tensor,
    small_old_logps: Tensor,
    small_advantages: Tensor,
    large_advantages: Tensor,
    mask: Tensor | None = None,
    *,
    normalizer: float,
) -> tuple[Tensor, Tensor]:
    """Eq. 5 and Eq. 10: both ratios are over the small model's old policy. A model: hidden states,
    weight and, where its head has one, bias."""
    small_loss, large_loss = (
        policy_loss(
            linear_logps(hidden_states, weight, token_ids, bias=bias[0] if bias else None),
            small_old_logps,
            advantages,
            mask,
            normalizer=normalizer,
        )
        for (hidden_states, weight, *bias), advantages in (
            (small, small_advantages),
            (large, large_advantages),
        )
    )
    return small_loss, large_loss
