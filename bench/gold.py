"""Tokens and heads of real sizes, and the results of the operations on them by definition.

The definitions take a few tokens at a time: all logits in fp64 would not fit into memory.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from bench import eager
from bench.tolerance import MatrixUnit
from codistill_kernels import reference
from codistill_kernels._linear import planning, slab_sizes
from codistill_kernels._linear.chunks import Plan
from codistill_kernels._linear.slab_sizes import pieces

LOGIT_STD = 2.0
TOKENS_AT_ONCE = 128  # 150 MiB of fp64 logits, and a few copies of them
POISON_BYTES = {"cuda": 2**32, "cpu": 2**20}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tokens and of both models' heads."""

    tokens: int
    hidden: int
    head_rows: int
    vocab: int
    """Number of rows of both heads that are the vocabulary."""
    large_hidden: int
    large_head_rows: int


REAL = Sizes(1024, 1536, 151936, 151665, 3584, 152064)  # Qwen2.5-Math 1.5B and 7B


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype the operations run."""

    dtype: torch.dtype
    device: torch.device
    backend: str

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which the backend can compute a loss and its gradients."""
        kept = {"triton": ("kept", SHARED), "cpu": ("kept",)}.get(self.backend, ())
        return (*kept, "chunks", "columns")


SHARED = "kept, shared memory"


