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
    logit_scale: float = 1.0,
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
        logit_scale * logits,
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


def pair_log_softmax(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    mask: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None | tuple[float | None, float | None] = None,
    logit_scale: float | tuple[float, float] = 1.0,
    vocab_size: int | None = None,
) -> list[Tensor]:
    """log p of the student and log q of the teacher, [N, V]."""
    if vocab_size is None:
        vocab_size = min(len(student[1]), len(teacher[1]))
    softcaps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    scales = logit_scale if isinstance(logit_scale, tuple) else (logit_scale, logit_scale)
    divisor = torch.as_tensor(temperature, dtype=student[0].dtype).reshape(-1, 1)
    out = []
    for (hidden, weight, *bias), cap, scale in zip(
        (student, teacher), softcaps, scales, strict=True
    ):
        hidden = hidden if mask is None else torch.where(mask[:, None], hidden, 0.0)
        logits = hidden @ weight.T
        if bias and bias[0] is not None:
            logits = logits + bias[0]
        logits = scale * logits[:, :vocab_size]
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        out.append((logits / divisor).log_softmax(-1))
    return out


def linear_reverse_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    **options,
) -> Tensor:
    out = kl(*pair_log_softmax(student, teacher, mask, **options))
    return out if mask is None else torch.where(mask, out, 0.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    log_m = torch.logaddexp(math.log(weight) + log_q, math.log(1 - weight) + log_p)
    return weight * kl(log_q, log_m) + (1 - weight) * kl(log_p, log_m)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    # of the student's log p, the teacher's log q and jsd_weight
    "reverse_kl": lambda log_p, log_q, _: kl(log_p, log_q),
    "forward_kl": lambda log_p, log_q, _: kl(log_q, log_p),
    "jsd": jsd,
}


