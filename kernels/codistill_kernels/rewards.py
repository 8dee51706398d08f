"""From rewards to advantages: the KD reward, down-sampling, the group baseline."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from codistill_kernels._checks import (
    can_look,
    require,
    require_float,
    require_logps,
    require_mask,
    require_sequences,
    require_shape,
    require_tensor,
)
from codistill_kernels._estimators import ESTIMATORS, OF_REWARDS
from codistill_kernels._sequences import sequence_sums
from codistill_kernels.linear_reverse_kl import linear_reverse_kl

# --- KD reward ---------------------------------------------------------------------------------


def require_unused(estimator: str, **options: object) -> None:
    """Each option is None: the estimator would ignore it."""
    for name, option in options.items():
        require(option is None, name, f"left out with estimator {estimator!r}", "one")


def sampled_kd(
    teacher_logps: Tensor | None, student_logps: Tensor | None, estimator: str, rewards: Tensor
) -> Tensor:
    """[N] fp64: minus the estimate of KL(student || teacher) at each sampled token."""
    for name, logps in (("teacher_logps", teacher_logps), ("student_logps", student_logps)):
        require(logps is not None, name, f"[N] with {estimator!r}", None)
        require_tensor(name, logps, "rewards", rewards)
    assert teacher_logps is not None and student_logps is not None
    require_logps("teacher_logps", teacher_logps)
    require_shape("student_logps", student_logps, tuple(teacher_logps.shape), "[N]")
    require_float("student_logps", student_logps)
    log_ratio = teacher_logps.detach().double() - student_logps.detach().double()
    return -ESTIMATORS[estimator].value(log_ratio)


# --- down-sampling -----------------------------------------------------------------------------


def widest_split(falling: Tensor, keep: int) -> Tensor:
    """[P, 1] how many of the highest scores are among the `keep` scores of largest variance.

    falling: [P, M] scores in falling order.
    """
    # Less the lowest score, in fp64: a common offset costs no digits, and whole numbers stay exact,
    # so that equal variances are found equal.
    moved = falling.double() - falling[:, -1:].double()
    highest = torch.arange(keep, -1, -1, device=falling.device)
    sums = []
    for values in (moved, moved.square()):
        prefix = torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))  # [P, M + 1]
        lowest = prefix[:, -1:] - prefix[:, falling.shape[1] - keep + highest]
        sums.append(prefix[:, highest] + lowest)
    return highest[(keep * sums[1] - sums[0].square()).argmax(dim=1, keepdim=True)]


class Method(NamedTuple):
    """How `downsample` keeps the highest and the lowest of a group."""

    highest: Callable[[Tensor, int], int | Tensor]
    """(falling scores [P, M], keep) -> how many of the highest to keep, one number for all groups
    or [P, 1]; the others that are kept are the lowest."""
    divisor: int = 1
    """A number that divides `keep`."""
    is_random: bool = False
    """Whether scores are drawn at random, by a seed."""
    needs_finite: bool = False


METHODS = {
    "top_bottom": Method(lambda falling, keep: keep // 2, divisor=2),
    "top": Method(lambda falling, keep: keep),
    "max_variance": Method(widest_split, needs_finite=True),
    "random": Method(lambda falling, keep: keep, is_random=True),
}


def drawn_like(groups: Tensor, seed: int) -> Tensor:
    """Random scores of this shape, drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(groups.shape, dtype=torch.float64, generator=generator, device="cpu")
    return -draws.to(groups.device)


def in_groups(name: str, values: Tensor, group_size: int) -> Tensor:
    """[S] -> [S / group_size, group_size]"""
    require_tensor(name, values)
    require(values.ndim == 1, name, "[S]", tuple(values.shape))
    require(group_size > 0, "group_size", "> 0", group_size)
    if values.shape[0] % group_size:  # a message made for nothing would bind a graph to this S
        require(False, "group_size", f"a divisor of S = {values.shape[0]}", group_size)
    return values.view(-1, group_size)


