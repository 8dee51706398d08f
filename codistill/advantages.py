"""From rewards to advantages: baseline, group and scale (Eq. 3, Eq. 7 and their relatives)."""

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.config import Config
from codistill_kernels import group_advantages


def advantages(config: Config, rewards: Tensor, accuracy: Tensor, kept: Tensor) -> Tensor:
    """[K] advantages of the rollouts `kept`, from rewards [S] and accuracy [S], M per prompt.

    mean: A_i = r_i - mean(r); leave_one_out: A_i = r_i - mean of the others = n/(n-1) of that, for
    a group of n; std: divided by the group's sample deviation; beta: see `beta_scales`.
    """
    options = config.advantage
    whole_group = options.group == "all"
    size = config.rollout.num_generations if whole_group else config.kept
    if not whole_group:
        rewards, accuracy = rewards[kept], accuracy[kept]
    out = group_advantages(rewards, size, scale="std" if options.scale == "std" else None)
    if options.baseline == "leave_one_out":
        out = out * (size / (size - 1))
    if options.scale == "beta":
        right = group_advantages(accuracy, size)
        scales = beta_scales(accuracy.view(-1, size).mean(dim=1)).to(out.dtype)
        out = out - right + right * scales.repeat_interleave(size)
    return out[kept] if whole_group else out


def beta_scales(accuracies: Tensor) -> Tensor:
    """[P] accuracy of each prompt -> [P] factor on its advantages, fp64: BNPO.

    1 / density(p; 1 + a/3, 1 + b/3), the density that of a Beta distribution, where (a, b) are its
    parameters with the mean and the variance of all processes' accuracies. The factor is 1 where p
    is 0 or 1 (no advantage there) and where all accuracies are alike (nothing to fit).

    Every process must call. Source: Xiao et al. 2025 (arXiv:2506.02864).
    """
    p = accuracies.double()
    sums = torch.stack([p.sum(), p.square().sum(), p.new_tensor(len(p))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    count = sums[2]
    mean = sums[0] / count
    variance = (sums[1] - count * mean.square()) / (count - 1).clamp(min=1)
    if not variance > 1e-12:
        return torch.ones_like(p)
    strength = (mean * (1 - mean) / variance - 1).clamp(min=0) / 3  # (a + b) / 3
    density = torch.distributions.Beta(1 + strength * mean, 1 + strength * (1 - mean))
    inside = (p > 0) & (p < 1)
    scales = (-density.log_prob(torch.where(inside, p, 0.5))).exp()
    return torch.where(inside, scales, 1.0)
