"""The surrogates of policy optimization: each kind is one function and one line of `SURROGATES`.

A function gives the value and, beside it, the closed form of its slope. `policy_loss` sums and
differentiates the value; the fused losses multiply the gradient of log-probabilities by the slope.
A test holds each slope to the derivative of the value, and both to reference.policy_loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from codistill_kernels._sequences import sequence_sums, to_tokens

if TYPE_CHECKING:
    from codistill_kernels.policy_loss import PolicyLoss


@dataclass(frozen=True)
class Tokens:
    """What a surrogate may depend on; all values of a masked token are 0.

    The level of a kind is [N] where its value is one per token, [S] where it is one per sequence.
    """

    log_ratio: Tensor
    """[N] log of the importance ratio, nats, within log_ratio_clamp; differentiable"""
    logps: Tensor
    """[N], differentiable"""
    old_logps: Tensor
    """[N]"""
    keep: Tensor
    """[N] bool"""
    advantages: Tensor
    """of the level"""
    weights: Tensor
    """of the level: importance weights, or their sums over a sequence"""
    cu_seqlens: Tensor | None

    @property
    def is_needed(self) -> Tensor:
        """Bool of the level: the values that count. The others may be any finite number."""
        return (self.advantages != 0) & (self.weights != 0)

    def counts(self) -> Tensor:
        """[S] number of unmasked tokens, at least 1."""
        return self.sums(self.keep.to(self.logps.dtype)).clamp(min=1)

    def sums(self, values: Tensor) -> Tensor:
        """[N] -> [S] sums over the tokens of each sequence"""
        assert self.cu_seqlens is not None
        return sequence_sums(values, self.cu_seqlens)

    def spread(self, values: Tensor) -> Tensor:
        """[S] -> [N], to the tokens of each sequence"""
        assert self.cu_seqlens is not None
        return to_tokens(values, self.cu_seqlens, len(self.keep))


class Surrogate(NamedTuple):
    """Value and slope of a kind, before they are multiplied by advantage and weight."""

    value: Tensor  # of the level, differentiable
    slope: Tensor  # [N] d value / d logp, 0 where a bound cuts
    low: Tensor  # [N] bool: cut by the low bound
    high: Tensor


# --- kinds that follow the ratio ---------------------------------------------------------------


def clip(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """min(r A, c(r) A) / A"""
    return clipped(tokens.log_ratio, tokens, loss)


def gspo(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """min(s A, c(s) A) / A with s = exp(1/L sum log r)"""
    counts = tokens.counts()
    value, slope, low, high = clipped(tokens.sums(tokens.log_ratio) / counts, tokens, loss)
    return Surrogate(value, *(tokens.spread(part) for part in (slope / counts, low, high)))


def clipped(log_ratio: Tensor, tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """min(r A, c(r) A) / A and its slope, both of the level."""
    ratio = log_ratio.detach().exp()
    low, high, bound = cuts(ratio, 1 - loss.epsilon_low, 1 + loss.epsilon_high, tokens.advantages)
    if loss.dual_clip is not None:
        far = (tokens.advantages < 0) & (ratio > loss.dual_clip)
        bound, high = torch.where(far, loss.dual_clip, bound), high | far
    # Chosen by comparison: torch.minimum would split the gradient of a tie. Chosen before exp: a
    # ratio that overflows where nothing depends on it would make the gradient 0 * inf.
    free = ~(low | high)
    ratio = torch.where(free & tokens.is_needed, log_ratio, 0.0).exp()
    return Surrogate(
        torch.where(free, ratio, bound), torch.where(free, ratio.detach(), 0.0), low, high
    )


def gmpo(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """exp(1/L sum b(log r))"""
    advantages = tokens.spread(tokens.advantages)
    log_ratio = tokens.log_ratio
    low, high, bound = cuts(log_ratio.detach(), -loss.epsilon_low, loss.epsilon_high, advantages)
    counts = tokens.counts()
    mean = tokens.sums(torch.where(low | high, bound, log_ratio)) / counts
    ratio = torch.where(tokens.is_needed, mean, 0.0).exp()
    slope = tokens.spread(ratio.detach() / counts)
    return Surrogate(ratio, torch.where(low | high, 0.0, slope), low, high)


def sapo(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """4/t sigmoid(t (r - 1))"""
    temperature = torch.where(
        tokens.advantages > 0,
        loss.sapo_temperature_positive,
        torch.full_like(tokens.log_ratio, loss.sapo_temperature_negative),
    )
    # Chosen before exp, as in `clipped`. Far below a ratio of e^80 the gate is flat already; larger
    # ratios overflow.
    ratio = torch.where(tokens.is_needed, tokens.log_ratio, 0.0).clamp(max=80).exp()
    gate = temperature * (ratio - 1)
    slope = 4 * gate.sigmoid() * (-gate).sigmoid() * ratio
    never = torch.zeros_like(tokens.keep)
    return Surrogate(4 / temperature * gate.sigmoid(), slope.detach(), never, never)


def cuts(
    ratio: Tensor, floor: float, ceiling: float, advantages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the low bound cuts (A < 0), where the high one cuts (A > 0), and that bound."""
    low, high = (ratio < floor) & (advantages < 0), (ratio > ceiling) & (advantages > 0)
    return low, high, torch.where(low, floor, torch.full_like(ratio, ceiling))


