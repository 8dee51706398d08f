"""The importance-ratio losses of policy optimization, from log-probabilities.

Ratio, bound and gradient of each kind stand in `_surrogates`, one function per kind.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from codistill_kernels._checks import (
    require,
    require_logps,
    require_mask,
    require_normalizer,
    require_sequences,
    require_shape,
    require_tensor,
)
from codistill_kernels._scaling import divisor
from codistill_kernels._sequences import sequence_sums, to_tokens
from codistill_kernels._surrogates import SURROGATES, Surrogate, Tokens
from codistill_kernels._tokens import TokenShape


@dataclass(frozen=True)
class PolicyLoss:
    """Which surrogate, and its settings. r is the ratio of a token, p its probability, A its
    advantage, L the unmasked tokens of a sequence, sg() stops the gradient and c() clips to
    [1 - epsilon_low, 1 + epsilon_high].

    kind: what is summed over unmasked tokens.
        "clip": min(r A, c(r) A), the token-level surrogate of Eq. 2, 5 and 10. With epsilon_high >
            epsilon_low it is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476).
        "cispo": sg(c(r)) A logp (MiniMax-M1, arXiv:2506.13585). Bounds the weight of a token,
            whatever the sign of A, and never cuts its gradient. epsilon_low = 1: no lower bound.
            Where others name the bound itself (TRL's epsilon_high), epsilon_high is that less 1.
        "gspo": min(s A, c(s) A) with s = exp(1/L sum_sequence log r) (Zheng et al. 2025,
            arXiv:2507.18071). The gradient flows through the mean to every token.
        "luspo": the same surrogate; LUSPO (arXiv:2602.05261) is its sum over tokens divided by the
            number of rollouts, so that long ones count more, GSPO takes advantages A / L.
        "gmpo": exp(1/L sum_sequence b(log r)) A (Zhao et al. 2025, arXiv:2507.20673), where b
            bounds nats: at most epsilon_high where A > 0, at least -epsilon_low where A < 0.
        "sapo": 4/t sigmoid(t (r - 1)) A, a soft gate in the place of a bound, with
            t = sapo_temperature_positive where A > 0, else _negative (arXiv:2511.20347).
        "vespo": sg(W^k exp(lambda (1 - W))) A logp with W = prod_sequence r w, w the importance
            weights, which count nowhere else; k and lambda by the sign of A, 0 counts as positive.
            log W and log w are kept within [log 1e-8, 20], log r within [-20, 20] (Shen et al.
            2026, arXiv:2602.10693).
        "reinforce": A logp; old_logps serve statistics only. (GVPO, arXiv:2504.19599, is this with
            advantages that mix the ratios of a group, so no surrogate of a token or a sequence.)
        "dppo_tv", "dppo_kl": sg(r) A logp, 0 where the token's own distribution, itself against all
            other tokens, moved farther than epsilon_high up where A > 0, or epsilon_low down where
            A < 0: by |p - p_old|, or by KL(p_old || p) in nats (arXiv:2602.04879).
    epsilon_low, epsilon_high: the ratio (gspo: s, gmpo: log r) stops pushing below the low bound
        where A < 0 and above the high bound where A > 0. A ratio exactly on a bound is not cut.
    dual_clip: > 1, "clip", "gspo" and "luspo"; with a negative advantage the surrogate is at least
        dual_clip * advantage (Ye et al. 2020, arXiv:1912.09729). Two-sided clipping with a delta
        above 1 + epsilon_high (INTELLECT-2, arXiv:2505.07291) is the same. None: no such bound.
    truncate: > 0, "dppo_tv" and "dppo_kl"; largest ratio, None: any.
    log_ratio_clamp: > 0, nats; log r of each token is brought into [-log_ratio_clamp,
        log_ratio_clamp] before all else, against an overflow, and a token outside has no gradient
        (kinds that weigh logp: only the weight is bounded). On the bound it is not cut. None: log r
        as it is.
    entropy_bonus: times the entropy of each unmasked token, added to what is summed; any kind.

    Raises:
        ValueError: a field is out of range, or set and not used by the kind.
    """

    kind: str = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    log_ratio_clamp: float | None = None
    entropy_bonus: float = 0.0
    truncate: float | None = None
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05
    vespo_k_positive: float = 2.0
    vespo_lambda_positive: float = 3.0
    vespo_k_negative: float = 3.0
    vespo_lambda_negative: float = 2.0

    def __post_init__(self) -> None:
        kinds = ", ".join(SURROGATES)
        require(self.kind in SURROGATES, "kind", f"one of {kinds}", repr(self.kind))
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name in ("log_ratio_clamp", "entropy_bonus"):
                continue
            used = SURROGATES[self.kind].settings.get(field.name)
            if used is None:
                expected = f"{field.default} with kind {self.kind!r}, which does not use it"
                require(value == field.default, field.name, expected, value)
            else:
                require(value is None or used.holds(value), field.name, used.text, value)
        ordered = self.epsilon_high >= -self.epsilon_low
        require(ordered, "epsilon_high", ">= -epsilon_low", self.epsilon_high)
        valid = self.log_ratio_clamp is None or self.log_ratio_clamp > 0
        require(valid, "log_ratio_clamp", "> 0", self.log_ratio_clamp)
        require(math.isfinite(self.entropy_bonus), "entropy_bonus", "finite", self.entropy_bonus)

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's gradient depends on the other tokens of its sequence."""
        return SURROGATES[self.kind].needs_sequences

    def settings(self) -> list[float]:
        """The fields besides kind, as an argument of a custom op: NaN stands for None."""
        values = [getattr(self, field.name) for field in fields(self)[1:]]
        return [math.nan if value is None else float(value) for value in values]

    @classmethod
    def from_settings(cls, kind: str, settings: list[float]) -> "PolicyLoss":
        """The loss whose `settings` these are."""
        names = [field.name for field in fields(cls)[1:]]
        values = [None if math.isnan(value) else value for value in settings]
        return cls(kind, **dict(zip(names, values, strict=True)))  # type: ignore[arg-type]


def prepare_tokens(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    loss: PolicyLoss,
    weights: Tensor | None,
    keep: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tokens]:
    """Log-ratios [N] before the clamp, and what the surrogate is made of; all 0 where masked."""
    kind, dtype = SURROGATES[loss.kind], logps.dtype
    # Select before exp: NaN behind the mask must reach neither the loss nor its gradient.
    logps = torch.where(keep, logps, 0.0)
    old_logps = logps if old_logps is None else torch.where(keep, old_logps.to(dtype), 0.0)
    old_logps = old_logps.detach()
    log_ratio = logps - old_logps
    advantages = advantages.detach().to(dtype)
    weights = torch.ones_like(logps) if weights is None else weights.detach().to(dtype)
    weights = torch.where(keep, weights, 0.0)
    if kind.is_of_sequence:
        assert cu_seqlens is not None, loss.kind
        counted = sequence_sums(keep.to(dtype), cu_seqlens) > 0
        weights = sequence_sums(weights, cu_seqlens)
    else:
        counted = keep
        if cu_seqlens is not None:
            advantages = to_tokens(advantages, cu_seqlens, len(keep))
    advantages = torch.where(counted, advantages, 0.0)
    # Both 0 where one is, lest an infinite other one make it NaN. NaN itself is never hidden.
    none = (advantages == 0) & ~weights.isnan() | (weights == 0) & ~advantages.isnan()
    advantages, weights = (torch.where(none, 0.0, factor) for factor in (advantages, weights))
    clamp = loss.log_ratio_clamp
    clamped = log_ratio if clamp is None else log_ratio.clamp(-clamp, clamp)
    return log_ratio, Tokens(clamped, logps, old_logps, keep, advantages, weights, cu_seqlens)


def surrogate_of(tokens: Tokens, log_ratio: Tensor, loss: PolicyLoss) -> Surrogate:
    """The surrogate of the loss; masked tokens and those beyond log_ratio_clamp have slope 0."""
    kind = SURROGATES[loss.kind]
    value, slope, low, high = kind.surrogate(tokens, loss)
    if loss.log_ratio_clamp is not None and kind.follows_ratio:
        below, above = log_ratio < -loss.log_ratio_clamp, log_ratio > loss.log_ratio_clamp
        low, high = low | below, high | above
        slope = torch.where(below | above, 0.0, slope)
    keep = tokens.keep
    return Surrogate(value, torch.where(keep, slope, 0.0), keep & low, keep & high)


def factors(tokens: Tokens, loss: PolicyLoss) -> Tensor:
    """What the surrogate's value is multiplied by: weight times advantage."""
    if SURROGATES[loss.kind].has_own_weights:
        return torch.where(tokens.weights.isnan(), torch.nan, tokens.advantages)
    return tokens.weights * tokens.advantages


def token_gradients(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    loss: PolicyLoss,
    *,
    weights: Tensor | None = None,
    keep: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """d(-sum of weight * surrogate) / d logp of each token, [N], from the closed slopes; arguments
    as in `policy_loss`. The entropy bonus is not in it: its slope by the entropy is constant."""
    log_ratio, tokens = prepare_tokens(
        logps, old_logps, advantages, loss, weights, keep, cu_seqlens
    )
    slope = surrogate_of(tokens, log_ratio, loss).slope
    factor = factors(tokens, loss)
    if SURROGATES[loss.kind].is_of_sequence:
        factor = tokens.spread(factor)
    # A slope of 0 is 0 whatever stands before it; only NaN shows.
    none = ~keep | (slope == 0) & ~factor.isnan()
    return torch.where(none, 0.0, -factor * slope)


def summarize(log_ratio: Tensor, keep: Tensor, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Statistics of `policy_loss`; masked tokens, whose log_ratio is 0, are left out."""
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
        "ratio_square_mean": ratio.square().sum() / count,
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
    """Check the arguments of `policy_loss`, but for the entropy."""
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
        require(not loss.needs_sequences, "cu_seqlens", expected, None)
        require_shape("advantages", advantages, tokens, "[N]")
    else:
        require_sequences(cu_seqlens, logps.shape[0], "logps", logps)
        require_shape("advantages", advantages, (cu_seqlens.shape[0] - 1,), "[S]")
    require_normalizer(normalizer)


# --- public function ---------------------------------------------------------------------------


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    loss: PolicyLoss = PolicyLoss(),  # noqa: B008  (frozen)
    normalizer: float | Tensor,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Surrogate over tokens: a sum, divided once.

    r[n] = exp(logps[n] - old_logps[n])
    loss = -(1/normalizer) sum_n (w[n] surrogate[n] + entropy_bonus entropy[n]) over unmasked tokens
    with the surrogate as in PolicyLoss. A ratio on a bound is not clipped. Advantage or weight 0
    adds exactly 0, whatever the ratio, and whether or not the other of the two is infinite.

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
        entropy: [N] of the policy in training, nats, as `linear_logps` returns it. Differentiable.
            Needed by an entropy bonus.
        cu_seqlens: [S + 1]; tokens of sequence s are cu_seqlens[s] : cu_seqlens[s + 1]. Needed by
            gspo, luspo, gmpo and vespo, where every sequence must be whole, unless tokens are
            [B, T].

    Returns:
        loss, a scalar (fp32; fp64 for fp64 logps), and statistics over unmasked tokens, on the
        device of logps: `tokens`, `ratio_mean`, `ratio_square_mean`, `ratio_max`,
        `clip_fraction_low` and `_high` (share of tokens whose gradient a bound cuts; cispo: whose
        ratio is bounded; gspo, luspo: all tokens of a clipped sequence), `approx_kl` (mean of
        r - 1 - log r, nats), `ess` (effective sample size, (sum r)^2 / (tokens sum r^2), in
        (0, 1]), detached `logps` and, where given, `entropy`. Without a token all are 0. r is that
        before log_ratio_clamp; a token beyond it counts as cut, except in kinds that weigh logp.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value. The message names
            it. Values of tensors are looked at on the CPU outside torch.compile only.

    Source: Eq. 2, Eq. 5, Eq. 10. Definition: codistill_kernels.reference.policy_loss.
    """
    shape = TokenShape.of("logps", logps)
    logps, old_logps, mask, importance_weights, entropy = shape.flat(
        logps=logps,
        old_logps=old_logps,
        mask=mask,
        importance_weights=importance_weights,
        entropy=entropy,
    )
    advantages, cu_seqlens = shape.sequences("advantages", advantages, cu_seqlens)
    check_inputs(
        loss, logps, old_logps, advantages, mask, normalizer, importance_weights, cu_seqlens
    )
    if loss.entropy_bonus:
        require(entropy is not None, "entropy", "given with an entropy bonus", None)
    if entropy is not None:
        require_tensor("entropy", entropy, "logps", logps)
        require_shape("entropy", entropy, tuple(logps.shape), "[N]")
    logps = logps if logps.dtype == torch.float64 else logps.float()
    keep = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    log_ratio, tokens = prepare_tokens(
        logps, old_logps, advantages, loss, importance_weights, keep, cu_seqlens
    )
    surrogate = surrogate_of(tokens, log_ratio, loss)
    total = -(factors(tokens, loss) * surrogate.value).sum()
    statistics = summarize(log_ratio.detach(), keep, surrogate.low, surrogate.high)
    statistics["logps"] = logps.detach()
    if entropy is not None:
        entropy = entropy.to(logps.dtype)
        statistics["entropy"] = entropy.detach()
        if loss.entropy_bonus:
            # Select before summing: NaN behind the mask must reach neither loss nor gradient.
            total = total - loss.entropy_bonus * torch.where(keep, entropy, 0.0).sum()
    return shape.restored(total / divisor(total, normalizer), statistics)