def linear_divergence(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    mask: Tensor | None = None,
    *,
    kind: str = "reverse_kl",
    jsd_weight: float = 0.5,
    normalizer: float | Tensor = 1.0,
    reduction: str = "sum",
    **options,
) -> Tensor:
    """The loss alone."""
    log_p, log_q = pair_log_softmax(student, teacher, mask, **options)
    values = DIVERGENCES[kind](log_p, log_q.detach(), jsd_weight)
    values = values if mask is None else torch.where(mask, values, 0.0)
    return values if reduction == "none" else values.sum() / normalizer


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "clip",
    log_ratio_clamp: float | None = None,
    entropy_bonus: float = 0.0,
    normalizer: float,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **settings,
) -> Tensor:
    """The loss alone. Its gradient on a clip bound is that of the unclipped branch."""
    ends = list(range(len(logps) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    old_logps = logps.detach() if old_logps is None else old_logps
    weights = torch.ones_like(logps) if importance_weights is None else importance_weights
    loss = logps.new_zeros(())
    for s, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        tokens = [n for n in range(start, end) if mask is None or mask[n]]
        log_ratios = [logps[n] - old_logps[n] for n in tokens]
        if log_ratio_clamp is not None:
            log_ratios = [x.clamp(-log_ratio_clamp, log_ratio_clamp) for x in log_ratios]
        for i, n in enumerate(tokens):
            if entropy_bonus:
                assert entropy is not None
                loss = loss - entropy_bonus * entropy[n]
            if weights[n] == 0 or advantages[s] == 0:
                continue  # exactly 0, whatever the other factors are
            of_token = (log_ratios[i], logps[n], old_logps[n], advantages[s])
            if kind in OF_TOKENS:
                value = weights[n] * OF_TOKENS[kind](*of_token, **settings)
            elif kind == "vespo":  # the weights are in it
                weight = vespo_weight(log_ratios, weights[tokens], advantages[s], **settings)
                value = weight * advantages[s] * logps[n]
            else:
                value = weights[n] * OF_SEQUENCES[kind](log_ratios, advantages[s], **settings)
            loss = loss - value
    return divided(loss, normalizer)


def divided(total: Tensor, normalizer: float) -> Tensor:
    """0 / 0 = 0: nothing to train on."""
    return total if total == 0 and normalizer == 0 else total / normalizer


def clipped(ratio, advantage, *, epsilon_low=0.2, epsilon_high=0.2, dual_clip=None, **_):
    unclipped = ratio * advantage
    bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high).detach() * advantage
    surrogate = unclipped if unclipped <= bounded else bounded
    if dual_clip is not None and advantage < 0 and surrogate < dual_clip * advantage:
        surrogate = dual_clip * advantage
    return surrogate


def clip(log_ratio, logp, old_logp, advantage, **settings):
    return clipped(log_ratio.exp(), advantage, **settings)


def cispo(log_ratio, logp, old_logp, advantage, *, epsilon_low, epsilon_high, **_):
    return log_ratio.exp().clamp(1 - epsilon_low, 1 + epsilon_high).detach() * advantage * logp


def sapo(log_ratio, logp, old_logp, advantage, **settings):
    sign = "positive" if advantage > 0 else "negative"
    temperature = settings[f"sapo_temperature_{sign}"]
    return torch.sigmoid(temperature * (log_ratio.exp() - 1)) * 4 / temperature * advantage


def reinforce(log_ratio, logp, old_logp, advantage, **_):
    return advantage * logp


def dppo_tv(log_ratio, logp, old_logp, advantage, **settings):
    distance = (logp.exp() - old_logp.exp()).abs()
    return dppo(distance, log_ratio, logp, old_logp, advantage, **settings)


def dppo_kl(log_ratio, logp, old_logp, advantage, **settings):
    p, old = logp.exp(), old_logp.exp()
    kl = old * (old_logp - logp) + (1 - old) * (torch.log1p(-old) - torch.log1p(-p))
    return dppo(kl, log_ratio, logp, old_logp, advantage, **settings)


def dppo(
    distance, log_ratio, logp, old_logp, advantage, *, epsilon_low, epsilon_high, truncate, **_
):
    is_up = advantage > 0 and logp > old_logp and distance > epsilon_high
    is_down = advantage < 0 and logp < old_logp and distance > epsilon_low
    if is_up or is_down:
        return 0.0 * advantage
    return log_ratio.exp().clamp(max=math.inf if truncate is None else truncate).detach() * (
        advantage * logp
    )


def gspo(log_ratios, advantage, **settings):
    return clipped((sum(log_ratios) / len(log_ratios)).exp(), advantage, **settings)


def gmpo(log_ratios, advantage, *, epsilon_low, epsilon_high, **_):
    bounded = [
        x.clamp(max=epsilon_high) if advantage > 0 else x.clamp(min=-epsilon_low)
        for x in log_ratios
    ]
    return (sum(bounded) / len(bounded)).exp() * advantage


def vespo_weight(log_ratios, weights, advantage, **settings):
    sign = "positive" if advantage >= 0 else "negative"
    k, decay = settings[f"vespo_k_{sign}"], settings[f"vespo_lambda_{sign}"]
    smallest = math.log(1e-8)
    total = sum(x.detach().clamp(-20, 20) for x in log_ratios)
    total = (total + weights.log().clamp(smallest, 20).sum()).clamp(smallest, 20)
    return torch.exp(decay + k * total - decay * total.exp())


OF_TOKENS = dict(
    clip=clip, cispo=cispo, sapo=sapo, reinforce=reinforce, dppo_tv=dppo_tv, dppo_kl=dppo_kl
)
OF_SEQUENCES = dict(gspo=gspo, luspo=gspo, gmpo=gmpo)


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


KL_ESTIMATES = {  # of KL(pi || pi_ref), from log pi_ref / pi of Eq. 4
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": lambda log_ratio: log_ratio.exp() - log_ratio - 1,
    "abs": lambda log_ratio: log_ratio.abs(),
}


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
                kl = KL_ESTIMATES[estimator](reference_logps[n] - logps[n])
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
        kl = KL_ESTIMATES[estimator](teacher_logps - student_logps)
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


def widest(splits: list[list[int]], group: list[float]) -> list[int]:
    return max(splits, key=lambda rows: statistics.pvariance([group[i] for i in rows]))


SPLITS = {  # splits[j]: the rows of the j lowest scores and the keep - j highest
    "top_bottom": lambda splits, group: splits[len(splits) // 2],
    "top": lambda splits, group: splits[0],
    "max_variance": widest,
    "random": lambda splits, group: splits[0],
}


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
        chosen = SPLITS[method](splits, group)
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
