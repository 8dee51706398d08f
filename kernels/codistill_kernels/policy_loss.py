"""The importance-ratio losses of policy optimization, from log-probabilities.

One step serves the loss and its gradient: `surrogate_terms` says which ratio, advantage and weight
each token (gspo, gmpo: each sequence) has, and where a bound stands in the place of the ratio.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from codistill_kernels._checks import (
    require,
    require_float,
    require_mask,
    require_normalizer,
    require_sequences,
    require_shape,
    require_tensor,
)
from codistill_kernels._tokens import TokenShape

SEQUENCE_KINDS = ("gspo", "gmpo")
KINDS = ("clip", "cispo", *SEQUENCE_KINDS)


@dataclass(frozen=True)
class PolicyLoss:
    """Which surrogate, and its bounds. r is the ratio of a token, L the unmasked tokens of a
    sequence, sg() stops the gradient and c() clips to [1 - epsilon_low, 1 + epsilon_high].

    kind: what is summed over unmasked tokens.
        "clip": min(r A, c(r) A), the token-level surrogate of Eq. 2, 5 and 10. With epsilon_high >
            epsilon_low it is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476).
        "cispo": sg(c(r)) A logp (MiniMax-M1, arXiv:2506.13585). Bounds the weight of a token,
            whatever the sign of A, and never cuts its gradient. epsilon_low = 1: no lower bound.
        "gspo": min(s A, c(s) A) with s = exp(1/L sum_sequence log r) (Zheng et al. 2025,
            arXiv:2507.18071). The gradient flows through the mean to every token.
        "gmpo": exp(1/L sum_sequence b(log r)) A (Zhao et al. 2025, arXiv:2507.20673), where b
            bounds nats: at most epsilon_high where A > 0, at least -epsilon_low where A < 0.
    epsilon_low, epsilon_high: the ratio (gspo: s, gmpo: log r) stops pushing below the low bound
        where A < 0 and above the high bound where A > 0. A ratio exactly on a bound is not cut.
    dual_clip: > 1, "clip" only; with a negative advantage the surrogate is at least
        dual_clip * advantage (Ye et al. 2020, arXiv:1912.09729). None: no such bound.
    log_ratio_clamp: > 0, nats; log r of each token is brought into [-log_ratio_clamp,
        log_ratio_clamp] before all else, against an overflow, and a token outside has no gradient
        ("cispo": only its weight is bounded). On the bound it is not cut. None: log r as it is.

    Raises:
        ValueError: a field is out of range, or set and not used by the kind.
    """

    kind: str = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    log_ratio_clamp: float | None = None

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", repr(self.kind))
        valid, expected = {
            "cispo": (0 <= self.epsilon_low <= 1, "in [0, 1]"),
            "gmpo": (self.epsilon_low >= 0, ">= 0"),
        }.get(self.kind, (0 <= self.epsilon_low < 1, "in [0, 1)"))
        require(valid, "epsilon_low", expected, self.epsilon_low)
        require(self.epsilon_high >= 0, "epsilon_high", ">= 0", self.epsilon_high)
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "> 1", self.dual_clip)
        unused = self.dual_clip is not None and self.kind != "clip"
        require(not unused, "dual_clip", f"None with kind {self.kind!r}", self.dual_clip)
        valid = self.log_ratio_clamp is None or self.log_ratio_clamp > 0
        require(valid, "log_ratio_clamp", "> 0", self.log_ratio_clamp)

    @property
    def is_sequence_level(self) -> bool:
        """Whether a token's gradient depends on the other tokens of its sequence."""
        return self.kind in SEQUENCE_KINDS

    def bounds(self) -> list[float]:
        """The other fields, as an argument of a custom op: NaN for None, trailing None left out."""
        fields = [self.epsilon_low, self.epsilon_high, self.dual_clip, self.log_ratio_clamp]
        while fields[-1] is None:
            fields.pop()
        return [math.nan if field is None else field for field in fields]

    @classmethod
    def from_bounds(cls, kind: str, bounds: list[float]) -> "PolicyLoss":
        """The loss of which these are the `bounds`."""
        low, high, *others = bounds
        return cls(kind, low, high, *(None if math.isnan(field) else field for field in others))


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    loss: PolicyLoss = PolicyLoss(),  # noqa: B008  (frozen)
    normalizer: float | Tensor,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Surrogate over tokens: a sum, divided once.

    r[n] = exp(logps[n] - old_logps[n])
    loss = -(1/normalizer) sum_n w[n] surrogate[n] over unmasked tokens, surrogate as in PolicyLoss
    A ratio on a bound is not clipped. Advantage or weight 0 adds exactly 0, whatever the ratio, and
    whether or not the other of the two is infinite.

    Tokens are flat, [N], or rows of sequences: every [N] below is then [B, T], S is B, and
    `cu_seqlens` is left out; padding is for `mask`.

    Args:
        logps: [N] log-probabilities of the policy in training, nats; fp32, bf16, fp16 or fp64.
            Differentiable. All else is brought to its precision, fp32 or fp64, whatever its own is.
        old_logps: [N] those of the policy that wrote the tokens; in Eq. 5 and Eq. 10 alike the
            small model's. None: the policy itself, so r = 1, and the gradient is that of r.
        advantages: [N], or [S] with `cu_seqlens` or tokens [B, T]. No gradient flows into it.
        mask: [N] bool; False takes a token out of everything, whatever its other values are.
        loss: which surrogate.
        normalizer: >= 0; the count that the sum is divided by, over all processes and
            micro-batches. A sum of 0 over 0, where nothing is unmasked, is 0 with gradient 0.
            prompts * G * max completion tokens: Eq. 5, Eq. 10, Dr. GRPO (arXiv:2503.20783);
            unmasked tokens of the local batch: BNPO; of the global batch: DAPO (arXiv:2503.14476);
            prompts * G, with advantages A_i / |o_i|: the 1/|o_i| of Eq. 2 (GRPO), GSPO and GMPO, as
            every surrogate is positively homogeneous in A (|o_i|: unmasked tokens).
        importance_weights: [N] w, e.g. those of `importance_weights`. No gradient.
        cu_seqlens: [S + 1]; tokens of sequence s are cu_seqlens[s] : cu_seqlens[s + 1]. Needed by
            gspo and gmpo, where every sequence must be whole, unless tokens are [B, T].

    Returns:
        loss, a scalar (fp32; fp64 for fp64 logps), and statistics over unmasked tokens, on the
        device of logps: `tokens`, `ratio_mean`, `ratio_max`, `clip_fraction_low` and `_high` (share
        of tokens whose gradient a bound cuts; cispo: whose ratio is bounded; gspo: all tokens of a
        clipped sequence), `approx_kl` (mean of r - 1 - log r, nats), `ess` (effective sample size,
        (sum r)^2 / (tokens sum r^2), in (0, 1]) and detached `logps`. Without a token all are 0.
        r is that before log_ratio_clamp; a token beyond it counts as cut (cispo: not).

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value. The message names
            it. Values of tensors are looked at on the CPU outside torch.compile only.

    Source: Eq. 2, Eq. 5, Eq. 10. Definition: codistill_kernels.reference.policy_loss.
    """
    tokens = TokenShape.of("logps", logps)
    logps, old_logps, mask, importance_weights = tokens.flat(
        logps=logps, old_logps=old_logps, mask=mask, importance_weights=importance_weights
    )
    advantages, cu_seqlens = tokens.sequences("advantages", advantages, cu_seqlens)
    check_inputs(
        loss, logps, old_logps, advantages, mask, normalizer, importance_weights, cu_seqlens
    )
    logps = logps if logps.dtype == torch.float64 else logps.float()
    keep = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    # Select before exp: NaN behind the mask must reach neither the loss nor its gradient.
    log_ratio = torch.where(keep, log_ratios(logps, old_logps), 0.0)
    terms = surrogate_terms(log_ratio, advantages, loss, importance_weights, keep, cu_seqlens)
    objective = terms.weights * (terms.ratio * terms.advantages)
    if loss.kind == "cispo":
        factor = objective.detach()
        objective = factor * torch.where(factor != 0, logps, 0.0)
    statistics = summarize(log_ratio.detach(), keep, terms.low, terms.high)
    total = -objective.sum()
    statistics |= {"logps": logps.detach()}
    return tokens.restored(total / divisor(total, normalizer), statistics)


def importance_weights(
    trainer_logps: Tensor,
    engine_logps: Tensor,
    mask: Tensor | None = None,
    *,
    truncate: float | None = None,
    drop: tuple[float, float] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weights that correct for an engine whose probabilities differ from the trainer's.

    ratio[n] = exp(trainer_logps[n] - engine_logps[n])
    out[n] = 0 if ratio[n] is outside `drop`, else min(ratio[n], truncate)

    Args:
        trainer_logps, engine_logps: [N] or [B, T] log-probabilities (nats) of the same tokens under
            the same weights, as the trainer and as the engine computed them.
        mask: [N] or [B, T] bool; where False the weight is 0, whatever the values are.
        truncate: > 0, largest weight: truncated importance sampling (Yao et al. 2025). None: no
            bound, and a ratio that overflows is inf.
        drop: (low, high), 0 <= low <= high: a ratio outside has weight 0, on a bound it is kept
            (masked importance sampling; token by token IcePop, Ling Team 2025). None: all stay.
        cu_seqlens: [S + 1]; the ratio is that of the whole sequence, exp of the sum over its
            unmasked tokens, and all its tokens have the same weight. For flat tokens [N] only.

    Returns:
        [N] or [B, T] >= 0, detached, fp32 (fp64 for fp64 trainer_logps). NaN logps give NaN, never
        0.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value. The message names
            it.

    Definition: codistill_kernels.reference.importance_weights.
    """
    shape = TokenShape.of("trainer_logps", trainer_logps)
    trainer_logps, engine_logps, mask = shape.flat(
        trainer_logps=trainer_logps, engine_logps=engine_logps, mask=mask
    )
    expected = "None with tokens [B, T]: flatten them for ratios of sequences"
    require(shape.is_flat or cu_seqlens is None, "cu_seqlens", expected, "one")
    require_logps("trainer_logps", trainer_logps)
    like = ("trainer_logps", trainer_logps)
    require_tensor("engine_logps", engine_logps, *like)
    require_shape("engine_logps", engine_logps, tuple(trainer_logps.shape), "[N]")
    require_mask(mask, len(trainer_logps), *like)
    require(truncate is None or truncate > 0, "truncate", "> 0", truncate)
    low, high = (0.0, float("inf")) if drop is None else drop
    require(0 <= low <= high, "drop", "(low, high) with 0 <= low <= high", drop)
    dtype = torch.float64 if trainer_logps.dtype == torch.float64 else torch.float32
    log_ratio = trainer_logps.detach().to(dtype) - engine_logps.detach().to(dtype)
    keep = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    log_ratio = torch.where(keep, log_ratio, 0.0)
    if cu_seqlens is not None:
        require_sequences(cu_seqlens, len(trainer_logps), *like)
        log_ratio = to_tokens(sequence_sums(log_ratio, cu_seqlens), cu_seqlens, len(log_ratio))
    ratio = log_ratio.exp()
    ratio = torch.where(keep & ~((ratio < low) | (ratio > high)), ratio, 0.0)
    return shape.rows(ratio if truncate is None else ratio.clamp(max=truncate))


