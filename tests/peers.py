"""What other codebases compute, written by us in plain PyTorch: the definitions that the adapters
in codistill_kernels.integrations are compared with. Tensors are [B, T], masks are bool."""

import torch
from torch import Tensor


def log_softmax_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels [...] and entropies, from logits in the operands' dtype."""
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scale = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_p = (logits / scale).log_softmax(-1)
    return log_p.gather(-1, labels[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def aggregate(losses: Tensor, mask: Tensor, mode: str, *, copies=1, tokens=None, sequences=None):
    """verl's loss_agg_mode. copies: number of data-parallel ranks, whose gradients are averaged;
    tokens, sequences: counts over all ranks."""
    losses = torch.where(mask, losses, 0.0)
    if mode == "token-sum":
        return losses.sum() * copies
    if mode == "token-mean":
        return losses.sum() / (mask.sum() if tokens is None else tokens) * copies
    per_sequence = losses.sum(-1)
    if mode == "seq-mean-token-mean":
        per_sequence = per_sequence / mask.sum(-1).clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        per_sequence = per_sequence / mask.shape[-1]
    return per_sequence.sum() / (mask.any(-1).sum() if sequences is None else sequences) * copies


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, far: float | None = None):
    """PPO's surrogate. far: the dual clip, by which a token with A < 0 loses at most far |A|."""
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if far is None:
        return gain
    return torch.where(advantages < 0, torch.maximum(gain, far * advantages), gain)


def verl_gain(name: str, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, settings):
    """What verl's policy loss `name`, if not geo_mean, maximizes at each token, before weights."""
    low, high = settings["low"], settings["high"]
    difference = logps - old
    ratio = difference.clamp(-20, 20).exp()
    if name == "vanilla":
        return clipped(ratio, advantages, low, high, settings["far"])
    if name == "gspo":  # the sequence's ratio, with each token's own gradient
        mean = torch.where(mask, difference, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
        own = (mean.detach()[:, None] + logps - logps.detach()).clamp(max=10).exp()
        return clipped(own, advantages, low, high)
    if name == "cispo":
        return ratio.clamp(1 - low, 1 + high).detach() * advantages * logps
    if name == "sapo":
        t = torch.where(advantages > 0, settings["positive"], settings["negative"])
        return 4 / t * (t * (ratio - 1)).sigmoid() * advantages
    if name == "gpg":
        return logps * advantages
    if name == "dro":
        return logps * advantages - 0.5 * settings["beta"] * difference.square()
    p, q = logps.detach().exp(), old.exp()
    if name == "dppo_tv":
        up, down = p - q > high, p - q < -low
    else:
        kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        up, down = (kl > high) & (p > q), (kl > low) & (p < q)
    weight = ratio.detach().clamp(max=settings["far"])
    return torch.where(torch.where(advantages > 0, up, down), 0.0, weight * advantages * logps)


def verl_loss(name, logps, old, advantages, mask, mode, settings, weights=None, **counts):
    """verl's registered policy loss `name`."""
    if name == "geo_mean":  # it has one advantage per sequence
        sign, length = advantages.sign(), mask.sum(-1).clamp(min=1)
        difference = logps - old
        bounded = difference.clamp(-settings["low"], settings["high"])
        bounded = sign * torch.minimum(sign * difference, sign * bounded)
        mean = torch.where(mask, bounded, 0.0).sum(-1) / length
        gain = mean.exp() * torch.where(mask, advantages, 0.0).sum(-1) / length
        if weights is not None:
            gain = gain * (torch.where(mask, weights.log(), 0.0).sum(-1) / length).exp()
        return -gain.mean()
    gain = verl_gain(name, logps, old, advantages, mask, settings)
    gain = gain if weights is None else gain * weights
    mode = "seq-mean-token-mean" if name in ("gspo", "sapo") else mode
    return aggregate(-gain, mask, mode, **counts)


def openrlhf_loss(
    logps, old, advantages, mask, rollout=None, *, kind, far, correction, by_token, **counts
):
    """OpenRLHF's PolicyLoss with clip bounds of 0.2 and correction thresholds (0.8, 1.3)."""
    difference = logps - old
    if kind == "gspo":
        difference = logps - (old if correction is None else rollout)
        mean = torch.where(mask, difference, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
        gain = clipped(mean.exp()[:, None], advantages, 0.2, 0.2, far)
        return aggregate(-gain, mask, "seq-mean-token-mean", **counts)
    gain = clipped(difference.clamp(-20, 20).exp(), advantages, 0.2, 0.2, far)
    if correction is not None:
        log_weight = old - rollout
        weight = log_weight.exp()
        mean = torch.where(mask, log_weight, 0.0).sum(-1, keepdim=True) / mask.sum(-1, True)
        inside = weight if correction == "icepop" else mean.exp()
        inside = (inside >= 0.8) & (inside <= 1.3)
        tis = weight.clamp(0.8, 1.3)
        gain = gain * (tis if correction == "tis" else torch.where(inside, weight, 0.0))
    return aggregate(-gain, mask, "token-mean" if by_token else "seq-mean-token-mean", **counts)


def prime_rl_loss(logps, old, advantages, mask, weights, *, low, high, tau, kl_tau, both_ways):
    """prime-rl's DPPO loss, or its IPO loss with both_ways, as a sum over tokens."""
    moved = logps.detach().exp() - old.exp()
    out = torch.where(advantages > 0, moved > high, moved < -low)
    out = moved.abs() > high if both_ways else out
    gain = torch.where(out, 0.0, tau * advantages * (logps - old).exp())
    losses = kl_tau * (logps - old).square() - gain
    return torch.where(mask, losses * weights, 0.0).sum()
