"""What the Triton backend does in each operation: products, passes, launches and memory, in order.

A function that yields has done the forward pass before and does the backward pass after.
"""

from collections.abc import Iterator
from math import ceil

from bench.devices import Run
from bench.path_parts import (
    ITEM,
    Case,
    Head,
    fill_exponentials,
    instructions,
    length,
    slab_memory,
    slabs,
    statistics,
    use_exponentials,
)
from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.slab_sizes import padded_columns, pieces
from codistill_kernels._pair import chunks as pair_chunks

# Launches of small kernels on [N] numbers, counted with torch's dispatcher. linear_logps: forward
# pass, backward pass with kept exponentials, and by columns.
LOGPS, KEPT_BACKWARD, COLUMNS_BACKWARD = 20, 32, 15
# policy_loss around it, and each chunk of linear_policy_loss.
LOSS, LOSS_BACKWARD, CHUNK = 66, 15, 75
# linear_divergence: once, for each chunk, for each chunk with a gradient, and its backward pass.
DIVERGENCE, DIVERGENCE_CHUNK, DIVERGENCE_GRADIENT, DIVERGENCE_BACKWARD = 9, 72, 2, 3
REVERSE_KL, SELECTIVE, SELECTIVE_BACKWARD = 41, 14, 6


def round_gradient(run: Run, tokens: int, head: Head) -> None:
    """dx of all tokens is rounded from fp32 to the dtype of the hidden states."""
    run.copies((4 + ITEM) * tokens * head.hidden)
    run.take(ITEM * tokens * head.hidden)
    run.give(4 * tokens * head.hidden)


def linear_logps(run: Run, case: Case, hidden: int) -> Iterator[None]:
    """Log-probabilities of one model. linear_policy_loss without chunks does the same, and makes
    the entropy besides."""
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
    """linear_logps with exponentials that the forward pass keeps for the backward pass."""
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
    """The loss of one model; hidden: its hidden size."""
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
    """linear_policy_loss.single_pass and WithGradients: the forward pass makes the gradients."""
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
    scale_gradients(run, case, head)


def scale_gradients(run: Run, case: Case, head: Head) -> None:
    """WithGradients.backward: each launch rounds twice as many numbers of dw as the one before."""
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
    run.small(REVERSE_KL)
    student, teacher = (Head(case.tokens, hidden, case.vocab) for hidden in case.hidden)
    with slab_memory(run, student), slab_memory(run, teacher):
        for segment in pieces(case.vocab, slab_sizes.SEGMENT):
            width = length(segment)
            for rows, _ in zip(slabs(run, student, width), slabs(run, teacher, width), strict=True):
                run.logits(rows, width, 4 + 4, instructions("pair_states", ""))
    yield


def linear_divergence(run: Run, case: Case) -> Iterator[None]:
    """pair_chunks.divergences_by_chunks, kind jsd: the forward pass makes the gradients."""
    has_gradient = case.mode != "forward"
    student, teacher = (Head(case.active, hidden, case.vocab) for hidden in case.hidden)
    most = max(64, case.workspace // (2 * 4 * padded_columns(case.vocab)))
    parts = ceil(case.active / most)
    rows = ceil(case.active / parts)
    height = min(slab_sizes.round_up(rows, slab_sizes.ROW_PADDING), most)
    run.ways.append(f"{parts} chunks")
    run.small(DIVERGENCE, waits=1)
    gradients = 4 * (case.tokens * student.hidden + student.weight)
    if has_gradient:
        run.take(gradients)
        run.copies(gradients, 2)
    with run.memory(2 * 4 * height * padded_columns(case.vocab)):
        for piece in pieces(case.active, rows):
            run.small(DIVERGENCE_CHUNK + DIVERGENCE_GRADIENT * has_gradient)
            for head in (student, teacher):
                pair_logits(run, head.of(length(piece)), height)
            pair_passes(run, student.of(length(piece)), has_gradient=has_gradient)
            if has_gradient:
                pair_gradients(run, student.of(length(piece)))
    if has_gradient:
        yield
        run.small(DIVERGENCE_BACKWARD)
        scale_gradients(run, case, student)


def pair_logits(run: Run, head: Head, height: int) -> None:
    """Logits.of: the rows are gathered into an operand that is zero below them."""
    with run.memory(ITEM * (height * head.hidden + head.states)):
        run.copies(ITEM * (height * head.hidden + 4 * head.states), 3)
        for columns in pieces(head.vocab, pair_chunks.COLUMNS):
            run.product("logits", height, length(columns), head.hidden, 4)


def pair_passes(run: Run, head: Head, *, has_gradient: bool) -> None:
    """divergences_triton.divergences: passes over the logits of both models."""
    passes = [("pair_states", "", "", 4 + 4), ("pair_sums", "", "jsd", 4 + 4)]
    passes += [("pair_gradients", "fp32", "jsd", 4 + 4 + 4)] * has_gradient
    for kernel, writes, kind, moved in passes:
        for columns in pieces(head.vocab, slab_sizes.SEGMENT):
            run.logits(head.rows, length(columns), moved, instructions(kernel, writes, kind))


def pair_gradients(run: Run, head: Head) -> None:
    """Gradients.add: dz is rounded piece by piece, dx is copied to its rows."""
    with run.memory((ITEM + 4) * head.states):
        run.copies((2 * ITEM + 4 + 2 * 4) * head.states, 3)
        for columns in pieces(head.vocab, pair_chunks.COLUMNS):
            width = length(columns)
            with run.memory(ITEM * head.rows * width):
                run.copies((4 + ITEM) * head.rows * width)
                run.product("dX", head.rows, head.hidden, width, 4, add=True)
                run.product("dW", width, head.hidden, head.rows, 4, add=True)


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
    "linear_divergence": linear_divergence,
    "codistill_losses": codistill_losses,
}
