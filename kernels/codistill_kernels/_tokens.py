"""Tokens in rows of sequences, [B, T], brought to flat tokens, [N = B T], and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from codistill_kernels._checks import require, require_shape, require_tensor


@dataclass(frozen=True)
class TokenShape:
    """How a call brings its tokens: [N], or [B, T], where each row is a sequence."""

    shape: torch.Size

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "TokenShape":
        """The shape of the argument `name`, which all other arguments of tokens must have, too."""
        require_tensor(name, tensor)
        require(tensor.ndim in (1, 2), name, "[N] or [B, T]", tuple(tensor.shape))
        return cls(tensor.shape)

    @property
    def is_flat(self) -> bool:
        return len(self.shape) == 1

    def flat(self, **arguments: object) -> tuple:
        """Each tensor of one number per token as [N]; all else stays as it is.

        Where tokens are flat already nothing changes: the checks of arguments judge later.
        """
        if self.is_flat:
            return tuple(arguments.values())
        return tuple(self.flatten(name, value) for name, value in arguments.items())

    def flatten(self, name: str, value: object) -> object:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        require_shape(name, value, tuple(self.shape), "[B, T]")
        return value.reshape(-1)

    def flat_states(self, name: str, hidden_states: Tensor) -> Tensor:
        """[..., H] as [N, H]"""
        letters = "[N" if self.is_flat else "[B, T"
        expected = f"{letters}, H] with {letters}] = {tuple(self.shape)}"
        require(hidden_states.shape[:-1] == self.shape, name, expected, tuple(hidden_states.shape))
        return hidden_states if self.is_flat else hidden_states.flatten(0, 1)

    def sequences(
        self, name: str, values: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """values and cu_seqlens for flat tokens; values [B] are one per sequence."""
        if self.is_flat:
            return values, cu_seqlens
        expected = "None: with tokens [B, T] each row is a sequence"
        require(cu_seqlens is None, "cu_seqlens", expected, "one")
        if not isinstance(values, Tensor) or values.ndim != 1:
            return *self.flat(**{name: values}), None
        rows, width = self.shape
        require_shape(name, values, (rows,), "[B]")
        return values, width * torch.arange(rows + 1, device=values.device)

    def restored(self, values: Tensor, statistics: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Both in the caller's shape of tokens; scalars stay scalars."""
        return self.rows(values), {key: self.rows(value) for key, value in statistics.items()}

    def rows(self, values: Tensor) -> Tensor:
        """[N] in the caller's shape; a scalar as it is."""
        return values if self.is_flat or values.ndim == 0 else values.view(self.shape)
