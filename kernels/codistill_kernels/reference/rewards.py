"""From rewards to advantages: the KD reward, down-sampling, the group baseline."""

import statistics

import torch
from torch import Tensor

from codistill_kernels.reference.divergences import linear_reverse_kl
from codistill_kernels.reference.policy_losses import KL_ESTIMATES


def kd_rewards(
    rewards: Tensor,
    teacher_logps: Tensor | None,
    student_logps: Tensor | None,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    max_completion_tokens: int,
    mask: Tensor | None = None,
    estimator: str = "k1",
    teacher: tuple[Tensor, Tensor] | None = None,
    student: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    if estimator == "exact":
        assert student is not None and teacher is not None
        kl = linear_reverse_kl(student, teacher, temperature=temperature, vocab_size=vocab_size)
    else:
        assert student_logps is not None and teacher_logps is not None
        kl = KL_ESTIMATES[estimator](teacher_logps - student_logps)
    kl = kl if mask is None else torch.where(mask, kl, 0.0)
    ends = cu_seqlens.tolist()
    out = []
    for reward, start, end in zip(rewards, ends[:-1], ends[1:], strict=True):
        out.append(reward - alpha * kl[start:end].sum() / max_completion_tokens)
    return torch.stack(out) if out else rewards.new_zeros(0)


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: str | None = None, eps: float = 0.0
) -> Tensor:
    out = torch.empty_like(rewards)
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        centred = group - group.mean()
        if scale == "std":
            deviation = group.std()
            centred = centred / (deviation + eps) if deviation > 0 else torch.zeros_like(group)
        out[start : start + group_size] = centred
    return out


def widest(splits: list[list[int]], group: list[float]) -> list[int]:
    return max(splits, key=lambda rows: statistics.pvariance([group[i] for i in rows]))


SPLITS = {  # splits[j]: the rows of the j lowest scores and the keep - j highest
    "top_bottom": lambda splits, group: splits[len(splits) // 2],
    "top": lambda splits, group: splits[0],
    "max_variance": widest,
    "random": lambda splits, group: splits[0],
}


def downsample(
    scores: Tensor,
    group_size: int,
    keep: int,
    *,
    method: str = "top_bottom",
    seed: int | None = None,
) -> Tensor:
    rows = []
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(
            len(scores) // group_size, group_size, dtype=torch.float64, generator=generator
        )
        scores = -scores.reshape(-1)  # those of the lowest draws
    for start in range(0, len(scores), group_size):
        group = scores[start : start + group_size].tolist()
        order = sorted(range(group_size), key=lambda i: (-group[i], i))
        splits = [order[:k] + order[group_size - (keep - k) :] for k in range(keep, -1, -1)]
        chosen = SPLITS[method](splits, group)
        rows += [start + i for i in sorted(chosen)]
    return torch.tensor(rows, dtype=torch.long, device=scores.device)
