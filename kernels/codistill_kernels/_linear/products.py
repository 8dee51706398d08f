"""Products of matrices, summed in fp32 whatever the operands are. Plain PyTorch."""

import threading
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def as_operands(hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both with contiguous rows and of one dtype, which is fp32 where theirs differ."""
    if hidden_states.dtype != weight.dtype or weight.dtype == torch.float64:
        hidden_states, weight = hidden_states.float(), weight.float()
    return tuple(t if t.stride(1) == 1 else t.contiguous() for t in (hidden_states, weight))


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b: summed in fp32 (fp64 into fp64), rounded once to the dtype of
    `out`."""
    with torch.autocast(a.device.type, enabled=False):  # a caller's holds in here too
        multiply(a, b, out, add=add)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    wide = torch.promote_types(out.dtype, torch.float32)
    if a.is_cuda and a.dtype.itemsize < 4:
        if out.dtype != torch.float32:
            assert not add
            torch.mm(a, b, out=out)
        elif add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(a.to(wide), b.to(wide))
    elif out.dtype == wide:
        torch.mm(a.to(wide), b.to(wide), out=out)
    else:
        out.copy_(a.to(wide) @ b.to(wide))


class Fp32Sums(AbstractContextManager):
    """A context in which cuBLAS may not add up parts of a product rounded to bf16 or fp16.

    The settings are those of the process, and the backward pass of each GPU has a thread of its
    own: the first to enter changes them, the last to leave restores them.
    """

    NAMES = tuple(f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16"))

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: dict[str, tuple[bool, bool]] = {}

    def __enter__(self) -> None:
        settings = torch.backends.cuda.matmul
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                for name in self.NAMES:
                    self.before[name] = (
                        getattr(settings, name),
                        getattr(settings, name + "_split_k"),
                    )
                    setattr(settings, name, (False, self.before[name][1]))

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for name, values in self.before.items():
                    setattr(torch.backends.cuda.matmul, name, values)


fp32_sums = Fp32Sums()
