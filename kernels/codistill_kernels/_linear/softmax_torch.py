"""Softmax statistics and gradients of raw logits a = x . w + bias, in plain PyTorch.

What statistics, lse_parts and coefficients hold stands in chunks.py.
"""

import torch
from torch import Tensor

FAR = -1e4  # exp of it is 0 in fp64 too; a logit of -inf would give 0 * inf


def scale(raw: Tensor, temperature: Tensor, softcap: float) -> Tensor:
    """Logits z [R, V] = softcap tanh(raw / softcap) / temperature [R]; softcap 0: none."""
    if softcap == 0:
        return raw / temperature[:, None]
    return raw.div(softcap).tanh_().mul_(softcap).div_(temperature[:, None])


def statistics(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[4, R] of logits z [R, V] over some vocabulary rows."""
    if not logits.shape[1]:  # a shard of nothing but rows outside the vocabulary
        empty = logits.new_zeros((4, len(logits)))
        empty[0] = -torch.inf
        return empty
    here, owned = local_columns(token_ids, logits.shape[1])
    target = torch.where(owned, logits.gather(1, here[:, None]).squeeze(1), 0.0)
    maximum, at = logits.max(dim=1, keepdim=True)
    shifted = (logits - maximum).clamp_(min=FAR)
    exps = shifted.exp()
    weighted = shifted.mul_(exps).sum(dim=1)
    # 0 in the place of the maximum's term, but NaN where it is infinite: no other term may show it.
    rest = exps.scatter_(1, at, maximum - maximum).sum(dim=1)
    return torch.stack((maximum.squeeze(1), rest, weighted, target))


def lse_parts_of(statistics: Tensor) -> Tensor:
    """[3, R] m, log sum exp(z - m), E_p[z - m] from the statistics of the whole vocabulary."""
    maximum, rest, weighted, _ = statistics
    return torch.stack((maximum, rest.log1p(), weighted / (1 + rest)))


def gradients(
    raw: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    coefficients: Tensor,
    lse_parts: Tensor,
) -> Tensor:
    """d / d raw [R, V] = dz times the slope dz/da, where

    dz_j = c0 p_j - c1 [j = token] + c2 p_j (z_j - E_p z)

    coefficients, lse_parts: [3, R]; the latter of the whole vocabulary.
    """
    if not raw.shape[1]:
        return torch.zeros_like(raw)
    c0, c1, c2 = coefficients[:, :, None]  # [R, 1] each
    maximum, log_sum, mean = lse_parts[:, :, None]
    here, owned = local_columns(token_ids, raw.shape[1])
    here = here[:, None]
    shifted = scale(raw, temperature, softcap).sub_(maximum).clamp_(min=FAR)
    logps = shifted - log_sum
    target_logp, target_shifted = logps.gather(1, here), shifted.gather(1, here)
    dz = logps.exp_().mul_(shifted.sub_(mean).mul_(c2).add_(c0))
    # c0 p_y - c1 loses all digits where p_y is near 1 and c0 = c1: expm1 keeps them.
    entropy_part = c2 * target_logp.exp() * (target_shifted - mean)
    at_target = c0 * target_logp.expm1() + (c0 - c1) + entropy_part
    dz = dz.scatter_(1, here, torch.where(owned[:, None], at_target, dz.gather(1, here)))
    return to_raw(dz, raw, temperature, softcap)


def to_raw(dz: Tensor, raw: Tensor, temperature: Tensor, softcap: float) -> Tensor:
    """d / d raw from d / dz, in place."""
    if softcap != 0:
        dz *= 1 - raw.div(softcap).tanh_().square_()
    return dz.div_(temperature[:, None])


def local_columns(token_ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each token, or 0 where it is not among these; and whether it is among them."""
    owned = (token_ids >= 0) & (token_ids < columns)
    return torch.where(owned, token_ids, 0), owned
