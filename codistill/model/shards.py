"""The part of a weight that a process holds. A weight of FSDP2 is a DTensor, split over processes
by rows; any other is whole in each process."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight: memory that is shared with it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def own_part(weight: Tensor) -> tuple[slice, ...]:
    """Where the part that this process holds lies in the whole weight."""
    if not isinstance(weight, DTensor):
        return tuple(slice(0, size) for size in weight.shape)
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def whole(weight: Tensor, device: torch.device) -> Tensor:
    """The whole weight on the device, without a gradient. Collective."""
    weight = weight.detach().to(device)
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Weights:
    """All weights of a model, gathered one after the other: an iterator of pairs (Hugging Face
    name, whole tensor), which can be read once.

    Collective: every process must iterate to the end.
    shapes: of all of them, in the same order; known before the first is gathered.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], pairs: Iterator[tuple[str, Tensor]]
    ) -> None:
        self.shapes, self.pairs = shapes, pairs

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        return next(self.pairs)
