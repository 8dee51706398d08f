"""From rewards to advantages: the KD reward, down-sampling, the group baseline."""

from typing import Literal

import torch
from torch import Tensor

from codistill_kernels._checks import (
    can_look,
    require,
    require_float,
    require_sequences,
    require_shape,
)


def kd_rewards(
    rewards: Tensor,
    teacher_logps: Tensor,
    student_logps: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    max_completion_tokens: int,
    estimator: Literal["k1"] = "k1",
) -> Tensor:
    """Effective reward of each rollout.

    kd[s] = 1/max_completion_tokens sum_t (teacher_logps[t] - student_logps[t])
    out[s] = rewards[s] + alpha kd[s]

    Args:
        rewards: [S] rewards of the rollouts.
        teacher_logps, student_logps: [N] log-probabilities (nats) of the rollouts' tokens under the
            large and the small model, sequence after sequence.
        cu_seqlens: [S + 1]; tokens of rollout s are cu_seqlens[s] : cu_seqlens[s + 1].
        alpha: >= 0, weight of the KD reward.
        max_completion_tokens: > 0, N of Eq. 6: a constant, not the length of the rollout.
        estimator: "k1", the log-ratio itself.

    Returns:
        [S] fp32 (fp64 for fp64 rewards), detached: the gradient of the KD term is zero in
        expectation (Lemma F.1).

    Raises:
        ValueError: an argument has a wrong shape or value. The message names it.

    Source: Eq. 6. Definition: codistill_kernels.reference.kd_rewards.
    """
    require(rewards.ndim == 1, "rewards", "[S]", tuple(rewards.shape))
    require_float("rewards", rewards)
    require(teacher_logps.ndim == 1, "teacher_logps", "[N]", tuple(teacher_logps.shape))
    require_sequences(cu_seqlens, len(teacher_logps))
    require_shape("cu_seqlens", cu_seqlens, (len(rewards) + 1,), "[S + 1]")
    require_shape("student_logps", student_logps, tuple(teacher_logps.shape), "[N]")
    require(alpha >= 0, "alpha", ">= 0", alpha)
    require(max_completion_tokens > 0, "max_completion_tokens", "> 0", max_completion_tokens)
    require(estimator == "k1", "estimator", "'k1'", repr(estimator))
    log_ratio = (teacher_logps - student_logps).detach().double()
    sums = torch.segment_reduce(log_ratio, "sum", lengths=cu_seqlens.diff(), initial=0.0)
    out = rewards.detach().double() + alpha * sums / max_completion_tokens
    return out.to(rewards.dtype if rewards.dtype == torch.float64 else torch.float32)


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: Literal["std"] | None = None
) -> Tensor:
    """Reward minus the mean of its group; with scale="std" divided by the group's deviation.

    Args:
        rewards: [S], group after group.
        group_size: > 0, divides S.
        scale: None is Eq. 7. "std" is Eq. 3, with the sample deviation (divisor group_size - 1) as
            torch.std and TRL compute it; a group of equal rewards has advantages 0.

    Returns:
        [S], detached, in the dtype of `rewards`.

    Raises:
        ValueError: an argument has a wrong shape or value. The message names it.

    Source: Eq. 7, Eq. 3. Definition: codistill_kernels.reference.group_advantages.
    """
    require(scale in (None, "std"), "scale", "None or 'std'", repr(scale))
    require_float("rewards", rewards)
    groups = in_groups("rewards", rewards, group_size).detach()
    centred = groups - groups.mean(dim=1, keepdim=True)
    # The mean of equal numbers may round: what is left is no advantage.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    centred = torch.where(equal, 0.0, centred)
    if scale == "std":
        deviation = centred.square().sum(dim=1, keepdim=True).div(max(group_size - 1, 1)).sqrt()
        centred = torch.where(equal, 0.0, centred / deviation)
    return centred.reshape(-1)


def downsample(
    scores: Tensor, group_size: int, keep: int, *, method: Literal["top_bottom"] = "top_bottom"
) -> Tensor:
    """Rows to keep of each group: the keep/2 of highest and the keep/2 of lowest score.

    Args:
        scores: [S], group after group; Eq. 6's effective reward.
        group_size: M, divides S.
        keep: G, even, 0 < keep <= group_size.
        method: "top_bottom".

    Returns:
        [S / group_size * keep] int64, indices into `scores`, rising. Of equal scores the first
        counts as the higher one: always the same rows.

    Raises:
        ValueError: an argument has a wrong shape or value, or a score is NaN (checked on the CPU).

    Source: section 3.3, after Xu et al. 2025 (arXiv:2504.13818). Definition:
    codistill_kernels.reference.downsample.
    """
    require(method == "top_bottom", "method", "'top_bottom'", repr(method))
    groups = in_groups("scores", scores, group_size).detach()
    require(
        0 < keep <= group_size and keep % 2 == 0, "keep", f"even and in 2 .. {group_size}", keep
    )
    if can_look(scores):
        require(not scores.isnan().any(), "scores", "numbers", "NaN")
    order = groups.argsort(dim=1, descending=True, stable=True)
    half = keep // 2
    chosen = torch.cat((order[:, :half], order[:, group_size - half :]), dim=1).sort(dim=1).values
    first = torch.arange(len(groups), device=scores.device)[:, None] * group_size
    return (chosen + first).reshape(-1)


def in_groups(name: str, values: Tensor, group_size: int) -> Tensor:
    """[S] -> [S / group_size, group_size]"""
    require(values.ndim == 1, name, "[S]", tuple(values.shape))
    require(group_size > 0, "group_size", "> 0", group_size)
    require(
        len(values) % group_size == 0, "group_size", f"a divisor of S = {len(values)}", group_size
    )
    return values.view(-1, group_size)
