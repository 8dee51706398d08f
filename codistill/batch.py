"""From lists of tokens to the padded tensors of a forward pass. Masks come from lengths alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """S sequences (prompt, completion), padded on the right to T; N completion tokens in all."""

    input_ids: Tensor
    """[S, T] int64; padding is id 0, whatever that token is."""
    attention_mask: Tensor
    """[S, T] int64; 1 on prompt and completion."""
    positions: Tensor
    """[N] int64, index into the flattened S * T: the position that predicts each token."""
    token_ids: Tensor
    """[N] int64: completion tokens, sequence after sequence, end token included."""
    cu_seqlens: Tensor
    """[S + 1] int64: tokens of sequence s are cu_seqlens[s] : cu_seqlens[s + 1]."""

    @classmethod
    def build(
        cls,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        device: torch.device,
    ) -> Self:
        assert all(prompts) and all(completions), "a prompt or a completion is empty"
        pairs = list(zip(prompts, completions, strict=True))
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        input_ids = torch.zeros(len(pairs), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        positions = []
        for row, (prompt, completion) in enumerate(pairs):
            length = len(prompt) + len(completion)
            input_ids[row, :length] = torch.tensor(prompt + completion)
            attention_mask[row, :length] = 1
            # Logits at t predict token t + 1: the last prompt token predicts the first of these.
            first = row * width + len(prompt) - 1
            positions.append(torch.arange(first, first + len(completion)))
        lengths = torch.tensor([0] + [len(completion) for completion in completions])
        tokens = [token for completion in completions for token in completion]
        tensors = (input_ids, attention_mask, torch.cat(positions), torch.tensor(tokens))
        return cls(*(tensor.to(device) for tensor in (*tensors, lengths.cumsum(0))))

    def split(self, per_token: Tensor) -> Sequence[Tensor]:
        """[N] -> S tensors, one a sequence."""
        return per_token.split(self.cu_seqlens.diff().tolist())
