"""Parts of the Triton backend's paths: products and passes over slabs, kept exponentials.

The functions go through the same segments, row blocks, slices and chunks as the code and ask it for
their sizes (`codistill_kernels.slab_sizes`), so that a changed slab changes what `bench.roofline`
predicts.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil

import torch

from bench import ahead_of_time
from bench.devices import Run
from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.chunks import Plan
from codistill_kernels._linear.slab_sizes import padded_columns, padded_rows, pieces

DTYPE, ITEM = torch.bfloat16, 2  # of operands, and its bytes: the GPUs' rates are for bf16


@functools.cache
def instructions(kernel: str, writes: str, flags: str = "") -> float:
    """Instructions per logit (per pair of logits, in a kernel on two models) that the kernel
    compiles to on sm_90."""
    for row in ahead_of_time.table().read():
        if (row.capability, row.reads) == (90, "fp32"):
            if (row.kernel, row.writes, row.flags) == (f"{kernel}_kernel", writes, flags):
                return row.instructions_per_logit
    raise ValueError(
        f"{ahead_of_time.TABLE} must have {kernel} that writes {writes!r} with {flags!r}"
    )


@dataclass(frozen=True)
class Case:
    """An operation in one mode (forward, backward or both) at one size."""

    operation: str
    mode: str
    tokens: int
    hidden: tuple[int, ...]
    """One size per model; none if the caller holds the logits."""
    vocab: int
    inactive: float = 0.0
    """Share of the tokens that a mask takes out before the logits are computed."""
    clipped: float = 0.0
    """Share of the other tokens that turn out to have no gradient."""
    workspace_mib: int | None = None

    @property
    def active(self) -> int:
        """Tokens that have logits."""
        return self.tokens - round(self.inactive * self.tokens)

    @property
    def kept(self) -> int:
        """Tokens that have a gradient."""
        return self.active - round(self.clipped * self.active)

    @property
    def workspace(self) -> int:
        """Bytes; by default what the code takes if enough is free."""
        return 2**20 * (self.workspace_mib or slab_sizes.WORKSPACE_MIB)

    def plan(self, rows: int) -> Plan:
        return slab_sizes.plan(rows, self.vocab, DTYPE, self.workspace)

    @property
    def needed_flops(self) -> float:
        """Operations of the products that the mathematics needs, over active tokens: one forward,
        and two backward for every model but a teacher."""
        of_backward = 2 * sum(self.hidden[:1] if self.has_teacher else self.hidden)
        hidden = {
            "forward": sum(self.hidden),
            "backward": of_backward,
            "both": sum(self.hidden) + of_backward,
        }[self.mode]
        return 2.0 * self.active * hidden * self.vocab

    @property
    def has_teacher(self) -> bool:
        return self.operation == "linear_divergence"


@dataclass(frozen=True)
class Head:
    """The tokens that are worked on, and the sizes of the head. Single numbers per token are so
    small that their memory is not counted."""

    rows: int
    hidden: int
    vocab: int
    has_entropy: bool = False

    @property
    def states(self) -> int:
        """Number of elements of the hidden states."""
        return self.rows * self.hidden

    @property
    def weight(self) -> int:
        """Number of elements of the weight."""
        return self.hidden * self.vocab

    def of(self, rows: int) -> "Head":
        """The same head for another number of tokens."""
        return replace(self, rows=rows)


# --- products and passes (slabs.py, exponentials_triton.py) -------------------------------------


def length(piece: slice) -> int:
    return piece.stop - piece.start


@contextmanager
def slab_memory(run: Run, head: Head) -> Iterator[None]:
    """Slabs.__init__: the slab, and each block of rows that is padded with zeros."""
    blocks = [length(rows) for rows in pieces(head.rows, slab_sizes.ROWS)]
    padded = head.hidden * sum(padded_rows(n) for n in blocks if padded_rows(n) != n)
    slab = 4 * padded_rows(head.rows) * padded_columns(min(slab_sizes.SEGMENT, head.vocab))
    if padded:
        run.copies(3 * ITEM * padded, 2)
    with run.memory(slab + ITEM * padded):
        yield


def slabs(run: Run, head: Head, width: int) -> Iterator[int]:
    """Slabs.of: the product of each slab, then the number of its rows."""
    for rows in pieces(head.rows, slab_sizes.ROWS):
        run.product("logits", padded_rows(length(rows)), width, head.hidden, 4)
        yield length(rows)


def linear_states(run: Run, head: Head, columns: int, *, keeps: bool) -> None:
    """Products and passes for so many columns; keeps: the exponentials are written."""
    for segment in pieces(columns, slab_sizes.SEGMENT):
        for rows in slabs(run, head, length(segment)):
            flags = " ".join(["HAS_ENTROPY"] * head.has_entropy + ["KEEP"] * keeps)
            each = instructions("segment_states", "bf16" if keeps else "", flags)
            run.logits(rows, length(segment), 4 + ITEM * keeps, each)


def statistics(run: Run, head: Head) -> None:
    """The forward pass that keeps nothing."""
    with slab_memory(run, head):
        linear_states(run, head, head.vocab, keeps=False)


def fill_exponentials(run: Run, head: Head, shared: bool) -> None:
    """Exponentials.__init__, into memory that the caller has taken."""
    with slab_memory(run, head):
        for columns in slab_sizes.slices(head.rows, head.vocab, head.hidden, shared=shared):
            stop = min(columns.stop, head.vocab)
            linear_states(run, head, stop - columns.start, keeps=True)


def overlaps(head: Head, columns: slice, shared: bool) -> bool:
    """Whether a slice's gradient would be written where its own exponentials lie."""
    if not shared:
        return False
    size = slab_sizes.kept_elements(head.rows, head.vocab, head.hidden, shared=True)
    first = size - head.rows * (padded_columns(head.vocab) - columns.start)
    last = first + head.rows * length(columns)
    gradient = (columns.start * head.hidden, min(columns.stop, head.vocab) * head.hidden)
    return gradient[0] < last and first < gradient[1]


