"""Divergences of two models with the C++ library's products, and plain PyTorch between them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_kernels import _native
from codistill_kernels._linear.cpu_backend import HeldLogits
from codistill_kernels._linear.slab_sizes import pieces
from codistill_kernels._pair.divergences import ELEMENTS, divergences
from codistill_kernels._pair.inputs import ModelInputs


class PanelLogits(HeldLogits):
    """Raw logits [R, V] of one model in panels of columns; their gradient takes their place."""

    def __init__(self, model: ModelInputs, rows: Tensor, vocab: int, memory: Tensor | None) -> None:
        head = model.head.columns(slice(0, vocab)).of_rows(rows)
        no_ids = torch.full_like(rows, -1)
        super().__init__(model.hidden_states[rows], head, no_ids, is_exact=True, memory=memory)
        _, self.panel = _native.tile_shape()
        self.vocab, self.kept = vocab, torch.arange(len(rows))
        self.raw = self.held.view(len(self.held), -1, self.panel)  # [panels, >= R, panel]
        # The gradient of a row takes no more memory than its logits, and lies where those of rows
        # up to it were.
        self.dz = self.held.view(self.dtype)
        self.factors = torch.ones(len(rows), dtype=torch.float32)

    def rows(self, part: slice) -> Tensor:
        """Logits [r, V] of these rows, a copy."""
        block = self.raw[:, part].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        return block.view(len(block), -1)[:, : self.vocab]

    def put(self, part: slice, dz: Tensor) -> None:
        """Write dz [r, V] in the place of these rows, after they were read; in rising order."""
        width = len(self.held) * self.panel
        dz = torch.nn.functional.pad(dz, (0, width - self.vocab)).view(len(dz), -1, self.panel)
        panels = self.dz.view(len(self.dz), -1, self.panel)
        panels[:, part] = dz.transpose(0, 1)
        if part.stop == len(self.kept):  # products read whole tiles
            panels[:, part.stop : self.raw.shape[1]] = 0


class CpuPairChunks:
    """`chunks.PairChunks` on the C++ backend."""

    def __init__(
        self, student: ModelInputs, teacher: ModelInputs, vocab: int, needs: Sequence[bool]
    ) -> None:
        self.student, self.teacher, self.vocab = student, teacher, vocab
        self.memories: tuple[Tensor | None, Tensor | None] = (None, None)
        weight = student.head.weight
        shapes = (student.hidden_states.shape, weight.shape, weight.shape[:1])
        self.dx, self.dw, self.db = (
            torch.zeros(shape, dtype=torch.float32) if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )
        self.needs_any = any(needs)

    def divergences(
        self, rows: Tensor, kind: str, jsd_weight: float, coefficients: Tensor | None
    ) -> Tensor:
        student, teacher = (
            PanelLogits(model, rows, self.vocab, memory)
            for model, memory in zip((self.student, self.teacher), self.memories, strict=True)
        )
        self.memories = student.memory, teacher.memory
        values = torch.empty(len(rows), dtype=torch.float32)
        for part in pieces(len(rows), max(1, ELEMENTS // self.vocab)):
            raw = student.rows(part)
            values[part] = divergences(
                raw,
                teacher.rows(part),
                student.head.of_rows(part),
                teacher.head.of_rows(part),
                kind,
                jsd_weight,
                None if coefficients is None else coefficients[part],
                raw if self.needs_any else None,
            )
            if self.needs_any:
                student.put(part, raw)
                if self.db is not None:
                    self.db[: self.vocab] += raw.sum(dim=0)
        if self.dx is not None:
            student.hidden_gradient(self.dx, rows)
        if self.dw is not None:
            student.weight_gradient(self.dw[: self.vocab], add=True)
        return values

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.dx, self.dw, self.db
