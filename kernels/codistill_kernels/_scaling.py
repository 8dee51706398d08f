"""Gradients that are known up to a factor."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 512  # of a gradient scaled on a CPU: 3 MiB of fp32 at H = 1536, which stay in cache


def scale(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * factor, rounded once."""
    if gradient is None or gradient.dtype == dtype:
        return None if gradient is None else gradient * factor
    out = torch.empty_like(gradient, dtype=dtype)
    if gradient.is_cuda:  # converts as it writes
        return torch.mul(gradient, factor, out=out)
    # On a CPU `out=` would make the whole product in fp32 first.
    buffer = torch.empty_like(gradient[:ROWS_AT_ONCE])
    for part, result in zip(gradient.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE), strict=True):
        result.copy_(torch.mul(part, factor, out=buffer[: len(part)]))
    return out


def scale_in_place(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once, at the start of the gradient's own memory."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    source, out = gradient.view(-1), gradient.view(-1).view(dtype)[: gradient.numel()]
    # Results first .. 2 first take the bytes of sources first / 2 .. first, which are done with.
    first = min(4096, len(source))
    out[:first] = source[:first] * factor
    while first < len(source):
        part = slice(first, min(2 * first, len(source)))
        torch.mul(source[part], factor, out=out[part])
        first *= 2
    return out.view(gradient.shape)
