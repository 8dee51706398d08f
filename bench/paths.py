"""The Triton backend's paths: products, passes, launches and memory, in the order of the code.

It goes through the same segments, row blocks, slices and chunks and asks the code for their sizes
(`codistill_kernels._linear.slab_sizes`), so a changed slab changes what `bench.roofline` predicts.
"""

import csv
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil

import torch

from bench.devices import Run
from bench.results import FOLDER
from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.chunks import Plan
from codistill_kernels._linear.slab_sizes import padded_columns, padded_rows, pieces

TABLE = FOLDER / "ahead_of_time.csv"
DTYPE, ITEM = torch.bfloat16, 2  # of operands: what the ceilings are of; its bytes
# Launches on [N] numbers beside products, passes and copies, as torch's dispatcher sees them: of
# linear_logps' forward and backward pass (with kept exponentials; by columns); of policy_loss
# around it; of one chunk; of the divergence; of selective_logps' passes.
LOGPS, KEPT_BACKWARD, COLUMNS_BACKWARD = 20, 32, 15
LOSS, LOSS_BACKWARD = 66, 15
CHUNK, DIVERGENCE, SELECTIVE, SELECTIVE_BACKWARD = 75, 41, 14, 6


@functools.cache
def instructions(kernel: str, writes: str, flags: str = "") -> float:
    """A logit (of both models: a pair of logits) on sm_90, from what the kernels compile to."""
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["capability"], row["reads"]) != ("90", "fp32"):
                continue
            if (row["kernel"], row["writes"], row["flags"]) == (f"{kernel}_kernel", writes, flags):
                return float(row["instructions_a_logit"])
    raise ValueError(f"{TABLE} must have {kernel} that writes {writes!r} with {flags!r}")


@dataclass(frozen=True)
class Case:
    operation: str
    mode: str
    tokens: int
    hidden: tuple[int, ...]
    """Of each model; none where the caller holds the logits."""
    vocab: int
    inactive: float = 0.0
    """Share of the tokens that a mask takes out before the logits."""
    clipped: float = 0.0
    """Share of the others that have no gradient, as their logits show."""
    workspace_mib: int | None = None

    @property
    def active(self) -> int:
        return self.tokens - round(self.inactive * self.tokens)

    @property
    def kept(self) -> int:
        return self.active - round(self.clipped * self.active)

    @property
    def workspace(self) -> int:
        """Bytes; the default where enough is free."""
        return 2**20 * (self.workspace_mib or slab_sizes.WORKSPACE_MIB)

    def plan(self, rows: int) -> Plan:
        return slab_sizes.plan(rows, self.vocab, DTYPE, self.workspace)

    @property
    def needed_flops(self) -> float:
        """Of the products that the mathematics needs, over active tokens."""
        products = {"forward": 1, "backward": 2, "both": 3}[self.mode]
        return 2.0 * products * self.active * sum(self.hidden) * self.vocab


@dataclass(frozen=True)
class Head:
    """Rows that are worked on, and the head they meet. Numbers of a row count as no memory."""

    rows: int
    hidden: int
    vocab: int
    has_entropy: bool = False

    @property
    def states(self) -> int:
        """Elements of the hidden states."""
        return self.rows * self.hidden

    @property
    def weight(self) -> int:
        return self.hidden * self.vocab

    def of(self, rows: int) -> "Head":
        return replace(self, rows=rows)


# --- products and passes (slabs.py, exponentials_triton.py) -------------------------------------


def length(piece: slice) -> int:
    return piece.stop - piece.start


@contextmanager
def slab_memory(run: Run, head: Head) -> Iterator[None]:
    """Slabs.__init__: the slab, and a row block with zeros below it."""
    blocks = [length(rows) for rows in pieces(head.rows, slab_sizes.ROWS)]
    padded = head.hidden * sum(padded_rows(n) for n in blocks if padded_rows(n) != n)
    slab = 4 * padded_rows(head.rows) * padded_columns(min(slab_sizes.SEGMENT, head.vocab))
    if padded:
        run.copies(3 * ITEM * padded, 2)
    with run.memory(slab + ITEM * padded):
        yield


