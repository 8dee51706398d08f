"""Inputs of a case, the same for every implementation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shapes import Shape
from codistill_kernels import reference

LOGIT_STD = 2.0  # the softmax is neither flat nor one-hot
CLIPPED_EVERY = 64  # tokens: few enough to count as none
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Batch:
    """N tokens in S sequences of equal length; fields that an operation does not take are empty."""

    models: tuple[tuple[Tensor, Tensor], ...]
    """(hidden states [N, H], lm_head weight [V, H]) of one model or of the small and the large."""
    logits: Tensor
    """[N, V], only where the shape has no hidden size."""
    token_ids: Tensor
    mask: Tensor
    old_logps: Tensor
    """[N] near those of the first model: no ratio is near a clip bound, few are beyond one."""
    other_logps: Tensor
    """[N] of another model or engine."""
    rewards: Tensor
    """[S]"""
    upstream: Tensor
    """[N] gradient that arrives at log-probabilities."""
    cu_seqlens: Tensor
    normalizer: float
    vocab_size: int | None
    """Rows of the weights that are the vocabulary; None without a weight."""

    @property
    def hidden_states(self) -> Tensor:
        return self.models[0][0]

    @property
    def weight(self) -> Tensor:
        """Head of the first model, cut to the vocabulary: peers take no size of a vocabulary."""
        weight = self.models[0][1]
        return weight if self.vocab_size == len(weight) else weight[: self.vocab_size]

    @property
    def advantages(self) -> Tensor:
        """[S] of mixed sign, but not of mean 0: the loss would be all rounding."""
        return self.rewards - self.rewards.mean() / 2

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(len(self.mask) // len(self.rewards))

    @property
    def targets(self) -> Tensor:
        """[N] token ids, -100 where masked."""
        return torch.where(self.mask, self.token_ids, -100)

    @property
    def by_sequence(self) -> tuple[int, int]:
        return len(self.rewards), len(self.mask) // len(self.rewards)

    def leaves(self) -> Iterator[Tensor]:
        """What is differentiated: heads, or logits, or log-probabilities."""
        if self.models:
            for model in self.models:
                yield from model
        else:
            yield self.logits if self.logits.numel() else self.other_logps

    def to(self, dtype: torch.dtype) -> "Batch":
        """A copy with heads and logits in `dtype`, the rest in fp32 (fp64 with fp64)."""
        rest = torch.promote_types(dtype, torch.float32)

        def copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

        terms = (self.old_logps, self.other_logps, self.rewards, self.upstream)
        return Batch(
            tuple((copy(hidden, dtype), copy(weight, dtype)) for hidden, weight in self.models),
            copy(self.logits, dtype),
            self.token_ids,
            self.mask,
            *(copy(term, rest) for term in terms),
            self.cu_seqlens,
            self.normalizer,
            self.vocab_size,
        )


def make_batch(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Batch:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    tokens, sequences = shape.tokens, shape.sequences
    length = tokens // sequences
    assert length * sequences == tokens, shape
    models = []
    if shape.hidden:
        models.append(make_model(shape, shape.hidden, LOGIT_STD, randn))
    if shape.large_hidden and shape.logit_gap is None:
        models.append(make_model(shape, shape.large_hidden, LOGIT_STD, randn))
    elif shape.large_hidden:  # the first model, and more of little weight
        more = make_model(shape, shape.large_hidden - shape.hidden, shape.logit_gap, randn)
        models.append(tuple(torch.cat(parts, dim=1) for parts in zip(models[0], more, strict=True)))
    models = [tuple(tensor.to(dtype) for tensor in model) for model in models]
    has_logits = shape.vocab > 0 and not models
    logits = (LOGIT_STD * randn(tokens, shape.vocab) if has_logits else randn(0)).to(dtype)
    token_ids = torch.randint(
        max(shape.vocab, 1), (tokens,), generator=generator, device=device, dtype=torch.int64
    )
    position = torch.arange(tokens, device=device)
    # Ratios of 0.9, 1 and 1.1; beyond the clip bounds of 0.8 and 1.2 those of a few tokens.
    shift = 0.1 * (position % 3 - 1)
    shift = torch.where(position % CLIPPED_EVERY == 7, 0.4, shift)
    logps = policy_logps(models[0], token_ids, shape.vocab) if models else -randn(tokens).abs()
    other = (logps + 0.1 * randn(tokens)) if models else logps + shift
    kept = length - round(shape.inactive * length)
    batch = Batch(
        tuple(models),
        logits,
        token_ids,
        position % length < kept,
        logps - shift if models else logps,
        other,
        (randn(sequences) > 0).float() + 0.1 * randn(sequences),
        randn(tokens),
        torch.arange(0, tokens + 1, length, device=device),
        float(tokens),
        shape.vocab if models else None,
    )
    for leaf in batch.leaves():
        leaf.requires_grad_()
    return batch


def make_model(shape: Shape, hidden: int, std: float, randn) -> tuple[Tensor, Tensor]:
    weight = randn(shape.weight_rows, hidden).mul_(std / math.sqrt(hidden))
    return randn(shape.tokens, hidden), weight


@torch.no_grad()
def policy_logps(model: tuple[Tensor, Tensor], token_ids: Tensor, vocab: int) -> Tensor:
    """[N] in fp32, by the definition and a few rows at a time."""
    hidden_states, weight = model
    weight = weight[:vocab].float()
    parts = zip(hidden_states.split(ROWS_AT_ONCE), token_ids.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([reference.linear_logps(x.float(), weight, ids) for x, ids in parts])
