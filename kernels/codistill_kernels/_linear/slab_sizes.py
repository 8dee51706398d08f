"""In which pieces the Triton backend goes through the logits [N, V], and how much memory they take.

A slab is fp32 logits of at most ROWS tokens and SEGMENT vocabulary rows: a product whose tiles fill
a GPU, in memory that does not grow. Nothing here touches a device; `bench/roofline.py` predicts
times from the same functions.
"""

from collections.abc import Iterator

import torch

from codistill_kernels._linear.chunks import Plan

# Tokens and vocabulary rows of a slab: 1024 tiles of 128 x 256, 7.8 waves on 132 multiprocessors.
ROWS, SEGMENT = 4096, 8192
# Tokens of a slab are padded to a multiple of this: a product of few rows may sum in another order.
ROW_PADDING = 1024
ALIGNMENT = 64  # columns: rows start at 128 bytes or more, so that every access has 16
FEW_ROWS = 2048  # below, a chunk's read and write of the fp32 head gradient costs more than 2 N H V
WORKSPACE_MIB = 2560  # on a GPU: exponentials of 8192 tokens of a 151936-row head, and a slab
KEPT_DTYPES = (torch.bfloat16, torch.float32)  # fp16 has not the range of an exponential
SLAB_BYTES = 4 * ROWS * SEGMENT
# Where a larger share of the rows that are held has a gradient, gathering them costs more than the
# products with the others.
GATHERED_SHARE = 0.95


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def pieces(size: int, most: int) -> Iterator[slice]:
    """Slices that cut 0 : size into parts of `most`; the last may be shorter."""
    return (slice(first, min(first + most, size)) for first in range(0, size, most))


def padded_rows(rows: int) -> int:
    """Rows of the slab of so many tokens."""
    return min(round_up(rows, ROW_PADDING), ROWS)


def padded_columns(columns: int) -> int:
    """Stride of rows of so many logits in memory."""
    return round_up(columns, ALIGNMENT)


def plan(rows: int, vocab: int, dtype: torch.dtype, workspace_bytes: int) -> Plan:
    """The fastest way whose slab and exponentials fit into the workspace."""
    if dtype not in KEPT_DTYPES:
        return Plan("columns", 0)
    fit = max(0, workspace_bytes - SLAB_BYTES) // (dtype.itemsize * padded_columns(vocab))
    if rows <= fit:
        return Plan("kept", rows)
    if fit < FEW_ROWS:
        return Plan("columns", 0)
    chunks = -(-rows // fit)
    return Plan("chunks", -(-rows // chunks))


def shares_memory(rows: int, vocab: int, hidden: int, itemsize: int, workspace_bytes: int) -> bool:
    """Whether the head's gradient is written where the exponentials were.

    It is where both side by side take more than the workspace, unless the gradient would keep more
    than twice its own memory alive.
    """
    both = itemsize * vocab * (rows + hidden) + SLAB_BYTES
    return both > workspace_bytes and rows <= 2 * hidden


def kept_elements(
    rows: int, vocab: int, hidden: int, *, shared: bool, head_rows: int | None = None
) -> int:
    """Size of the buffer whose end holds the exponentials.

    With `shared` its start will hold the gradient of head_rows rows, which are more than `vocab`
    where the vocabulary is padded.
    """
    columns = padded_columns(vocab)
    if not shared:
        return rows * columns
    # `columns` in both: rows of the gradient never catch up with exponentials yet to be read.
    return round_up(max(rows * columns, hidden * max(columns, head_rows or 0)), ALIGNMENT)


def slices(
    rows: int, vocab: int, hidden: int, *, shared: bool, head_rows: int | None = None
) -> Iterator[slice]:
    """Padded vocabulary rows whose exponentials lie together, as one [rows, columns] matrix each.

    All of them; with `shared` as many as leave room in front of them for their part of the
    gradient, which is written when they have been read, or a single segment.
    """
    columns = padded_columns(vocab)
    if not shared:
        yield slice(0, columns)
        return
    in_front = kept_elements(rows, vocab, hidden, shared=True, head_rows=head_rows) - rows * columns
    first = 0
    while first < columns:
        room = (in_front + rows * first) // hidden - first
        width = max(SEGMENT, room // SEGMENT * SEGMENT)
        yield slice(first, min(first + width, columns))
        first += width


def gathers(kept: int, rows: int) -> bool:
    """Whether the rows with a gradient are copied together; else the exponentials of the other rows
    become 0."""
    return kept <= GATHERED_SHARE * rows
