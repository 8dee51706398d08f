"""Divergences of two models and their gradients in one pass over chunks of both models' logits.

    chunk of rows -> logits of both -> divergences, d divergence / d logits -> both gradients

The gradient takes the place of the student's logits: 6 N H V operations of the student, 2 of the
teacher, and never more in memory than the logits of a chunk.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.chunks import split_rows
from codistill_kernels._linear.products import fp32_sums, product
from codistill_kernels._linear.slab_sizes import padded_columns, pieces, round_up
from codistill_kernels._pair.cpu_backend import CpuPairChunks
from codistill_kernels._pair.divergences import divergences
from codistill_kernels._pair.inputs import ModelInputs

# Vocabulary rows of a product; a CPU converts as many rows of a bf16 head. Chosen, untested.
COLUMNS = 4096
Results = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of the student's hidden states, weight and bias, None where not needed."""


class Logits:
    """Raw logits [R, V] of one model, never rounded, in the same memory for every chunk."""

    def __init__(self, model: ModelInputs, vocab: int, height: int, dtype: torch.dtype) -> None:
        self.hidden_states, self.head, self.vocab = model.hidden_states, model.head, vocab
        self.memory = model.hidden_states.new_empty((height, padded_columns(vocab)), dtype=dtype)
        x, weight = model.hidden_states, model.head.weight
        # A GPU multiplies operands as they are, a CPU multiplies fp32 copies.
        self.dtype = x.dtype if x.is_cuda and x.dtype == weight.dtype else dtype

    def operand(self, rows: Tensor) -> Tensor:
        """Hidden states of these rows, padded with zeros to the height of a chunk."""
        out = self.hidden_states.new_zeros(
            (len(self.memory), self.hidden_states.shape[1]), dtype=self.dtype
        )
        out[: len(rows)] = self.hidden_states[rows]
        return out

    def of(self, rows: Tensor) -> Tensor:
        """Logits of these rows; the next call overwrites them."""
        x, raw = self.operand(rows), self.memory[:, : self.vocab]
        for columns in pieces(self.vocab, COLUMNS):
            product(x, self.head.weight[columns].to(self.dtype).T, raw[:, columns])
        if self.head.bias is not None:
            raw += self.head.bias[: self.vocab]
        return raw[: len(rows)]


class Gradients:
    """Gradients of the student's hidden states, weight and bias, summed in fp32 (or fp64)."""

    def __init__(self, logits: Logits, needs: Sequence[bool]) -> None:
        self.logits, dtype = logits, logits.memory.dtype
        hidden, weight = logits.hidden_states, logits.head.weight
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        self.dx, self.dw, self.db = (
            hidden.new_zeros(shape, dtype=dtype) if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )

    def add(self, rows: Tensor, dz: Tensor) -> None:
        """Add the gradients of these rows, whose logits have the gradient dz [R, V]."""
        vocab, dtype = self.logits.vocab, self.logits.dtype
        if self.db is not None:
            self.db[:vocab] += dz.sum(dim=0)
        x = self.logits.hidden_states[rows].to(dtype)
        dx = None if self.dx is None else torch.zeros_like(x, dtype=dz.dtype)
        for columns in pieces(vocab, COLUMNS):
            part = dz[:, columns].to(dtype)
            with fp32_sums:
                if dx is not None:
                    product(part, self.logits.head.weight[columns].to(dtype), dx, add=True)
                if self.dw is not None:
                    product(part.T, x, self.dw[columns], add=True)
        if self.dx is not None:
            self.dx[rows] = dx


class PairChunks:
    """Divergences of chunks of rows, and the sums of their gradients: torch and triton."""

    def __init__(
        self,
        student: ModelInputs,
        teacher: ModelInputs,
        vocab: int,
        height: int,
        needs: Sequence[bool],
        of_rows: Callable[..., Tensor],
    ) -> None:
        """height: most rows of a chunk. of_rows: `divergences.divergences` or its Triton twin."""
        dtype = student.head.temperature.dtype
        self.student = Logits(student, vocab, height, dtype)
        self.teacher = Logits(teacher, vocab, height, dtype)
        self.gradients, self.needs_any = Gradients(self.student, needs), any(needs)
        self.of_rows = of_rows

    def divergences(
        self, rows: Tensor, kind: str, jsd_weight: float, coefficients: Tensor | None
    ) -> Tensor:
        """[R] of these rows; their gradients, times coefficients [R] (None: 1), are added up."""
        raw = self.student.of(rows)
        values = self.of_rows(
            raw,
            self.teacher.of(rows),
            self.student.head.of_rows(rows),
            self.teacher.head.of_rows(rows),
            kind,
            jsd_weight,
            coefficients,
            raw if self.needs_any else None,
        )
        if self.needs_any:
            self.gradients.add(rows, raw)
        return values

    def results(self) -> Results:
        return self.gradients.dx, self.gradients.dw, self.gradients.db


def divergences_by_chunks(
    student: ModelInputs,
    teacher: ModelInputs,
    vocab: int,
    rows: Tensor,
    kind: str,
    jsd_weight: float,
    coefficients: Tensor | None,
    needs: Sequence[bool],
    backend: str,
    workspace: int,
) -> tuple[Tensor, Results]:
    """Divergences [N] of `rows`, 0 elsewhere, and the gradients of their sum.

    coefficients: [N] factors of the divergences in the sum; None: 1. workspace: bytes that the
    logits of both models may take.
    """
    values = torch.zeros_like(student.head.temperature)
    most = max(64, workspace // (2 * values.itemsize * padded_columns(vocab)))
    parts = list(split_rows(rows, most))
    height = max(map(len, parts), default=0)
    chunks: PairChunks | CpuPairChunks
    if backend == "cpu":
        chunks = CpuPairChunks(student, teacher, vocab, needs)
    elif backend == "triton":
        from codistill_kernels._pair import divergences_triton

        # A product of few rows may sum in another order.
        height = min(round_up(height, slab_sizes.ROW_PADDING), most)
        of_rows = divergences_triton.divergences
        chunks = PairChunks(student, teacher, vocab, height, needs, of_rows)
    else:
        chunks = PairChunks(student, teacher, vocab, height, needs, divergences)
    for part in parts:
        of_part = None if coefficients is None else coefficients[part]
        values[part] = chunks.divergences(part, kind, jsd_weight, of_part)
    return values, chunks.results()
