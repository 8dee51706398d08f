"""The one tolerance: how accurate a kernel must be, judged against eager PyTorch and fp64.

A result may be twice as far from fp64 as the same computation in eager PyTorch is (`MatrixUnit`
says of which precision). Errors are those of the worst row, and relative, so that gradients of size
1/V count; a row that is zero must be exactly zero.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 2.0  # times eager's error
CEILING = 0.05  # eager's error counts up to this: beyond it a result has no correct digit to spare
FLOOR = 1e-6  # added to what eager's error allows
SCALAR_FLOOR = 1e-5  # for scalars: they sum terms of both signs, so that their error is partly luck


class MatrixUnit(TorchDispatchMode):
    """Makes products of fp32 matrices as hardware makes those of a narrower dtype: operands rounded
    to the dtype, sums in fp32.

    Hidden states and weights are rounded already, so this affects only the logits' gradient.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            args = [operand.to(self.dtype).to(operand.dtype) for operand in args]
        return function(*args, **(kwargs or {}))


def row_error(x: Tensor, gold: Tensor) -> float:
    """Largest relative error of a row; a tensor of fewer than two dimensions is one row."""
    x, gold = x.double(), gold.double()
    if gold.ndim < 2:
        x, gold = x.reshape(1, -1), gold.reshape(1, -1)
    size, error = gold.norm(dim=-1), (x - gold).norm(dim=-1)
    relative = torch.where(size > 0, error / size, torch.where(error > 0, torch.inf, 0.0))
    return relative.nan_to_num(nan=torch.inf).max().item() if relative.numel() else 0.0


def allowed_error(eager_error: float, *, factor: float = FACTOR, floor: float = FLOOR) -> float:
    """The largest error that a result may have where eager PyTorch has this one."""
    return factor * min(eager_error, CEILING) + floor


def assert_as_accurate_as_eager(
    name: str,
    ours: Tensor,
    eager: Tensor,
    gold: Tensor,
    *,
    parts: dict[str, Tensor] | None = None,
    factor: float = FACTOR,
    floor: float = FLOOR,
) -> None:
    """Compare with fp64's result `gold`. parts: masks of gold's shape; the elements of each are
    judged apart from the others, besides the whole."""
    assert ours.shape == eager.shape == gold.shape, (name, ours.shape, eager.shape, gold.shape)
    everything = {"all": torch.ones_like(gold, dtype=torch.bool)}
    for label, keep in {**everything, **(parts or {})}.items():
        target = torch.where(keep, gold.double(), 0.0)
        got = row_error(torch.where(keep, ours.double(), 0.0), target)
        base = row_error(torch.where(keep, eager.double(), 0.0), target)
        limit = allowed_error(base, factor=factor, floor=floor)
        assert got <= limit, f"{name}[{label}]: error {got:.2e}, eager's {base:.2e}"