# --- public functions --------------------------------------------------------------------------


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
    backend: str = "auto",
) -> Tensor:
    """Effective reward of each rollout: its reward less alpha times a KL estimate.

    d[t] = teacher_logps[t] - student_logps[t]
    k1: kd[s] = 1/max_completion_tokens sum_t d[t]
    k3: kd[s] = -1/max_completion_tokens sum_t (exp(d[t]) - 1 - d[t])
    exact: kd[s] = -1/max_completion_tokens sum_t KL(student || teacher)[t]
    out[s] = rewards[s] + alpha kd[s]
    Sums over unmasked tokens t of rollout s, in fp64 whatever the dtypes are, rounded once.

    Args:
        rewards: [S] rewards of the rollouts, fp32, bf16, fp16 or fp64.
        teacher_logps, student_logps: [N] log-probabilities (nats) of the rollouts' tokens under the
            large and the small model, sequence after sequence. None with "exact".
        cu_seqlens: [S + 1]; tokens of rollout s are cu_seqlens[s] : cu_seqlens[s + 1].
        alpha: >= 0, weight of the KD reward.
        max_completion_tokens: > 0, N of Eq. 6: a constant, not the length of the rollout.
        mask: [N] bool; False takes a token out (of a hint, of a cut-off completion), whatever its
            values are. None: all count.
        estimator: of KL(student || teacher), token by token. "k1", minus the log-ratio, is Eq. 6.
            "k3" is Eq. 4, as in Figure 9, where it trains less robustly: it is never negative, but
            one token that the teacher likes far better weighs exp(d) (fp32: -inf from d = 89).
            "exact" is what both estimate: the divergence over the whole vocabulary. There is no
            "k2" nor "abs": as with "k3", a token that the teacher likes better counts against the
            rollout, too, so that the reward leads away from the teacher there.
        teacher, student: "exact" only: (hidden states [N, H], lm_head weight [V, H]) of each.
        temperature, vocab_size, backend: "exact" only, as in `linear_reverse_kl`. A temperature of
            sampled tokens is already in their log-probabilities.

    Returns:
        [S] fp32 (fp64 for fp64 rewards), detached: the gradient of the KD term is zero in
        expectation (Lemma F.1).

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value, or is one that the
            estimator does not use. The message names it.

    Source: Eq. 6, Eq. 4. Definition: codistill_kernels.reference.kd_rewards.
    """
    require_tensor("rewards", rewards)
    require(rewards.ndim == 1, "rewards", "[S]", tuple(rewards.shape))
    require_float("rewards", rewards)
    names = (*OF_REWARDS, "exact")
    require(estimator in names, "estimator", f"one of {', '.join(names)}", repr(estimator))
    require(alpha >= 0, "alpha", ">= 0", alpha)
    require(max_completion_tokens > 0, "max_completion_tokens", "> 0", max_completion_tokens)
    if estimator == "exact":
        require_unused(estimator, teacher_logps=teacher_logps, student_logps=student_logps)
        for name, model in (("teacher", teacher), ("student", student)):
            is_pair = isinstance(model, tuple | list) and len(model) == 2
            require(is_pair, name, "(hidden states, weight)", type(model).__name__)
            for tensor in model or ():
                require_tensor(name, tensor, "rewards", rewards)
                require(tensor.ndim == 2, name, "([N, H], [V, H])", tuple(tensor.shape))
        assert teacher is not None and student is not None
        kl = linear_reverse_kl(
            student, teacher, temperature=temperature, vocab_size=vocab_size, backend=backend
        )
        kd = -kl.double()
    else:
        is_scaled = isinstance(temperature, Tensor) or temperature != 1
        require_unused(
            estimator,
            teacher=teacher,
            student=student,
            temperature=temperature if is_scaled else None,
            vocab_size=vocab_size,
            backend=None if backend == "auto" else backend,
        )
        kd = sampled_kd(teacher_logps, student_logps, estimator, rewards)
    require_mask(mask, len(kd), "rewards", rewards)
    require_sequences(cu_seqlens, len(kd), "rewards", rewards)
    require_shape("cu_seqlens", cu_seqlens, (len(rewards) + 1,), "[S + 1]")
    if mask is not None:
        kd = torch.where(mask, kd, 0.0)
    kd_sums = sequence_sums(kd, cu_seqlens)
    out = rewards.detach().double() + alpha * kd_sums / max_completion_tokens
    return out.to(rewards.dtype if rewards.dtype == torch.float64 else torch.float32)


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: Literal["std"] | None = None, eps: float = 0.0
) -> Tensor:
    """Reward minus the mean of its group; with scale="std" divided by the group's deviation.

    Args:
        rewards: [S], group after group; fp32, bf16, fp16 or fp64.
        group_size: > 0, divides S.
        scale: None is Eq. 7. "std" is Eq. 3, with the sample deviation (divisor group_size - 1) as
            torch.std and TRL compute it; a group of equal rewards has advantages 0.
        eps: >= 0, "std" only; added to the deviation (TRL: 1e-4), against large advantages from
            rewards that are all but equal.

    Returns:
        [S], detached, in the dtype of `rewards`: computed in fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or value. The message names it.

    Source: Eq. 7, Eq. 3. Definition: codistill_kernels.reference.group_advantages.
    """
    require(scale in (None, "std"), "scale", "None or 'std'", repr(scale))
    require(eps >= 0, "eps", ">= 0", eps)
    require(eps == 0 or scale == "std", "eps", "0 without scale 'std'", eps)
    groups = in_groups("rewards", rewards, group_size).detach()
    require_float("rewards", rewards)
    groups = groups if groups.dtype == torch.float64 else groups.float()
    centred = groups - groups.mean(dim=1, keepdim=True)
    # The mean of equal numbers may round: the difference that is left is no advantage.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    centred = torch.where(equal, 0.0, centred)
    if scale == "std":
        deviation = centred.square().sum(dim=1, keepdim=True).div(max(group_size - 1, 1)).sqrt()
        centred = torch.where(equal, 0.0, centred / (deviation + eps))
    return centred.reshape(-1).to(rewards.dtype)


