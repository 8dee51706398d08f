"""Sums over the tokens of each sequence, and values of sequences spread over their tokens."""

import torch
from torch import Tensor


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [S], summed in the order of the tokens: equal inputs give equal bits."""
    # unsafe: the lengths are not checked, for which one would wait for a GPU.
    sums = torch.segment_reduce(
        values.double(), "sum", lengths=cu_seqlens.diff(), initial=0.0, unsafe=True
    )
    return sums.to(values.dtype)


def to_tokens(values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[S] -> [N]: each token gets the value of its sequence."""
    return values.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