@contextlib.contextmanager
def forced(way: str, setting: Setting, tokens: int) -> Iterator[None]:
    """The code goes this way, whatever the workspace; in chunks, it makes three."""
    tensor = torch.empty(0, dtype=setting.dtype, device=setting.device)
    kind = planning.chunks_for(tensor, 1, setting.backend)
    plan = Plan("kept" if way == SHARED else way, -(-tokens // 3))
    shares = lambda *_: way == SHARED  # noqa: E731
    with (
        mock.patch.object(kind, "plan", lambda *_: plan),
        mock.patch.object(slab_sizes, "shares_memory", shares),
    ):
        yield


class Inputs:
    """Random tokens and heads of a policy and of a large model; a fifth of the tokens is masked."""

    def __init__(self, sizes: Sizes, setting: Setting) -> None:
        self.sizes, self.setting = sizes, setting
        tokens, vocab, device = sizes.tokens, sizes.vocab, setting.device
        self.generator = torch.Generator(device).manual_seed(0)
        self.x, self.weight = self.model(sizes.hidden, sizes.head_rows)
        self.large_x, self.large_weight = self.model(sizes.large_hidden, sizes.large_head_rows)
        self.token_ids = torch.randint(vocab, (tokens,), generator=self.generator, device=device)
        # Some rows have logits beyond 44, where a row's powers of two differ, and certain tokens.
        peaked = slice(0, min(16, tokens // 4))
        factors = torch.linspace(2, 8, peaked.stop, device=device)[:, None]
        self.x[peaked] *= factors.to(setting.dtype)
        logits = self.x[peaked].float() @ self.weight[:vocab].float().T
        self.token_ids[peaked][::2] = logits.argmax(dim=1)[::2]
        self.mask = torch.arange(tokens, device=device) % 5 != 4
        self.upstream = self.randn(tokens)
        self.entropy_upstream = self.randn(tokens)
        self.advantages = self.randn(tokens) + 0.3  # a loss near 0 would be all rounding
        self.normalizer = float(tokens)
        # No ratio is near a clip bound, and every 64th is far beyond one.
        shift = 0.1 * (torch.arange(tokens, device=device) % 3 - 1)
        shift[7::64] = 0.4
        self.old_logps = values_of(self) - shift

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.setting.device)

    def model(self, hidden: int, head_rows: int) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] and weight [head_rows, H]."""
        x = self.randn(self.sizes.tokens, hidden)
        weight = self.randn(head_rows, hidden).mul_(LOGIT_STD / math.sqrt(hidden))
        return x.to(self.setting.dtype), weight.to(self.setting.dtype)

    @property
    def targets(self) -> Tensor:
        """[N] token ids, -100 where masked."""
        return torch.where(self.mask, self.token_ids, -100)

    def behind_mask(self, value: float) -> Tensor:
        """Hidden states that hold this value where they are masked."""
        return torch.where(self.mask[:, None], self.x, value)


@torch.no_grad()
def values_of(inputs: Inputs) -> Tensor:
    """[N] log-probabilities in fp32, by definition."""
    weight = inputs.weight[: inputs.sizes.vocab].float()
    return torch.cat(
        [
            reference.linear_logps(inputs.x[rows].float(), weight, inputs.token_ids[rows])
            for rows in pieces(len(inputs.x), TOKENS_AT_ONCE)
        ]
    )


def poison(device: torch.device) -> None:
    """Fill memory with NaN and free it, so that results a kernel does not write are NaN."""
    torch.full((POISON_BYTES[device.type] // 4,), torch.nan, device=device)


# --- definitions -------------------------------------------------------------------------------

Upstream = Callable[[Inputs, slice, Tensor], tuple[Tensor, Tensor]]


def of_logps(inputs: Inputs, rows: slice, logps: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that arrive at log-probabilities and entropy: only at the former."""
    return inputs.upstream[rows].to(logps.dtype), torch.zeros_like(logps)


def of_both(inputs: Inputs, rows: slice, logps: Tensor) -> tuple[Tensor, Tensor]:
    """As `of_logps`, at both."""
    return tuple(g[rows].to(logps.dtype) for g in (inputs.upstream, inputs.entropy_upstream))


def of_loss(inputs: Inputs, rows: slice, logps: Tensor) -> tuple[Tensor, Tensor]:
    """As `of_logps`, from the policy loss."""
    leaf = logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(inputs, rows, leaf), leaf)
    return gradient, torch.zeros_like(logps)


@dataclass(frozen=True)
class Terms:
    """The fields of a batch that the eager loss reads."""

    mask: Tensor
    old_logps: Tensor
    normalizer: float


def loss_of(inputs: Inputs, rows: slice, logps: Tensor) -> Tensor:
    """The policy loss summed over these rows."""
    terms = Terms(inputs.mask[rows], inputs.old_logps[rows].to(logps.dtype), inputs.normalizer)
    return eager.clipped_loss(logps, inputs.advantages[rows].to(logps.dtype), terms)


def definition(inputs: Inputs, precision: torch.dtype, upstream: Upstream) -> dict[str, Tensor]:
    """logps, entropy, loss, dX and dW by definition, computed in `precision`."""
    weight = inputs.weight[: inputs.sizes.vocab].to(precision).requires_grad_()
    parts: dict[str, list[Tensor]] = {"logps": [], "entropy": [], "dX": []}
    dw = torch.zeros_like(weight)
    for rows in pieces(len(inputs.x), TOKENS_AT_ONCE):
        x = inputs.x[rows].to(precision).requires_grad_()
        outputs = reference.linear_logps(x, weight, inputs.targets[rows], return_entropy=True)
        arriving = upstream(inputs, rows, outputs[0].detach())
        dx, part = torch.autograd.grad(outputs, (x, weight), arriving)
        dw += part
        for name, value in zip(parts, (*outputs, dx), strict=True):
            parts[name].append(value.detach())
    found = {name: torch.cat(values) for name, values in parts.items()}
    everything = slice(0, len(inputs.x))
    return found | {"loss": loss_of(inputs, everything, found["logps"]), "dW": dw}


def reverse_kl(inputs: Inputs, precision: torch.dtype) -> dict[str, Tensor]:
    """KL [N] by definition, 0 where masked."""
    vocab = inputs.sizes.vocab
    weights = [t[:vocab].to(precision) for t in (inputs.weight, inputs.large_weight)]
    parts = []
    for rows in pieces(len(inputs.x), TOKENS_AT_ONCE):
        hidden = [t[rows].to(precision) for t in (inputs.x, inputs.large_x)]
        parts.append(reference.linear_reverse_kl(*zip(hidden, weights, strict=True)))
    return {"KL": torch.where(inputs.mask, torch.cat(parts), 0.0)}


def divergence(inputs: Inputs, precision: torch.dtype, kind: str) -> dict[str, Tensor]:
    """Divergence from the large model [N], and dX and dW of the sum, by definition."""
    vocab = inputs.sizes.vocab
    weight = inputs.weight[:vocab].to(precision).requires_grad_()
    large_weight = inputs.large_weight[:vocab].to(precision)
    values, dx = [], []
    dw = torch.zeros_like(weight)
    for rows in pieces(len(inputs.x), TOKENS_AT_ONCE):
        x = inputs.x[rows].to(precision).requires_grad_()
        teacher = inputs.large_x[rows].to(precision), large_weight
        part = reference.linear_divergence(
            (x, weight), teacher, inputs.mask[rows], kind=kind, reduction="none"
        )
        of_x, of_weight = torch.autograd.grad(part.sum(), (x, weight))
        values.append(part.detach())
        dx.append(of_x)
        dw += of_weight
    return {"values": torch.cat(values), "dX": torch.cat(dx), "dW": dw}


def standards(inputs: Inputs, of: Callable[[torch.dtype], dict[str, Tensor]]) -> tuple[dict, dict]:
    """Results in fp64, and those of eager PyTorch that ours are judged by."""
    with MatrixUnit(inputs.setting.dtype):
        judge = of(torch.float32)
    return of(torch.float64), judge
