"""Which backend goes through the logits of a linear head, in which way, in how much memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_kernels import _backends
from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.chunks import Chunks, Kept, Plan
from codistill_kernels._linear.cpu_backend import CpuChunks
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.inputs import LinearInputs
from codistill_kernels._linear.torch_backend import TorchChunks

WORKSPACE_MIB = 128  # on a CPU: exponentials of 1024 rows of 65536 logits in bf16


def workspace_bytes(
    workspace_mib: int | None, device: torch.device, vocab: int, *, is_shard: bool = False
) -> int:
    """The caller's choice; else the device's default: on a GPU at most half of what is free, on
    a CPU never so little that logits of a chunk would be computed twice.

    is_shard: all processes must choose alike, however much each has free.
    """
    if workspace_mib is not None:
        return workspace_mib * 2**20
    if device.type != "cuda":
        return max(WORKSPACE_MIB * 2**20, 4 * CpuChunks.FEW_ROWS * vocab)
    if is_shard:
        return slab_sizes.WORKSPACE_MIB * 2**20
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(slab_sizes.WORKSPACE_MIB * 2**20, free // 2)


def chunks_for(hidden_states: Tensor, vocab: int, backend: str) -> type[Chunks]:
    """The class that goes through `vocab` logits per row of these hidden states."""
    # Chosen here, where torch.compile does not look: the library is loaded at the first call.
    chosen = _backends.choose(backend, hidden_states.device, hidden_states.dtype)
    # Without a vocabulary row (the last shard may have none) there is nothing to fuse.
    if chosen == "torch" or vocab == 0:
        return TorchChunks
    if chosen == "cpu":
        return CpuChunks
    # Imported here: `import codistill_kernels` must not need Triton.
    from codistill_kernels._linear.triton_backend import TritonChunks

    return TritonChunks


def make_chunks(hidden_states: Tensor, head: Head, token_ids: Tensor, backend: str) -> Chunks:
    """Chunks of the logits of all these rows."""
    return chunks_for(hidden_states, len(head.weight), backend)(hidden_states, head, token_ids)


def plan_for(
    kind: type[Chunks],
    hidden_states: Tensor,
    weight: Tensor,
    vocab: int,
    workspace: int,
    is_exact: bool,
    rows: int | None = None,
) -> Plan:
    """The way through `vocab` logits per row, within a workspace of so many bytes.

    rows: how many; None: as many as there are hidden states. is_exact: raw logits are kept or held
    (`Chunks.takes_logits`).
    """
    dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
    if is_exact:
        dtype = torch.promote_types(dtype, torch.float32)
    return kind.plan(len(hidden_states) if rows is None else rows, vocab, dtype, workspace)


def plan_of_call(
    inputs: LinearInputs,
    rows: int,
    workspace_mib: int | None,
    backend: str,
    has_entropy_gradient: bool,
    needs: Sequence[bool],
) -> tuple[type[Chunks], Plan]:
    """The class and the way for the `rows` active rows of a call.

    Sizes are those of the largest shard of the head, so that all processes plan alike.
    """
    hidden_states, weight, *_ = inputs.tensors
    vocab, is_shard = inputs.shard.most_rows, inputs.shard.group is not None
    workspace = workspace_bytes(workspace_mib, hidden_states.device, vocab, is_shard=is_shard)
    kind = chunks_for(hidden_states, vocab, backend)
    is_exact = kind.takes_logits(inputs.softcap, has_entropy_gradient, needs)
    return kind, plan_for(kind, hidden_states, weight, vocab, workspace, is_exact, rows)


def keep_logits(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    rows: Tensor,
    head_rows: int,
    *,
    has_entropy: bool,
    has_entropy_gradient: bool,
    needs: Sequence[bool],
    backend: str,
    workspace: int,
) -> Kept | None:
    """Keep the logits of these rows, all active; None where they do not fit.

    rows: their numbers in the call. head_rows: rows of the head's gradient, V or more. has_entropy:
    the entropy is wanted, has_entropy_gradient: and it is sure to have a gradient.
    """
    vocab = len(head.weight)
    kind = chunks_for(hidden_states, vocab, backend)
    is_exact = kind.takes_logits(head.softcap, has_entropy_gradient, needs)
    plan = plan_for(kind, hidden_states, head.weight, vocab, workspace, is_exact)
    if plan.way != "kept" or not len(rows):
        return None
    return kind(hidden_states, head, token_ids).keep(
        rows,
        head_rows,
        is_exact=is_exact,
        has_entropy=has_entropy,
        needs_dw=needs[1],
        workspace=workspace,
    )
