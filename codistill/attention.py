"""Attention within each sequence of a packed row, where sequences lie one after the other.

Sequences of like lengths are attended to together, padded on the right to the longest of them.
Under a causal mask no token sees what comes after it, so what they are padded with changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Chosen, untested on a GPU: each group is a kernel launch per layer, and padding to 8/7 of a length
# costs at most 30 % of the products between queries and keys.
SHORT = 64
"""Tokens; sequences up to this long are one group."""
LIKE = 7 / 8
"""Shortest sequence of a group, as a share of the longest."""


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences of a row that are attended to together."""

    tokens: slice
    """Their place in the row."""
    width: int
    """Tokens that each is padded to."""
    padded: Tensor | None
    """[sequences * width] int64, which of the tokens stands there; None where all are as long."""
    places: Tensor | None
    """[tokens] int64, where each stands among the padded."""

    def pad(self, row: Tensor) -> Tensor:
        """[1, heads, L, D] -> [sequences, heads, width, D]."""
        part = row[0, :, self.tokens]
        if self.padded is not None:
            part = part.index_select(1, self.padded)
        return part.unflatten(1, (-1, self.width)).transpose(0, 1)

    def unpad(self, output: Tensor) -> Tensor:
        """[sequences, heads, width, D] -> [tokens, heads, D]."""
        flat = output.transpose(1, 2).flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


@dataclass(frozen=True)
class Packing:
    """The sequences of a row of L tokens, from the longest to the shortest."""

    groups: tuple[Group, ...]
    cu_seqlens: Tensor
    """[sequences + 1] int32: tokens of sequence s are cu_seqlens[s] : cu_seqlens[s + 1]."""
    longest: int

    @property
    def padded_tokens(self) -> int:
        """Places that `packed_attention` computes, padding included."""
        return sum(
            group.tokens.stop - group.tokens.start if group.padded is None else len(group.padded)
            for group in self.groups
        )


def group_indices(lengths: Sequence[int]) -> list[tuple[slice, int, Tensor | None, Tensor | None]]:
    """The fields of each `Group`, on the host; lengths: of the sequences, falling."""
    found: list[tuple[slice, int, Tensor | None, Tensor | None]] = []
    first = start = 0
    while first < len(lengths):
        width = lengths[first]
        least = 0 if width <= SHORT else LIKE * width
        last = first
        while last < len(lengths) and lengths[last] >= least:
            last += 1
        part = torch.tensor(lengths[first:last])
        end = start + int(part.sum())
        padded = places = None
        if part[-1] != width:
            starts = part.cumsum(0) - part
            within = torch.minimum(torch.arange(width), part[:, None] - 1)
            padded = (starts[:, None] + within).flatten()
            shift = torch.arange(len(part)) * width - starts
            places = torch.arange(end - start) + shift.repeat_interleave(part)
        found.append((slice(start, end), width, padded, places))
        first, start = last, end
    return found


def packed_attention(
    module: Any,
    query: Tensor,  # [1, heads, L, D]
    key: Tensor,  # [1, key heads, L, D]
    value: Tensor,  # [1, key heads, L, D]
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each token to its own sequence, [1, L, heads, D]; called by transformers.

    softmax_j(softcap(q_i . k_j scaling)) v_j over i - sliding_window < j <= i, without dropout

    Raises:
        NotImplementedError: the model's attention has sinks (s_aux) or a bias by position.
    """
    if s_aux is not None or position_bias is not None:
        raise NotImplementedError("attention with sinks or a bias by position")
    outputs = [
        group.unpad(
            attend(
                *(group.pad(x) for x in (query, key, value)),
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        )
        for group in packing.groups
    ]
    return torch.cat(outputs)[None], None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """[sequences, heads, width, D]: causal attention within each."""
    width = query.shape[2]
    mask = None
    if sliding_window is not None and sliding_window < width or softcap is not None:
        place = torch.arange(width, device=query.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < (sliding_window or width))
    if mask is not None and query.shape[1] != key.shape[1]:
        # With a mask no fused kernel of a GPU shares heads: the scores would all be in memory.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if softcap is not None:
        assert mask is not None
        return softcapped(query, key, value, mask, scaling, softcap)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """The same with bent scores (Gemma 2), which no fused kernel of torch computes."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * (query @ key.transpose(2, 3) * scale / softcap).tanh()
    shares = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return shares.to(query.dtype) @ value