def log_ratios(logps: Tensor, old_logps: Tensor | None) -> Tensor:
    """[N] in the dtype of logps; without old_logps 0, with the gradient of logps."""
    old_logps = logps if old_logps is None else old_logps
    return logps - old_logps.detach().to(logps.dtype)


def divisor(total: Tensor, normalizer: float | Tensor) -> float | Tensor:
    """What a sum is divided by: the normalizer, or infinity for 0 over 0.

    Nothing to train on has thereby loss 0 and gradient 0. Nothing is looked at, so that no GPU is
    waited for.
    """
    if not isinstance(normalizer, Tensor):
        if normalizer != 0:
            return normalizer
        normalizer = torch.zeros_like(total)
    normalizer = normalizer.detach().to(total)
    return torch.where((normalizer == 0) & (total.detach() == 0), torch.inf, normalizer)


class Terms(NamedTuple):
    """Of each token [N] (gspo, gmpo: of each sequence [S]): sum of weights * ratio * advantages."""

    ratio: Tensor  # differentiable in log_ratio where no bound cuts
    low: Tensor  # [N] bool in every kind: cut by the low bound
    high: Tensor
    advantages: Tensor
    weights: Tensor  # [S]: the sum over unmasked tokens


def surrogate_terms(
    log_ratio: Tensor,
    advantages: Tensor,
    loss: PolicyLoss,
    weights: Tensor | None,
    keep: Tensor,
    cu_seqlens: Tensor | None,
) -> Terms:
    """log_ratio is 0 where not `keep`; the others may be anything there."""
    dtype = log_ratio.dtype
    advantages = advantages.detach().to(dtype)
    weights = torch.ones_like(log_ratio) if weights is None else weights.detach().to(dtype)
    weights = torch.where(keep, weights, 0.0)
    clamp = loss.log_ratio_clamp
    ratios = log_ratio if clamp is None else log_ratio.clamp(-clamp, clamp)
    if loss.is_sequence_level:
        assert cu_seqlens is not None, loss.kind
        terms = sequence_terms(ratios, advantages, loss, weights, keep, cu_seqlens)
    else:
        if cu_seqlens is not None:
            advantages = to_tokens(advantages, cu_seqlens, len(log_ratio))
        advantages = torch.where(keep, advantages, 0.0)
        terms = Terms(*bounded_ratio(ratios, advantages, weights, loss), advantages, weights)
    if clamp is not None and loss.kind != "cispo":
        low, high = terms.low | (log_ratio < -clamp), terms.high | (log_ratio > clamp)
        terms = terms._replace(low=low, high=high)
    # Both 0 where one is, lest an infinite other one make it NaN. NaN itself is never hidden.
    advantages, weights = terms.advantages, terms.weights
    none = (advantages == 0) & ~weights.isnan() | (weights == 0) & ~advantages.isnan()
    advantages, weights = (torch.where(none, 0.0, factor) for factor in (advantages, weights))
    return terms._replace(advantages=advantages, weights=weights)


