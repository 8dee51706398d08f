"""Log-probabilities and entropies from statistics of logits, and back to the logits' gradient."""

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._linear.softmax_torch import lse_parts_of


def log_probabilities(statistics: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """logps [N], and lse_parts [3, N] of the whole vocabulary."""
    if group is not None:
        statistics = merge_shards(statistics, group)
    lse_parts = lse_parts_of(statistics)
    maximum, log_sum, _ = lse_parts
    return (statistics[3] - maximum) - log_sum, lse_parts


def logps_and_entropy(
    statistics: Tensor, active: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """logps and entropy [N], 0 where not active, and lse_parts [3, N]."""
    logps, lse_parts = log_probabilities(statistics, group)
    _, log_sum, mean = lse_parts
    # Select, not multiply: an ignored row may hold NaN.
    entropy = torch.where(active, log_sum - mean, 0.0)
    return torch.where(active, logps, 0.0), entropy, lse_parts


def row_coefficients(dlogps: Tensor, dentropy: Tensor, active: Tensor) -> Tensor:
    """Coefficients [3, N] from the gradients of what `logps_and_entropy` returns."""
    c0 = torch.where(active, -dlogps, 0.0)
    return torch.stack((c0, c0, torch.where(active, -dentropy, 0.0)))


def as_coefficients(dlogps: Tensor, dentropy: Tensor | None) -> Tensor:
    """[3, R] of dz_j = dlogps ([j = token] - p_j) - dentropy p_j (z_j - E_p z)."""
    c2 = torch.zeros_like(dlogps) if dentropy is None else -dentropy
    return torch.stack((-dlogps, -dlogps, c2))


def merge_shards(statistics: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Statistics of the whole vocabulary from those of each process's rows."""
    maximum, rest, weighted, target = statistics
    largest = maximum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shift = maximum - largest
    scale = shift.exp()
    total = 1 + rest
    # A shard without a vocabulary row has maximum -inf: it adds nothing.
    weighted = torch.where(scale > 0, scale * (weighted + shift * total), 0.0)
    is_largest = shift == 0
    rest = torch.where(is_largest, rest, scale * total)
    sums = torch.stack((rest, weighted, target, is_largest.to(rest.dtype)))
    dist.all_reduce(sums, group=group)
    rest, weighted, target, ties = sums
    return torch.stack((largest, rest + (ties - 1), weighted, target))
