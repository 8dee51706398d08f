"""Log-probabilities and entropies of given tokens, and losses that are sums over tokens."""

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
