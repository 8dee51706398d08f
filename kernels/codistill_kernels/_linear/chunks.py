"""What a backend does with the logits of a linear head: the protocol `Chunks`.

Letters: N tokens of a call, R rows (tokens) of a chunk, K of those that have a gradient, H hidden,
V vocabulary rows here. Three tensors of one number or a few per token come back everywhere:

    statistics    [4, N]  max m of the logits z, rest of sum exp(z - m), sum exp(z - m) (z - m),
                          logit of the token (0 if it is not among these vocabulary rows)
    lse_parts     [3, N]  m, log sum exp(z - m) and E_p[z - m] of the whole vocabulary, so that
                          lse = m + log sum exp(z - m)
    coefficients  [3, N]  c0, c1, c2 of dz_j = c0 p_j - c1 [j = token] + c2 p_j (z_j - E_p z)

The rest is without the term of one maximum, which is 1: lse = m + log1p(rest) keeps the small
log-probability of a token that has nearly all the mass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from codistill_kernels._linear.head import Head


@dataclass(frozen=True)
class Plan:
    """How log-probabilities and gradients of all tokens come about."""

    way: Literal["kept", "chunks", "columns"]
    """kept: what is kept of the logits of all tokens stays for the backward pass, 6 N H V
    operations. chunks: the logits of `rows` tokens at a time, the head's gradient summed over
    chunks in fp32, 6 N H V. columns: nothing stays, logits are computed again, 8 N H V."""
    rows: int
    """Tokens whose logits, or their exponentials, are in memory at once."""


class Kept(Protocol):
    """What is kept of the logits of a call's active rows until its backward pass."""

    has_entropy_gradient: bool
    """Whether `gradients` may be given a coefficient c2."""

    @property
    def statistics(self) -> Tensor:
        """[4, K] of the active rows."""

    def gradients(
        self,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs: Sequence[bool],
        hidden_states: Tensor,
        dx_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, None where `needs` says so; once only.

        Takes coefficients and lse_parts [3, N] of all rows of the call. The first gradient is in
        dx_dtype or fp32, the others are in the dtypes of weight and bias; rows of the head beyond
        the vocabulary are zeros.
        """


class Chunks(Protocol):
    """The logits of a linear head, made and used up a chunk of rows at a time.

    A chunk is held (`hold`) until its gradients are made (`gradients`): as raw logits, or as
    exponentials. `keep` does the same for all rows of a call, `write_gradients` computes the logits
    again instead. Class methods plan, before any logit is computed.
    """

    HOLDS_LOGITS: ClassVar[bool]
    """Whether `hold` holds raw logits; else exponentials, which serve no gradient of an entropy."""

    hidden_states: Tensor
    """[N, H]"""
    head: Head
    token_ids: Tensor
    """[N] column of each token here; any other number where it is not among these rows"""

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None: ...

    @classmethod
    def plan(cls, rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> Plan:
        """The fastest way through [rows, vocab] logits that fits into so many bytes.

        dtype: what a number that is kept takes, the operands' for exponentials, fp32 for logits.
        """

    @staticmethod
    def takes_logits(softcap: float, has_entropy_gradient: bool, needs: Sequence[bool]) -> bool:
        """Whether the gradients take raw logits, unrounded, and not only their exponentials."""

    def keep(
        self,
        rows: Tensor,
        head_rows: int,
        *,
        is_exact: bool,
        has_entropy: bool,
        needs_dw: bool,
        workspace: int,
    ) -> Kept:
        """Keep the logits of all rows here, which have the numbers `rows` [K] in the call.

        head_rows: rows of the head's gradient, V or more. is_exact: raw logits, not exponentials.
        has_entropy: the third statistic is wanted. workspace: bytes. Called where the plan is
        "kept".
        """

    def statistics(self, has_entropy: bool = False) -> Tensor:
        """[4, N] of all rows, none of which is held; the third may be 0 without has_entropy."""

    def hold(self, rows: Tensor) -> Tensor:
        """Hold these rows [R] in the place of those held before; their statistics [4, R]."""

    def weight_gradients(self) -> Tensor:
        """Memory [>= V, >= H] that `gradients` fills at its first call, and then adds to."""

    def gradients(
        self,
        kept: Tensor,
        coefficients: Tensor,
        lse_parts: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor | None:
        """dx [K, H] of rows `kept` [K] of those held, which ends their being held.

        Takes coefficients and lse_parts [3, K]; adds to dw [V, H] and db [V], where given.
        """

    def write_gradients(
        self,
        coefficients: Tensor,
        lse_parts: Tensor,
        is_whole: bool,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
        workspace: int,
    ) -> None:
        """Gradients of all rows from logits that are computed again, within so many bytes.

        Takes coefficients and lse_parts [3, N]; is_whole: the weight here is the whole vocabulary.
        dx [N, H] and db [>= V] hold zeros and are added to; of dw [>= V, H] the first V rows are
        written.
        """


def split_rows(rows: Tensor, most: int) -> Iterator[Tensor]:
    """Even parts of at most so many rows, none of them empty."""
    if not len(rows):
        return iter(())
    parts = -(-len(rows) // most)
    return iter(rows.split(-(-len(rows) // parts)))
