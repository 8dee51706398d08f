"""A linear head: what makes logits of hidden states."""

from dataclasses import dataclass, replace

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


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of softmax and sums: fp64 for fp64 tensors, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
