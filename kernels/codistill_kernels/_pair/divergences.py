"""Divergences of a student p from a teacher q over the vocabulary: a kind is one function and one
line of `DIVERGENCES`.

A function gives the terms of the value and, beside them, the closed form of their slope by log p:
with t_j = d value / d log p_j, every p_j by itself, the gradient by the student's logits is
dz_j = t_j - p_j sum_k t_k. A part of t_j that is a multiple of p_j drops out: it may be left out.
A test holds each slope to the derivative of the value and both to reference.linear_divergence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from codistill_kernels._linear.head import Head
from codistill_kernels._linear.slab_sizes import pieces
from codistill_kernels._linear.softmax_torch import lse_parts_of, scale, statistics, to_raw

# --- kinds -------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What each token of the vocabulary adds to a divergence, [R, V]."""

    value: Tensor
    slope: Tensor


def reverse_kl(log_p: Tensor, log_q: Tensor, jsd_weight: float) -> Terms:
    """KL(p || q) = sum p (log p - log q)"""
    terms = weighted(log_p.exp(), log_p - log_q)
    return Terms(terms, terms)


def forward_kl(log_p: Tensor, log_q: Tensor, jsd_weight: float) -> Terms:
    """KL(q || p) = sum q (log q - log p)"""
    q = log_q.exp()
    return Terms(weighted(q, log_q - log_p), -q)


def jsd(log_p: Tensor, log_q: Tensor, jsd_weight: float) -> Terms:
    """w KL(q || m) + (1 - w) KL(p || m) with m = w q + (1 - w) p"""
    p, q, apart = log_p.exp(), log_q.exp(), log_p - log_q
    # log m = max(log p, log q) + common: 1 plus something small where the models agree.
    share = torch.where(apart > 0, jsd_weight, torch.full_like(apart, 1 - jsd_weight))
    common = torch.log1p(share * torch.expm1(-apart.abs()))
    from_q = weighted(q, (-apart).clamp(max=0) - common)
    from_p = weighted(p, apart.clamp(max=0) - common)
    # log p/m + log(1 - w): where the models are far apart, log p/m is all but the same everywhere.
    odds = math.log(jsd_weight) - math.log1p(-jsd_weight)
    slope = weighted(p, torch.nn.functional.logsigmoid(apart - odds))
    return Terms(jsd_weight * from_q + (1 - jsd_weight) * from_p, (1 - jsd_weight) * slope)


def weighted(probabilities: Tensor, logs: Tensor) -> Tensor:
    """probabilities * logs; 0 where the probability is 0, also times infinity. NaN stays."""
    return torch.where(probabilities == 0, 0.0, probabilities * logs)


Divergence: TypeAlias = Callable[[Tensor, Tensor, float], Terms]

DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
}

# --- rows of logits ----------------------------------------------------------------------------

# Logits of a block of rows, 8 MiB per tensor; on a CPU 2**19 took 1.1 times as long, because each
# operation starts its threads.
ELEMENTS = 2**21


def divergences(
    raw_p: Tensor,
    raw_q: Tensor,
    student: Head,
    teacher: Head,
    kind: str,
    jsd_weight: float,
    coefficients: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Divergences [R] from the raw logits [R, V] of both models.

    out [R, V], which may be raw_p itself: their gradients by raw_p, times coefficients [R] (None:
    1).
    """
    values = raw_p.new_empty(len(raw_p))
    for part in pieces(len(raw_p), max(1, ELEMENTS // raw_p.shape[1])):
        raw, temperature = raw_p[part], student.temperature[part]
        log_p, rest = log_softmax(raw, temperature, student.softcap)
        log_q, _ = log_softmax(raw_q[part], teacher.temperature[part], teacher.softcap)
        terms = DIVERGENCES[kind](log_p, log_q, jsd_weight)
        values[part] = terms.value.sum(dim=1).clamp(min=0)  # below 0: rounding; NaN stays
        if out is not None:
            dz = logit_gradients(log_p, rest, terms.slope)
            if coefficients is not None:
                dz *= coefficients[part, None]
            out[part] = to_raw(dz, raw, temperature, student.softcap)
    return values


def log_softmax(raw: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """log p [R, V] with the digits of a token that has nearly all the mass, and [R] the sum of the
    other tokens' p over the largest p."""
    z = scale(raw, temperature, softcap)
    none = torch.full(z.shape[:1], -1, dtype=torch.int64, device=z.device)
    of_rows = statistics(z, none)
    maximum, log_sum, _ = lse_parts_of(of_rows)
    return z.sub_(maximum[:, None]).sub_(log_sum[:, None]), of_rows[1]


def logit_gradients(log_p: Tensor, rest: Tensor, slope: Tensor) -> Tensor:
    """dz_j = t_j - p_j sum_k t_k, [R, V]"""
    at = log_p.argmax(dim=1, keepdim=True)
    of_largest = slope.gather(1, at)
    of_others = slope.scatter(1, at, 0.0).sum(dim=1, keepdim=True)
    dz = slope - log_p.exp() * (of_others + of_largest)
    # Where p is near 1 this has no digits left; (1 - p) t - p (sum of the others' t) keeps them.
    rest = rest[:, None]
    return dz.scatter_(1, at, (rest * of_largest - of_others) / (1 + rest))
