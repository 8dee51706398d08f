"""The inputs of a case. All implementations get the same."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.shapes import Shape
from codistill_kernels import reference

LOGIT_STD = 2.0  # gives a softmax that is neither flat nor one-hot
CLIPPED_EVERY = 64  # one token in so many is clipped: few enough to change no time
ROWS_AT_ONCE = 256  # tokens whose logits are in memory together


@dataclass(frozen=True)
class Batch:
    """N tokens in S sequences of equal length. Tensors that no operation on the shape takes are
    empty."""

    models: tuple[tuple[Tensor, Tensor], ...]
    """(hidden states [N, H], lm_head weight [V, H]) of one model, or of two: the small and the
    large one, or the student and the teacher."""
    logits: Tensor
    """[N, V], only if the shape has no hidden size."""
    token_ids: Tensor
    mask: Tensor
    old_logps: Tensor
    """[N], close to those of the first model; see `make_batch`."""
    other_logps: Tensor
    """[N], those of another model or engine."""
    rewards: Tensor
    """[S]"""
    upstream: Tensor
    """[N], the gradient that arrives at log-probabilities."""
    cu_seqlens: Tensor
    normalizer: float
    vocab_size: int | None
    """Rows of the weights that are the vocabulary; None without a weight."""
    has_teacher: bool
    """Whether the second model is not differentiated."""

    @property
    def hidden_states(self) -> Tensor:
        return self.models[0][0]

    @property
    def weight(self) -> Tensor:
        """Weight of the first model, cut to the vocabulary: peers cannot be told its size."""
        weight = self.models[0][1]
        return weight if self.vocab_size == len(weight) else weight[: self.vocab_size]

    @property
    def advantages(self) -> Tensor:
        """[S], of both signs. Their mean is not 0: a loss near 0 would be all rounding."""
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
        """(number of sequences, tokens per sequence): the shape of padded tensors."""
        return len(self.rewards), len(self.mask) // len(self.rewards)

    def leaves(self) -> list[Tensor]:
        """The tensors that are differentiated: heads, or logits, or log-probabilities."""
        if not self.models:
            return [self.logits if self.logits.numel() else self.other_logps]
        models = self.models[:1] if self.has_teacher else self.models
        return [tensor for model in models for tensor in model]

    def to(self, dtype: torch.dtype) -> "Batch":
        """A copy with heads and logits in `dtype`, the rest in fp32 (fp64 with fp64)."""
        rest = torch.promote_types(dtype, torch.float32)

        def copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

        return replace(
            self,
            models=tuple((copy(x, dtype), copy(weight, dtype)) for x, weight in self.models),
            logits=copy(self.logits, dtype),
            old_logps=copy(self.old_logps, rest),
            other_logps=copy(self.other_logps, rest),
            rewards=copy(self.rewards, rest),
            upstream=copy(self.upstream, rest),
        )


def make_batch(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Batch:
    """Random inputs of this shape: heads and logits in `dtype`, the rest in fp32.

    Ratios of the policy to the old log-probabilities are 0.9, 1 and 1.1, so that rounding moves
    none across a clip bound (0.8 and 1.2); every `CLIPPED_EVERY`-th is far beyond one. Where there
    is a head, the old log-probabilities are computed from it; else all of them are random.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    tokens, sequences = shape.tokens, shape.sequences
    length = tokens // sequences
    assert length * sequences == tokens, shape
    models = tuple(
        (hidden.to(dtype), weight.to(dtype)) for hidden, weight in random_models(shape, randn)
    )
    has_logits = shape.vocab > 0 and not models
    logits = (LOGIT_STD * randn(tokens, shape.vocab) if has_logits else randn(0)).to(dtype)
    token_ids = torch.randint(
        max(shape.vocab, 1), (tokens,), generator=generator, device=device, dtype=torch.int64
    )
    position = torch.arange(tokens, device=device)
    shift = 0.1 * (position % 3 - 1)
    shift = torch.where(position % CLIPPED_EVERY == 7, 0.4, shift)
    if models:
        logps = policy_logps(models[0], token_ids, shape.vocab)
        old_logps, other_logps = logps - shift, logps + 0.1 * randn(tokens)
    else:
        old_logps = -randn(tokens).abs()
        other_logps = old_logps + shift
    batch = Batch(
        models=models,
        logits=logits,
        token_ids=token_ids,
        mask=position % length < length - round(shape.inactive * length),
        old_logps=old_logps,
        other_logps=other_logps,
        rewards=(randn(sequences) > 0).float() + 0.1 * randn(sequences),
        upstream=randn(tokens),
        cu_seqlens=torch.arange(0, tokens + 1, length, device=device),
        normalizer=float(tokens),
        vocab_size=shape.vocab if models else None,
        has_teacher=shape.has_teacher,
    )
    for leaf in batch.leaves():
        leaf.requires_grad_()
    return batch


def random_models(shape: Shape, randn: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Hidden states [N, H] and weight [V, H] of each model, in fp32."""
    if not shape.hidden:
        return []
    first = make_model(shape, shape.hidden, LOGIT_STD, randn)
    if not shape.large_hidden:
        return [first]
    if shape.logit_gap is None:
        return [first, make_model(shape, shape.large_hidden, LOGIT_STD, randn)]
    # The second model is the first with more hidden units, which move its logits by `logit_gap`.
    more = make_model(shape, shape.large_hidden - shape.hidden, shape.logit_gap, randn)
    hidden_states, weight = (torch.cat(parts, dim=1) for parts in zip(first, more, strict=True))
    return [first, (hidden_states, weight)]


def make_model(
    shape: Shape, hidden: int, std: float, randn: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] and weight [V, H] whose logits have this standard deviation."""
    weight = randn(shape.weight_rows, hidden).mul_(std / math.sqrt(hidden))
    return randn(shape.tokens, hidden), weight


@torch.no_grad()
def policy_logps(model: tuple[Tensor, Tensor], token_ids: Tensor, vocab: int) -> Tensor:
    """[N] log-probabilities in fp32, by the definition and `ROWS_AT_ONCE` tokens at a time."""
    hidden_states, weight = model
    weight = weight[:vocab].float()
    parts = zip(hidden_states.split(ROWS_AT_ONCE), token_ids.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([reference.linear_logps(x.float(), weight, ids) for x, ids in parts])
