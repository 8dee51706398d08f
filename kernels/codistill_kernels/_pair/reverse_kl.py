"""KL divergence of two models over the vocabulary, a block of rows at a time: PyTorch and C++."""

from typing import TypeAlias

import torch
from torch import Tensor

from codistill_kernels import _native
from codistill_kernels._linear.cpu_backend import ROWS as CPU_ROWS
from codistill_kernels._linear.cpu_backend import operand, operand_dtype
from codistill_kernels._linear.slab_sizes import pieces
from codistill_kernels._linear.softmax_torch import scale, statistics
from codistill_kernels._linear.torch_backend import matmul

TORCH_ROWS = 128  # at once: the logits of both models are in memory

Model: TypeAlias = tuple[Tensor, Tensor, Tensor, float]
"""Hidden states [R, H], weight [V, H], temperature [R], softcap (0: none)."""


def reverse_kl(student: Model, teacher: Model, backend: str) -> Tensor:
    """[N] KL(student || teacher), nats, by "cpu" or "torch"."""
    of_rows, most = {"cpu": (of_rows_cpu, CPU_ROWS), "torch": (of_rows_torch, TORCH_ROWS)}[backend]
    out = torch.empty_like(student[2])
    for rows in pieces(len(out), most):
        out[rows] = of_rows(
            *(
                (hidden[rows], weight.contiguous(), temperature[rows], softcap)
                for hidden, weight, temperature, softcap in (student, teacher)
            )
        )
    return out


def of_rows_cpu(student: Model, teacher: Model) -> Tensor:
    common = torch.promote_types(*(operand_dtype(*model[:2]) for model in (student, teacher)))
    (x_s, *others_s), (x_t, *others_t) = student, teacher
    out = torch.empty(len(x_s), dtype=torch.float32)
    _native.call(
        "reverse_kl", operand(x_s, common), *others_s, operand(x_t, common), *others_t, out
    )
    return out


def of_rows_torch(student: Model, teacher: Model) -> Tensor:
    dtype = student[2].dtype
    return kl_of_logits(
        *(
            scale(matmul(hidden, weight.T, dtype), temperature, softcap)
            for hidden, weight, temperature, softcap in (student, teacher)
        )
    )


def kl_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) [R] of logits [R, V], with the digits of peaked rows."""
    none = torch.full(student.shape[:1], -1, dtype=torch.int64, device=student.device)
    (max_s, rest_s, *_), (max_t, rest_t, *_) = (statistics(z, none) for z in (student, teacher))
    student, teacher = student - max_s[:, None], teacher - max_t[:, None]
    p = student.exp()
    difference = torch.where(p > 0, p * (student - teacher), 0.0).sum(dim=1)
    kl = difference / (1 + rest_s) - rest_s.log1p() + rest_t.log1p()
    return kl.clamp(min=0)  # below 0: rounding; NaN stays