def slabs(run: Run, head: Head, width: int) -> Iterator[int]:
    """Slabs.of: rows of each slab, after its product."""
    for rows in pieces(head.rows, slab_sizes.ROWS):
        run.product("logits", padded_rows(length(rows)), width, head.hidden, 4)
        yield length(rows)


def linear_states(run: Run, head: Head, columns: int, *, keeps: bool) -> None:
    for segment in pieces(columns, slab_sizes.SEGMENT):
        for rows in slabs(run, head, length(segment)):
            flags = " ".join(["HAS_ENTROPY"] * head.has_entropy + ["KEEP"] * keeps)
            each = instructions("segment_states", "bf16" if keeps else "", flags)
            run.logits(rows, length(segment), 4 + ITEM * keeps, each)


def statistics(run: Run, head: Head) -> None:
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
    """Exponentials.gradients of `kept` rows; leaves their gradient in fp32 in memory."""
    segments = ceil(head.vocab / slab_sizes.SEGMENT)
    some, is_all = head.of(kept), not slab_sizes.gathers(kept, head.rows)
    if is_all:  # the others' exponentials become 0
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


# --- operations: forward, then (after a yield) backward ----------------------------------------


def round_gradient(run: Run, tokens: int, head: Head) -> None:
    """dx of all tokens from fp32 to the dtype of the hidden states."""
    run.copies((4 + ITEM) * tokens * head.hidden)
    run.take(ITEM * tokens * head.hidden)
    run.give(4 * tokens * head.hidden)


def linear_logps(run: Run, case: Case, hidden: int) -> Iterator[None]:
    head = Head(case.active, hidden, case.vocab, case.operation != "linear_logps")
    run.small(LOGPS, waits=1)
    gathered = ITEM * head.states if case.inactive else 0
    if gathered:
        run.copies(2 * gathered)
        run.take(gathered)
    way = case.plan(head.rows).way
    if case.mode == "forward":
        statistics(run, head)
        run.ways.append("slabs")
    elif way == "kept":
        yield from kept_exponentials(run, case, head)
    else:
        run.ways.append("columns")
        statistics(run, head)
        run.give(gathered)
        yield
        by_columns(run, case, head.of(case.kept))


def kept_exponentials(run: Run, case: Case, head: Head) -> Iterator[None]:
    shared = slab_sizes.shares_memory(head.rows, head.vocab, head.hidden, ITEM, case.workspace)
    run.ways.append("kept, shared" if shared else "kept")
    exponentials = ITEM * slab_sizes.kept_elements(
        head.rows, head.vocab, head.hidden, shared=shared
    )
    run.take(exponentials)
    fill_exponentials(run, head, shared)
    yield
    run.small(KEPT_BACKWARD, waits=1)
    run.take(0 if shared else ITEM * head.weight)
    use_exponentials(run, head, case.kept, shared=shared, dw_bytes=ITEM)
    kept = case.kept if slab_sizes.gathers(case.kept, head.rows) else head.rows
    if kept < case.tokens:
        part = 4 * kept * head.hidden
        run.take(4 * case.tokens * head.hidden)
        run.copies(4 * case.tokens * head.hidden + 2 * part, 2)
        run.give(part)
    round_gradient(run, case.tokens, head)
    run.give(0 if shared else exponentials)


def by_columns(run: Run, case: Case, head: Head) -> None:
    """passes.recomputed_gradients and TritonChunks.write_gradients."""
    run.small(COLUMNS_BACKWARD, waits=1)
    dx = 4 * case.tokens * head.hidden
    run.take(dx + ITEM * head.weight)
    run.copies(dx, 2)
    part = (4 + ITEM) * head.states if head.rows < case.tokens else 0
    if part:  # rows gathered, and their gradient put back
        run.copies((2 * ITEM + 4 + 2 * 4) * head.states, 3)
    dz = ITEM * head.rows * padded_columns(min(slab_sizes.SEGMENT, head.vocab))
    with run.memory(part + dz), slab_memory(run, head):
        for columns in pieces(head.vocab, slab_sizes.SEGMENT):
            width = length(columns)
            for rows in slabs(run, head, width):
                run.logits(rows, width, 4 + ITEM, instructions("logit_gradients", "bf16"))
            run.product("dX", head.rows, head.hidden, width, 4, add=columns.start > 0)
            run.product("dW", width, head.hidden, head.rows, ITEM)
    round_gradient(run, case.tokens, head)


