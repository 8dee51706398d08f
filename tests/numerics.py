"""The one tolerance: how accurate a kernel must be, judged against eager and fp64.

A result may be twice as far from fp64 as the same-dtype eager computation (`MatrixUnit`) is, in its
worst row and in each named part. Relative, so that gradients of size 1/V count; a row that is zero
must be zero.
"""

import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The kernels' tests run thrice: on the CPU, with Triton's interpreter and on a GPU; test_triton.py
# starts the second and the third.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("CODISTILL_TEST_DEVICE", "cpu")
BACKENDS = {"cpu": ["triton"] if INTERPRETED else ["cpu", "torch"]}.get(DEVICE, ["triton", "torch"])
# The interpreter cuts bf16 instead of rounding it.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


class MatrixUnit(TorchDispatchMode):
    """Eager fp32 with products as hardware makes them of a dtype: operands rounded, sums in fp32.

    Hidden states and weights are rounded already: it is the logits' gradient that this touches.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            args = [operand.to(self.dtype).to(operand.dtype) for operand in args]
        return function(*args, **(kwargs or {}))


def row_error(x: Tensor, gold: Tensor) -> float:
    """Largest relative error of a row (of the whole, for one dimension)."""
    x, gold = x.double(), gold.double()
    if gold.ndim < 2:
        x, gold = x.reshape(1, -1), gold.reshape(1, -1)
    size, error = gold.norm(dim=-1), (x - gold).norm(dim=-1)
    relative = torch.where(size > 0, error / size, torch.where(error > 0, torch.inf, 0.0))
    return relative.nan_to_num(nan=torch.inf).max().item() if relative.numel() else 0.0


def assert_as_accurate_as_eager(
    name: str,
    ours: Tensor,
    eager: Tensor,
    gold: Tensor,
    *,
    parts: dict[str, Tensor] | None = None,
    factor: float = 2.0,
    floor: float = 1e-6,
) -> None:
    """parts: masks like `gold`, judged one by one; so is the whole. floor: relative as well."""
    assert ours.shape == eager.shape == gold.shape, (name, ours.shape, eager.shape, gold.shape)
    everything = {"all": torch.ones_like(gold, dtype=torch.bool)}
    for label, keep in {**everything, **(parts or {})}.items():
        target = torch.where(keep, gold.double(), 0.0)
        got = row_error(torch.where(keep, ours.double(), 0.0), target)
        base = row_error(torch.where(keep, eager.double(), 0.0), target)
        limit = factor * min(base, 0.05) + floor
        assert got <= limit, f"{name}[{label}]: error {got:.2e}, eager's {base:.2e}"