def sequence_terms(
    log_ratio: Tensor,
    advantages: Tensor,
    loss: PolicyLoss,
    weights: Tensor,
    keep: Tensor,
    cu_seqlens: Tensor,
) -> Terms:
    count = sequence_sums(keep.to(log_ratio.dtype), cu_seqlens)
    advantages = torch.where(count > 0, advantages, 0.0)
    weights = sequence_sums(weights, cu_seqlens)
    if loss.kind == "gspo":
        mean = sequence_sums(log_ratio, cu_seqlens) / count.clamp(min=1)
        ratio, low, high = bounded_ratio(mean, advantages, weights, loss)
        low, high = (keep & to_tokens(cut, cu_seqlens, len(keep)) for cut in (low, high))
        return Terms(ratio, low, high, advantages, weights)
    low, high, bound = cuts(log_ratio.detach(), to_tokens(advantages, cu_seqlens, len(keep)), loss)
    log_ratio = torch.where(low | high, bound, log_ratio)
    mean = sequence_sums(log_ratio, cu_seqlens) / count.clamp(min=1)
    ratio = torch.where((advantages != 0) & (weights != 0), mean, 0.0).exp()
    return Terms(ratio, low, high, advantages, weights)


def bounded_ratio(
    log_ratio: Tensor, advantages: Tensor, weights: Tensor, loss: PolicyLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """The ratio or the bound in its place, and where the low and the high bound cut."""
    low, high, bound = cuts(log_ratio.detach(), advantages, loss)
    # Chosen by comparison: torch.minimum would split the gradient of a tie. And before exp: a ratio
    # that overflows where nothing depends on it would make the gradient 0 * inf.
    free = ~(low | high)
    needed = free & (advantages != 0) & (weights != 0)
    ratio = torch.where(needed, log_ratio, 0.0).exp()
    return torch.where(free, ratio, bound), low, high


def cuts(log_ratio: Tensor, advantages: Tensor, loss: PolicyLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Where the low and the high bound cut, and the ratio (gmpo: log-ratio) that stands there."""
    if loss.kind == "gmpo":
        value, floor, ceiling = log_ratio, -loss.epsilon_low, loss.epsilon_high
    else:
        value, floor, ceiling = log_ratio.exp(), 1 - loss.epsilon_low, 1 + loss.epsilon_high
    low, high = value < floor, value > ceiling
    if loss.kind != "cispo":
        low, high = low & (advantages < 0), high & (advantages > 0)
    bound = torch.where(low, floor, torch.full_like(value, ceiling))
    if loss.dual_clip is not None:
        far = (advantages < 0) & (value > loss.dual_clip)
        bound, high = torch.where(far, loss.dual_clip, bound), high | far
    return low, high, bound


def token_gradients(
    log_ratio: Tensor,
    advantages: Tensor,
    loss: PolicyLoss,
    *,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """d(-sum of weight * surrogate) / d logp of each token, [N]; arguments as in `policy_loss`.

    clip: -w r A, cispo: -w c(r) A, gspo and gmpo: -(sum_sequence w) ratio A / L; 0 where a bound
    cuts. Zero weights may stand for `keep` and weighted advantages for weights in clip and cispo.
    """
    keep = torch.ones_like(log_ratio, dtype=torch.bool) if keep is None else keep
    log_ratio = torch.where(keep, log_ratio, 0.0)
    terms = surrogate_terms(log_ratio, advantages, loss, weights, keep, cu_seqlens)
    gradients = -terms.weights * (terms.ratio * terms.advantages)
    if loss.is_sequence_level:
        assert cu_seqlens is not None, loss.kind
        count = sequence_sums(keep.to(gradients.dtype), cu_seqlens).clamp(min=1)
        gradients = to_tokens(gradients / count, cu_seqlens, len(keep))
    cut = terms.low | terms.high
    return torch.where(keep if loss.kind == "cispo" else keep & ~cut, gradients, 0.0)


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [S], in the order of the tokens: no atomics, so equal inputs give equal bits."""
    # unsafe: lengths are not looked at, which would wait for a GPU.
    sums = torch.segment_reduce(
        values.double(), "sum", lengths=cu_seqlens.diff(), initial=0.0, unsafe=True
    )
    return sums.to(values.dtype)


def to_tokens(values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[S] -> [N]"""
    return values.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


def summarize(log_ratio: Tensor, keep: Tensor, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Statistics of `policy_loss`. Masked tokens have ratio 1 and are taken out again."""
    tokens = keep.sum().to(log_ratio.dtype)
    count = tokens.clamp(min=1)
    ratio = torch.where(keep, log_ratio.exp(), 0.0)
    # ess does not change when all ratios are scaled: by the largest, no square overflows.
    largest = torch.where(keep, log_ratio, -torch.inf).max() if len(keep) else tokens
    scaled = torch.where(keep, (log_ratio - largest).exp(), 0.0)
    kl = torch.where(keep, log_ratio.expm1() - log_ratio, 0.0)
    return {
        "tokens": tokens,
        "ratio_mean": ratio.sum() / count,
        "ratio_max": ratio.max() if ratio.numel() else tokens,
        "clip_fraction_low": low.sum() / count,
        "clip_fraction_high": high.sum() / count,
        "approx_kl": kl.sum() / count,
        "ess": torch.where(
            tokens > 0, scaled.sum().square() / (count * scaled.square().sum()), 0.0
        ),
    }


def check_inputs(
    loss: PolicyLoss,
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    normalizer: float | Tensor,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    require(isinstance(loss, PolicyLoss), "loss", "a PolicyLoss", type(loss).__name__)
    require_logps("logps", logps)
    tokens = tuple(logps.shape)
    for name, tensor in (("old_logps", old_logps), ("importance_weights", importance_weights)):
        if tensor is not None:
            require_tensor(name, tensor, "logps", logps)
            require_shape(name, tensor, tokens, "[N]")
    require_mask(mask, logps.shape[0], "logps", logps)
    require_tensor("advantages", advantages, "logps", logps)
    if cu_seqlens is None:
        expected = f"given with {loss.kind!r}, or tokens [B, T] with advantages [B]"
        require(not loss.is_sequence_level, "cu_seqlens", expected, None)
        require_shape("advantages", advantages, tokens, "[N]")
    else:
        require_sequences(cu_seqlens, logps.shape[0], "logps", logps)
        require_shape("advantages", advantages, (cu_seqlens.shape[0] - 1,), "[S]")
    require_normalizer(normalizer)


def require_logps(name: str, logps: Tensor) -> None:
    require_tensor(name, logps)
    require(logps.ndim == 1, name, "[N]", tuple(logps.shape))
    require_float(name, logps)