# --- kinds that weigh log-probabilities --------------------------------------------------------


def cispo(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """sg(c(r)) logp"""
    floor, ceiling = 1 - loss.epsilon_low, 1 + loss.epsilon_high
    ratio = tokens.log_ratio.detach().exp()
    return weighted(ratio.clamp(floor, ceiling), tokens, ratio < floor, ratio > ceiling)


def vespo(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """sg(phi(W)) logp with phi(W) = W^k exp(lambda (1 - W)), W = prod r w over the sequence"""
    smallest, largest = math.log(1e-8), 20.0  # bounds of log W and its parts in the authors' code
    log_weights = tokens.weights.log().clamp(smallest, largest)
    log_terms = tokens.log_ratio.detach().clamp(-largest, largest) + log_weights
    log_product = tokens.sums(torch.where(tokens.keep, log_terms, 0.0)).clamp(smallest, largest)
    log_product = tokens.spread(log_product)
    is_positive = tokens.advantages >= 0
    power, decay = (
        torch.where(is_positive, positive, torch.full_like(log_product, negative))
        for positive, negative in (
            (loss.vespo_k_positive, loss.vespo_k_negative),
            (loss.vespo_lambda_positive, loss.vespo_lambda_negative),
        )
    )
    phi = (power * log_product - decay * log_product.expm1()).exp()
    never = torch.zeros_like(tokens.keep)
    return weighted(phi, tokens, never, never)


def reinforce(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """logp"""
    never = torch.zeros_like(tokens.keep)
    return weighted(torch.ones_like(tokens.log_ratio), tokens, never, never)


def dppo_tv(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """sg(r) logp unless the token's probability p has moved too far: |p - p_old|"""
    moved = tokens.logps.detach().exp() - tokens.old_logps.exp()
    low, high, _ = cuts(moved, -loss.epsilon_low, loss.epsilon_high, tokens.advantages)
    return within_trust(low, high, tokens, loss)


def dppo_kl(tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    """sg(r) logp unless KL(p_old || p) of this token against all others is too far"""
    logps, old = tokens.logps.detach(), tokens.old_logps
    others = -old.expm1()  # 1 - p_old
    log_odds = torch.where(others > 0, (others / -logps.expm1()).log(), 0.0)
    kl = old.exp() * (old - logps) + others * log_odds
    signed = torch.where(logps < old, -kl, kl)
    low, high, _ = cuts(signed, -loss.epsilon_low, loss.epsilon_high, tokens.advantages)
    return within_trust(low, high, tokens, loss)


def within_trust(low: Tensor, high: Tensor, tokens: Tokens, loss: "PolicyLoss") -> Surrogate:
    ratio = torch.where(low | high, -torch.inf, tokens.log_ratio.detach()).exp()
    weight = ratio if loss.truncate is None else ratio.clamp(max=loss.truncate)
    return weighted(weight, tokens, low, high)


def weighted(weight: Tensor, tokens: Tokens, low: Tensor, high: Tensor) -> Surrogate:
    """weight logp, for a weight [N] without a gradient; weight 0 gives 0, whatever logp is."""
    weight = torch.where(tokens.is_needed, weight, 0.0)
    logps = torch.where(weight != 0, tokens.logps, 0.0)
    return Surrogate(weight * logps, weight, low, high)


# --- the table ---------------------------------------------------------------------------------


class Range(NamedTuple):
    """Which values of a setting are allowed, and how a message says so."""

    holds: Callable[[float], bool]
    text: str


POSITIVE = Range(lambda x: x > 0, "> 0")
NOT_NEGATIVE = Range(lambda x: x >= 0, ">= 0")
BELOW_ONE = Range(lambda x: 0 <= x < 1, "in [0, 1)")
UP_TO_ONE = Range(lambda x: 0 <= x <= 1, "in [0, 1]")
ABOVE_ONE = Range(lambda x: x > 1, "> 1")
ANY = Range(math.isfinite, "finite")


class Kind(NamedTuple):
    """One line of the table `SURROGATES`."""

    surrogate: Callable[[Tokens, "PolicyLoss"], Surrogate]
    settings: dict[str, Range]
    """Fields of PolicyLoss that it uses, and their ranges; None is always allowed."""
    needs_sequences: bool = False
    """A token's slope depends on the other tokens of its sequence."""
    is_of_sequence: bool = False
    """The value, and with it the advantage and the weight, is one per sequence."""
    follows_ratio: bool = True
    """The gradient flows through the ratio, so beyond log_ratio_clamp there is none."""
    has_own_weights: bool = False
    """The value contains the importance weights."""


CLIP = {"epsilon_low": BELOW_ONE, "epsilon_high": NOT_NEGATIVE, "dual_clip": ABOVE_ONE}
GMPO = {"epsilon_low": NOT_NEGATIVE, "epsilon_high": NOT_NEGATIVE}
CISPO = {"epsilon_low": UP_TO_ONE, "epsilon_high": ANY}
DPPO = {**GMPO, "truncate": POSITIVE}
SAPO = dict.fromkeys(("sapo_temperature_positive", "sapo_temperature_negative"), POSITIVE)
VESPO = {
    "vespo_k_positive": NOT_NEGATIVE,
    "vespo_lambda_positive": NOT_NEGATIVE,
    "vespo_k_negative": NOT_NEGATIVE,
    "vespo_lambda_negative": NOT_NEGATIVE,
}

SURROGATES = {
    "clip": Kind(clip, CLIP),
    "cispo": Kind(cispo, CISPO, follows_ratio=False),
    "gspo": Kind(gspo, CLIP, needs_sequences=True, is_of_sequence=True),
    "luspo": Kind(gspo, CLIP, needs_sequences=True, is_of_sequence=True),
    "gmpo": Kind(gmpo, GMPO, needs_sequences=True, is_of_sequence=True),
    "sapo": Kind(sapo, SAPO),
    "vespo": Kind(vespo, VESPO, needs_sequences=True, follows_ratio=False, has_own_weights=True),
    "reinforce": Kind(reinforce, {}, follows_ratio=False),
    "dppo_tv": Kind(dppo_tv, DPPO, follows_ratio=False),
    "dppo_kl": Kind(dppo_kl, DPPO, follows_ratio=False),
}
