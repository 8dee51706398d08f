"""Divergences of a student and a teacher over the whole vocabulary."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


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
