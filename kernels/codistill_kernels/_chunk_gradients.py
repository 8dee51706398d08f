"""Losses by token and their gradients in one pass over chunks of the logits."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._linear import GradientSums, split_rows
from codistill_kernels.linear_logps import log_probabilities

if TYPE_CHECKING:
    from codistill_kernels._linear import Chunks

Slopes = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(rows, logps, entropy) [R] -> d loss / d logps and d loss / d entropy, None where it is 0."""


def gradients_by_chunks(
    chunks: "Chunks",
    rows: Tensor,
    most: int,
    slopes: Slopes,
    needs: Sequence[bool],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """logps and entropy [N], 0 but for `rows`, and the gradients from the very logits that gave
    them, `most` rows at a time."""
    sums = GradientSums(chunks, needs)
    logps = torch.zeros_like(chunks.head.temperature)
    entropy = torch.zeros_like(logps)
    for part in split_rows(rows, most):
        if not len(part):
            break
        logps[part], softmax = log_probabilities(chunks.hold(part), group)
        entropy[part] = softmax[1] - softmax[2]
        coefficients = as_coefficients(*slopes(part, logps[part], entropy[part]))
        kept = coefficients.ne(0).any(dim=0).nonzero().squeeze(1)  # exact: others would add zeros
        if len(kept):
            sums.add(part, kept, coefficients[:, kept], softmax[:, kept])
    return logps, entropy, sums.results()


def as_coefficients(dlogps: Tensor, dentropy: Tensor | None) -> Tensor:
    """[3, R]: dz_j = dlogps ([j = y] - p_j) - dentropy p_j (z_j - E_p z)."""
    c2 = torch.zeros_like(dlogps) if dentropy is None else -dentropy
    return torch.stack((-dlogps, -dlogps, c2))