def linear_policy_loss(run: Run, case: Case, hidden: int) -> Iterator[None]:
    if case.mode != "forward" and case.plan(case.active).way == "chunks":
        yield from policy_chunks(run, case, Head(case.active, hidden, case.vocab, has_entropy=True))
        return
    steps = linear_logps(run, case, hidden)
    next(steps, None)
    run.small(LOSS)
    if case.mode != "forward":
        yield
        run.small(LOSS_BACKWARD)
        yield from steps


def policy_chunks(run: Run, case: Case, head: Head) -> Iterator[None]:
    """linear_policy_loss.single_pass and WithGradients: gradients in the forward pass."""
    parts = ceil(head.rows / case.plan(case.tokens).rows)
    most = ceil(head.rows / parts)
    run.ways.append(f"{parts} chunks")
    run.small(LOSS, waits=1)
    all_states = case.tokens * head.hidden
    run.take(4 * all_states)
    run.copies(4 * all_states)
    exponentials = ITEM * slab_sizes.kept_elements(most, head.vocab, head.hidden, shared=False)
    with run.memory(exponentials):
        for number, rows in enumerate(pieces(head.rows, most)):
            chunk = head.of(length(rows))
            run.small(CHUNK, waits=1)
            run.copies(2 * ITEM * chunk.states)
            with run.memory(ITEM * chunk.states):
                fill_exponentials(run, chunk, shared=False)
                run.take(0 if number else 4 * head.weight)
                kept = chunk.rows - round(case.clipped * chunk.rows)
                use_exponentials(run, chunk, kept, shared=False, dw_bytes=4, add=number > 0)
                run.copies(2 * 4 * kept * head.hidden)  # into its rows of dx
                run.give(4 * kept * head.hidden)
    yield
    # The head's gradient is scaled and narrowed in place, from twice as many numbers each time.
    run.copies((4 + ITEM) * head.weight, ceil(head.weight / 4096).bit_length() + 2)
    round_gradient(run, case.tokens, head)


def codistill_losses(run: Run, case: Case) -> Iterator[None]:
    """Both models' losses; the backward pass of the one made last comes first."""
    models = [linear_policy_loss(run, case, hidden) for hidden in case.hidden]
    for steps in models:
        next(steps, None)
    if case.mode != "forward":
        yield
        for steps in reversed(models):
            next(steps, None)


def linear_reverse_kl(run: Run, case: Case) -> Iterator[None]:
    run.ways.append("slabs")
    run.small(DIVERGENCE)
    student, teacher = (Head(case.tokens, hidden, case.vocab) for hidden in case.hidden)
    with slab_memory(run, student), slab_memory(run, teacher):
        for segment in pieces(case.vocab, slab_sizes.SEGMENT):
            width = length(segment)
            for rows, _ in zip(slabs(run, student, width), slabs(run, teacher, width), strict=True):
                run.logits(rows, width, 4 + 4, instructions("pair_states", ""))
    yield


def selective_logps(run: Run, case: Case) -> Iterator[None]:
    run.ways.append("logits given")
    run.small(SELECTIVE)
    run.logits(case.tokens, case.vocab, ITEM, instructions("segment_states", ""))
    if case.mode != "forward":
        yield
        run.small(SELECTIVE_BACKWARD)
        run.take(ITEM * case.tokens * case.vocab)
        run.logits(case.tokens, case.vocab, 2 * ITEM, instructions("logit_gradients", "bf16"))


OPERATIONS = {
    "linear_policy_loss": lambda run, case: linear_policy_loss(run, case, *case.hidden),
    "linear_logps": lambda run, case: linear_logps(run, case, *case.hidden),
    "selective_logps": selective_logps,
    "linear_reverse_kl": linear_reverse_kl,
    "codistill_losses": codistill_losses,
}