def use_exponentials(
    run: Run, head: Head, kept: int, *, shared: bool, dw_bytes: int, add: bool = False
) -> None:
    """Exponentials.gradients of `kept` rows. Their dx stays in memory, in fp32."""
    segments = ceil(head.vocab / slab_sizes.SEGMENT)
    some, is_all = head.of(kept), not slab_sizes.gathers(kept, head.rows)
    if is_all:  # the exponentials of the other rows are set to 0
        run.copies(2 * ITEM * (head.rows - kept) * head.vocab)
        some, kept = head, head.rows
    run.spend("launches", run.device.chained_loads(kept, segments))
    states = ITEM * some.states
    gathered_states = 0 if is_all else states  # x[kept]
    run.take(gathered_states + states)  # v x
    run.copies(2 * gathered_states + 4 * states, 3)
    run.take(4 * some.states)  # dx
    widest = padded_columns(head.vocab) if is_all else slab_sizes.SEGMENT
    gathered = 0 if is_all else ITEM * kept * widest
    with run.memory(gathered):
        for columns in slab_sizes.slices(head.rows, head.vocab, head.hidden, shared=shared):
            run.small(1)  # finish_exponentials_kernel
            for piece in pieces(length(columns), widest):
                first = columns.start + piece.start
                width = min(columns.start + piece.stop, head.vocab) - first
                if not is_all:
                    run.copies(2 * ITEM * kept * width)
                run.product("dX", kept, head.hidden, width, 4, add=first > 0)
                run.product("dW", width, head.hidden, kept, dw_bytes, add=add)
                if is_all and overlaps(head, columns, shared):
                    run.copies(2 * ITEM * width * head.hidden)
                    with run.memory(ITEM * width * head.hidden):
                        pass
    run.copies(2 * 4 * some.states)  # dx times v
    run.give(gathered_states + states)
