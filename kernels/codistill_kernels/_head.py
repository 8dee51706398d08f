"""What a linear head is and in which order tokens go through it, for every backend."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: z = softcap tanh((x . w + bias) / softcap) / temperature."""

    weight: Tensor
    """[V, H], cut to the vocabulary."""
    bias: Tensor | None
    """[V] or None."""
    temperature: Tensor
    """[N], in the compute dtype."""
    softcap: float
    """0: none."""

    def columns(self, columns: slice) -> "Head":
        """The head of some of its vocabulary rows."""
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, weight=self.weight[columns], bias=bias)

    def of_rows(self, rows: Tensor | slice) -> "Head":
        """The head for some of the tokens."""
        return replace(self, temperature=self.temperature[rows])


@dataclass(frozen=True)
class Plan:
    """How log-probabilities and gradients of all tokens come about."""

    way: Literal["kept", "chunks", "columns"]
    """kept: exponentials of all tokens stay for the backward pass, 6 N H V operations. chunks: of
    `rows` tokens at a time, the head's gradient summed over chunks in fp32, 6 N H V. columns:
    nothing stays, logits are computed again, 8 N H V."""
    rows: int
    """Tokens whose logits, or their exponentials, are in memory at once."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
