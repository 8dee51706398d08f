"""Which rows of a linear head this process holds, and what those that share one agree on."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._checks import require, require_tensor

# What to do with a head of FSDP, whose processes bring tokens of their own: the gradient of a bare
# .full_tensor() would not be summed over them.
WHOLE = "unshard() its module, or .full_tensor(grad_placements=[Partial()])"


@dataclass(frozen=True)
class Shard:
    """Rows of the head that are here: all of them without a group."""

    first_row: int
    """Row of the whole head that is the first one here."""
    all_rows: int
    """Rows of the whole head."""
    most_rows: int
    """Rows of the largest shard, by which all processes make the same chunks of tokens."""
    group: dist.ProcessGroup | None = None


def is_dtensor(value: object) -> bool:
    # By name: importing torch.distributed.tensor takes half a second.
    return type(value).__name__ == "DTensor"


def require_plain(name: str, tensor: object) -> None:
    require_tensor(name, tensor)
    require(not is_dtensor(tensor), name, "a plain tensor (.to_local() of it)", "a DTensor")


def local_head(
    weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, Shard]:
    """Weight and bias as this process holds them, plain and differentiable, and which rows."""
    require_tensor("lm_head_weight", weight)
    require(weight.ndim == 2, "lm_head_weight", "[V, H]", tuple(weight.shape))
    if bias is not None:
        require_tensor("bias", bias)
    if is_dtensor(weight):
        return head_of_dtensor(weight, bias, group)
    expected = "a plain tensor like lm_head_weight"
    require(not is_dtensor(bias), "bias", expected, "a DTensor")
    rows = weight.shape[0]
    if group is None:
        return weight, bias, Shard(0, rows, rows)
    first_row, all_rows = dist.get_rank(group) * rows, dist.get_world_size(group) * rows
    return weight, bias, Shard(first_row, all_rows, rows, group)


def head_of_dtensor(
    weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, Shard]:
    placement, rows = require_placement("lm_head_weight", weight), weight.shape[0]
    if bias is not None:
        is_alike = (
            is_dtensor(bias)
            and bias.device_mesh == weight.device_mesh
            and bias.placements == weight.placements
        )
        expected = f"a DTensor placed as lm_head_weight, {weight.placements}"
        require(is_alike, "bias", expected, getattr(bias, "placements", "a plain tensor"))
    parts = (weight, bias)
    if placement.is_replicate():
        require(group is None, "group", "None: lm_head_weight is replicated", "one")
        weight, bias = (None if t is None else local_replica(t) for t in parts)
        return weight, bias, Shard(0, rows, rows)
    mesh = weight.device_mesh
    is_same = group is None or group == mesh.get_group()
    require(is_same, "group", "None or that of lm_head_weight's mesh", "another")
    most = -(-rows // mesh.size())  # as torch.chunk
    first = min(mesh.get_local_rank() * most, rows)
    weight, bias = (None if t is None else t.to_local() for t in parts)
    expected = f"sharded as by torch.chunk, {min(most, rows - first)} rows here"
    require(weight.shape[0] == min(most, rows - first), "lm_head_weight", expected, weight.shape[0])
    return weight, bias, Shard(first, rows, most, mesh.get_group())


def require_placement(name: str, tensor: Tensor):
    """The one placement of a DTensor."""
    placement = tensor.placements[0]
    is_known = len(tensor.placements) == 1 and (placement.is_replicate() or placement.is_shard(0))
    expected = f"placed as Replicate or Shard(0) on a mesh of one dimension: {WHOLE}"
    require(is_known, name, expected, tensor.placements)
    return placement


def whole_head(name: str, weight: Tensor) -> Tensor:
    """The weight, all of it here; a ValueError where it is in shards."""
    if not is_dtensor(weight):
        return weight
    expected = f"whole on every process: {WHOLE}"
    require(all(p.is_replicate() for p in weight.placements), name, expected, weight.placements)
    return local_replica(weight)


def local_replica(tensor: Tensor) -> Tensor:
    """The replica here, differentiable: the DTensor's gradient is the sum over processes, each of
    which brings tokens of its own."""
    from torch.distributed.tensor import Partial

    return tensor.to_local(grad_placements=[Partial()] * len(tensor.placements))


def nan_where_apart(temperature: Tensor, token_ids: Tensor, shard: Shard) -> Tensor:
    """temperature [N], after a check that all processes of the group bring the same tokens [N]
    (negative: not active) and the same vocabulary.

    Raises ValueError where they do not; under torch.compile, where nothing is looked at, all
    temperatures become NaN. One small all_reduce: unequal shards, or a head sharded over processes
    that bring tokens of their own, would give wrong results, or a deadlock by unequal chunks.
    """
    numbers = torch.stack(
        (
            token_ids.new_full((), shard.all_rows),
            token_ids.new_full((), token_ids.shape[0]),
            token_ids.sum(),
        )
    )
    bounds = torch.cat((numbers, -numbers))
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=shard.group)
    largest, smallest = bounds[:3], -bounds[3:]
    # Outside torch.compile values are looked at on a GPU, too: it is waited for anyway, to find the
    # active tokens.
    if torch.compiler.is_compiling():
        return torch.where((largest == smallest).all(), temperature, torch.nan)
    (most, *tokens), (least, *others) = largest.tolist(), smallest.tolist()
    size = dist.get_world_size(shard.group)
    expected = "of as many rows on all processes of `group` (unequal shards: a DTensor)"
    require(most == least, "lm_head_weight", expected, f"{least // size} to {most // size}")
    expected = "the same, and masked alike, on all processes that share the head"
    require(tokens == others, "token_ids", expected, "others")
    return temperature
