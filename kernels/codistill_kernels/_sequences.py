"""Sums over the tokens of a sequence, and numbers of a sequence given to its tokens."""

import torch
from torch import Tensor


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
