"""From rows of different lengths to the packed row of a forward pass. Nothing is padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from codistill.attention import Group, Packing, group_indices


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after the other, on the host."""

    values: Tensor
    """[N]"""
    cu_seqlens: Tensor
    """[S + 1] int64: row s is values[cu_seqlens[s] : cu_seqlens[s + 1]]."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Self:
        values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
        return cls(values, torch.tensor([0, *accumulate(map(len, rows))]))

    @classmethod
    def cat(cls, parts: Sequence["Ragged"]) -> Self:
        """All rows of all parts, in order."""
        lengths = torch.cat([part.lengths for part in parts])
        return cls(torch.cat([part.values for part in parts]), ends(lengths))

    @cached_property
    def lengths(self) -> Tensor:
        """[S] int64."""
        return self.cu_seqlens.diff()

    def places(self, rows: Tensor) -> Tensor:
        """[tokens of the rows] int64: where their values are, row after row."""
        return runs(self.cu_seqlens[rows], self.lengths[rows])

    def rows(self, rows: Tensor) -> "Ragged":
        return Ragged(self.values[self.places(rows)], ends(self.lengths[rows]))


def ends(lengths: Tensor) -> Tensor:
    """[S] lengths -> [S + 1] cu_seqlens."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[s], ..., starts[s] + lengths[s] - 1 of each s, one run after the other."""
    shifts = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)


@dataclass(frozen=True)
class TokenBatch:
    """S sequences (prompt, completion) in one row of L tokens; N completion tokens in all.

    Without a sequence (S = N = 0) the row is one token, so that a forward pass has something to do.
    """

    packing: Packing
    """Where the sequences lie, prompts included."""
    rows: Tensor
    """[S] int64: which of all rollouts these are."""
    index: Tensor
    """[N] int64: which of all rollouts' tokens these are."""
    input_ids: Tensor
    """[1, L] int64"""
    position_ids: Tensor
    """[1, L] int64, from 0 in each sequence."""
    positions: Tensor
    """[N] int64: the place in the row that predicts each completion token."""
    token_ids: Tensor
    """[N] int64: completion tokens, sequence after sequence, end token included."""
    cu_seqlens: Tensor
    """[S + 1] int64: completion tokens of sequence s are cu_seqlens[s] : cu_seqlens[s + 1]."""

    @classmethod
    def build(
        cls, prompts: Ragged, completions: Ragged, rows: Sequence[int], device: torch.device
    ) -> Self:
        """Pack these rows, which are sorted: no sequence is longer than the one before it."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        before, after = prompts.lengths[chosen], completions.lengths[chosen]
        lengths = before + after
        starts = lengths.cumsum(0) - lengths
        index = completions.places(chosen)
        places = runs(starts + before, after)
        input_ids = torch.zeros(max(1, int(lengths.sum())), dtype=torch.int64)
        input_ids[runs(starts, before)] = prompts.values[prompts.places(chosen)]
        input_ids[places] = completions.values[index]
        widths = lengths.tolist() or [1]
        position_ids = torch.cat([torch.arange(width) for width in widths])
        groups = group_indices(widths)
        cu_seqlens = torch.tensor([0, *accumulate(widths)])
        *tensors, sequences = to_device(
            [
                *(chosen, index, input_ids[None], position_ids[None]),
                *(places - 1, completions.values[index], ends(after)),
                *(tensor for group in groups for tensor in group[2:]),
                cu_seqlens,
            ],
            device,
        )
        own, padding = tensors[:7], iter(tensors[7:])
        packed = [Group(part, width, next(padding), next(padding)) for part, width, *_ in groups]
        return cls(Packing(tuple(packed), sequences.int(), widths[0]), *own)


def to_device(parts: Sequence[Tensor | None], device: torch.device) -> list:
    """int64 tensors of any shape, None left as it is, in one copy."""
    if device.type == "cpu":
        return list(parts)
    tensors = [part for part in parts if part is not None]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()
    pieces = iter(flat.to(device, non_blocking=True).split([t.numel() for t in tensors]))
    return [None if part is None else next(pieces).view(part.shape) for part in parts]


def pack(lengths: Tensor, limit: int) -> list[list[int]]:
    """Cut rows, the longest first, into parts of at most `limit` tokens, or of one longer row.

    lengths: [S] tokens of each row.
    """
    order = lengths.argsort(descending=True, stable=True).tolist()
    parts: list[list[int]] = []
    tokens = limit
    for row, length in zip(order, lengths[order].tolist(), strict=True):
        if tokens + length > limit:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += length
    return parts
