"""Every public function from its formula, in plain PyTorch and any dtype. Imports nothing of ours.

These hold the [N, V] logits: they are the definition, not the product.
"""

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
    logits = logits[..., :vocab_size]
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


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    normalizer: float,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The loss alone. Its gradient on a clip bound is that of the unclipped branch."""
    if cu_seqlens is not None:
        advantages = advantages.repeat_interleave(cu_seqlens.diff(), dim=0)
    loss = logps.new_zeros(())
    for n in range(len(logps)):
        if mask is not None and not mask[n]:
            continue
        old = logps[n].detach() if old_logps is None else old_logps[n]
        ratio, advantage = torch.exp(logps[n] - old), advantages[n]
        unclipped = ratio * advantage
        clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high).detach() * advantage
        surrogate = unclipped if unclipped <= clipped else clipped
        if dual_clip is not None and advantage < 0 and surrogate < dual_clip * advantage:
            surrogate = dual_clip * advantage
        weight = 1.0 if importance_weights is None else importance_weights[n]
        loss = loss - weight * surrogate
    return loss / normalizer


def kd_rewards(
    rewards: Tensor,
    teacher_logps: Tensor,
    student_logps: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    max_completion_tokens: int,
) -> Tensor:
    ends = cu_seqlens.tolist()
    sums = [
        (teacher_logps[a:b] - student_logps[a:b]).sum()
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]
    kd = torch.stack(sums) if sums else rewards.new_zeros(0)
    return rewards + alpha * kd / max_completion_tokens


def group_advantages(rewards: Tensor, group_size: int, *, scale: str | None = None) -> Tensor:
    out = torch.empty_like(rewards)
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        centred = group - group.mean()
        if scale == "std":
            centred = centred / group.std() if group.std() > 0 else torch.zeros_like(group)
        out[start : start + group_size] = centred
    return out


def downsample(scores: Tensor, group_size: int, keep: int) -> Tensor:
    rows = []
    for start in range(0, len(scores), group_size):
        group = scores[start : start + group_size].tolist()
        order = sorted(range(group_size), key=lambda i: (-group[i], i))
        chosen = order[: keep // 2] + order[group_size - keep // 2 :]
        rows += [start + i for i in sorted(chosen)]
    return torch.tensor(rows, dtype=torch.long, device=scores.device)