def downsample(
    scores: Tensor,
    group_size: int,
    keep: int,
    *,
    method: str = "top_bottom",
    seed: int | None = None,
) -> Tensor:
    """Rows to keep of each group: those of highest score, of lowest score, or any.

    Args:
        scores: [S], group after group; Eq. 6's effective reward.
        group_size: M, divides S.
        keep: G, 0 < keep <= group_size; even for "top_bottom".
        method: "top_bottom": the keep/2 highest and the keep/2 lowest. "top": the highest.
            "max_variance": the rows of largest variance (PODS), which are the k highest and the
            keep - k lowest for some k; of equal variances the largest k. "random": without a look
            at the scores.
        seed: in [0, 2**63), of "random", which needs it, alone: equal seeds choose equal rows, on
            any device. Each group has rows of its own.

    Returns:
        [S / group_size * keep] int64, indices into `scores`, rising. Of equal scores the first
        counts as the higher one: always the same rows.

    Raises:
        ValueError: an argument has a wrong type, shape or value, or a seed is not used. On the CPU
            also: a score is NaN, or for "max_variance" infinite, where no variance is defined; a
            GPU is not waited for, and such a group keeps its highest scores.

    Source: section 3.3, after Xu et al. 2025 (arXiv:2504.13818). Definition:
    codistill_kernels.reference.downsample.
    """
    require(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
    highest, divisor, is_random, needs_finite = METHODS[method]
    groups = in_groups("scores", scores, group_size).detach()
    require(0 < keep <= group_size, "keep", "in 1 .. group_size", keep)
    require(keep % divisor == 0, "keep", f"a multiple of {divisor} with {method!r}", keep)
    if is_random:
        valid = seed is not None and 0 <= seed < 2**63
        require(valid, "seed", f"in [0, 2**63) with {method!r}", seed)
    else:
        require(seed is None, "seed", f"None with {method!r}", seed)
    if can_look(scores):
        require(not scores.isnan().any(), "scores", "numbers", "NaN")
        infinite = needs_finite and scores.isinf().any()
        require(not infinite, "scores", f"finite with {method!r}", "inf")
    if seed is not None:
        groups = drawn_like(groups, seed)
    falling, order = groups.sort(dim=1, descending=True, stable=True)
    # Place j is the j-th highest; from `highest` on they count from the other end.
    places = torch.arange(keep, device=scores.device)
    places = torch.where(places < highest(falling, keep), places, places + group_size - keep)
    chosen = order.gather(1, places.expand(len(groups), keep)).sort(dim=1).values
    first = torch.arange(len(groups), device=scores.device)[:, None] * group_size
    return (chosen + first).reshape(-1)
