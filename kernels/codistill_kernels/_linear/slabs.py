"""Slabs of logits on a GPU: products of hidden states and a head by cuBLAS, and a pass over them.

A slab is fp32 and never rounded, in memory that is used again. Slabs have fixed shapes, so a row's
result does not depend on the other rows.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.products import as_operands, product
from codistill_kernels._linear.slab_sizes import padded_columns, padded_rows, pieces
from codistill_kernels._linear.softmax_triton import STATES, segment_states


def operands(hidden_states: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Hidden states and head as products and kernels take them: of one dtype, contiguous."""
    x, weight = as_operands(hidden_states, head.weight)
    bias = None if head.bias is None else head.bias.float().contiguous()
    return x, replace(head, weight=weight, bias=bias, temperature=head.temperature.contiguous())


class Slabs:
    """fp32 products x . w of a head, one slab at a time in the same memory.

    With `keeps` each slab has memory of its own, and is made once.
    """

    def __init__(self, x: Tensor, weight: Tensor, *, keeps: bool = False) -> None:
        self.x, self.weight, self.keeps = x, weight, keeps
        self.kept: dict[tuple[int, int], Tensor] = {}
        widest = padded_columns(min(slab_sizes.SEGMENT, len(weight)))
        self.memory = self.new(0 if keeps else padded_rows(len(x)) * widest)
        self.blocks = [(rows, self.block(rows)) for rows in pieces(len(x), slab_sizes.ROWS)]

    def new(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.x.device)

    def block(self, rows: slice) -> Tensor:
        """Hidden states of a slab, padded with rows of zeros to its fixed height."""
        x = self.x[rows]
        height = padded_rows(len(x))
        if height == len(x):
            return x
        out = x.new_zeros((height, x.shape[1]))
        out[: len(x)] = x
        return out

    def of(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their products with these vocabulary rows), slab after slab."""
        weight = self.weight[columns]
        width = padded_columns(len(weight))
        for rows, x in self.blocks:
            place = (rows.start, columns.start)
            if place not in self.kept:
                memory = self.new(len(x) * width) if self.keeps else self.memory
                slab = memory[: len(x) * width].view(len(x), width)[:, : len(weight)]
                product(x, weight.T, slab)
                slab = slab[: rows.stop - rows.start]
                if self.keeps:
                    self.kept[place] = slab
            yield rows, self.kept[place] if self.keeps else slab


def linear_states(
    slabs: Slabs,
    head: Head,
    token_ids: Tensor,
    columns: slice,
    has_entropy: bool,
    exponentials: Tensor | None = None,
) -> Tensor:
    """States [segments, STATES, N] of the logits of these vocabulary rows.

    exponentials [N, columns], where given, are written.
    """
    segments = [
        slice(columns.start + piece.start, columns.start + piece.stop)
        for piece in pieces(columns.stop - columns.start, slab_sizes.SEGMENT)
    ]
    shape = (len(segments), STATES, len(token_ids))
    states = torch.empty(shape, dtype=torch.float32, device=token_ids.device)
    for number, segment in enumerate(segments):
        first = segment.start - columns.start
        for rows, slab in slabs.of(segment):
            segment_states(
                slab,
                head.bias,
                token_ids[rows],
                head.temperature[rows],
                head.softcap,
                slab.shape[1],
                segment.start,
                states[number : number + 1, :, rows],
                has_entropy,
                None
                if exponentials is None
                else exponentials[rows, first : first + slab_sizes.SEGMENT],
            )
    return states
