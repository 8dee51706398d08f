"""The losses of policy optimization, from log-probabilities, one token or sequence at a time."""

import math

import torch
from torch import Tensor


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
