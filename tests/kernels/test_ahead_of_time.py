"""Every Triton kernel compiles for every GPU of the table, into what it was written for."""

from itertools import product

import pytest
import torch
import triton

from bench import ahead_of_time
from bench.ahead_of_time import (
    CAPABILITIES,
    ENTROPY,
    KERNELS,
    KINDS,
    ODD_COLUMNS,
    ODD_ROWS,
    OPTIONS,
    PAIR_OPTIONS,
    SHARED_LIMIT_KIB,
    Variant,
    argument_type,
    compile_all,
    compile_kernel,
    constants,
    is_divisible,
    sizes_of,
    variants,
)
from codistill_kernels._linear import (
    exponentials_triton,
    slab_sizes,
    softmax_triton,
    triton_backend,
)
from codistill_kernels._linear.head import Head
from codistill_kernels._pair import divergences_triton, reverse_kl_triton

BYTES = {"bf16": 2, "fp32": 4, "": 0}
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64"}
# Loads and stores of single numbers in a kernel's source, without those of flags.
SINGLE = {
    "segment_states_kernel": (3, 4),
    "logit_gradients_kernel": (9, 0),
    "finish_exponentials_kernel": (5, 1),
    "pair_states_kernel": (2, 5),
    "pair_sums_kernel": (7, 3),
    "pair_gradients_kernel": (10, 0),
}
# The passes that training spends its time on: (kernel, writes, flags), and their most instructions
# per logit. At 19 for a pass that only reads, at 29 for one that writes bf16 besides, an H200 would
# wait for instructions, and no longer for memory.
MAIN = {
    ("segment_states_kernel", "bf16", "KEEP"): 21,
    ("segment_states_kernel", "bf16", "HAS_ENTROPY KEEP"): 24,
    ("segment_states_kernel", "", ""): 19,
    ("segment_states_kernel", "", "HAS_ENTROPY"): 22.5,
    ("logit_gradients_kernel", "bf16", ""): 20.5,
}


@pytest.fixture(scope="module")
def compiled():
    return compile_all()


@pytest.fixture(scope="module")
def table():
    return ahead_of_time.table().read()


@pytest.fixture
def same_triton(table):
    """Numbers of instructions are those of one Triton."""
    (recorded,) = {row.triton for row in table}
    if recorded.split(".")[:2] != triton.__version__.split(".")[:2]:
        pytest.skip(f"the table is of Triton {recorded}, this is {triton.__version__}")


def test_nothing_spills_and_all_fit(compiled):
    assert {row.capability for row in compiled} == set(CAPABILITIES)
    for row in compiled:
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes <= SHARED_LIMIT_KIB[row.capability] * 1024, row


def test_rows_move_in_accesses_of_16_bytes(compiled):
    """All bytes of rows that a thread must move; other accesses are of single numbers."""
    for row in compiled:
        if row.kernel == "merge_states_kernel":  # a few numbers per row: there is no row of logits
            continue
        flags = row.flags.split()
        models = 2 if row.kernel.startswith("pair") else 1
        loaded = models * row.logits_of_a_thread * BYTES[row.reads]
        stored = row.logits_of_a_thread * BYTES[row.writes]
        loads, stores = SINGLE[row.kernel]
        stores += ("KEEP" in flags) + ("HAS_SOFTCAP" in flags)
        if "HAS_BIAS" in flags:  # of the row, and of its target
            loaded += row.logits_of_a_thread * BYTES["fp32"]
            loads += 1
        if ODD_ROWS not in flags:  # what is written has padded rows: also behind odd columns
            assert row.wide_stored_bytes == stored and row.narrow_stores <= stores, row
            if ODD_COLUMNS not in flags:
                assert row.wide_loaded_bytes == loaded and row.narrow_loads <= loads, row


def test_instructions_are_not_more_than_in_the_table(compiled, table, same_triton):
    for row, recorded in zip(compiled, table, strict=True):
        assert row.instructions_per_logit <= 1.02 * recorded.instructions_per_logit, row


def test_instructions_of_the_main_kernels(compiled, same_triton):
    found = {
        (row.kernel, row.writes, row.flags): row.instructions_per_logit
        for row in compiled
        if (row.capability, row.reads) == (90, "fp32")
    }
    for main, most in MAIN.items():
        assert found[main] <= most, main


def test_table_names_these_kernels_and_variants(compiled, table):
    """Its registers are of one Triton version; which kernels and variants there are, is ours."""
    key_of = ahead_of_time.table().key_of
    assert [key_of(row) for row in table] == [key_of(row) for row in compiled]


class Launches:
    """In the place of a kernel: notes what it would be compiled for."""

    def __init__(self, name: str, found: set[Variant]) -> None:
        self.name, self.found = name, found

    def __getitem__(self, grid):
        return self.note

    def note(self, *positional, num_warps: int, **flags):
        arguments = dict(zip(KERNELS[self.name].arg_names, positional, strict=False)) | flags
        odd = {name for name, value in arguments.items() if is_odd(value)}
        parts = [arguments["KIND"]] if "KIND" in arguments else []
        parts += [name for name in (*OPTIONS, *PAIR_OPTIONS, ENTROPY) if arguments.get(name)]
        parts += [ODD_ROWS] if "stride_n" in odd else [ODD_COLUMNS] if "columns" in odd else []
        parts += ["KEEP"] if arguments.get("KEEP") else []
        reads, writes = (
            next((DTYPES[arguments[name].dtype] for name in names if name in arguments), "")
            for names in (
                ("logits_ptr", "student_ptr", "exponentials_ptr"),
                ("out_ptr", "exponentials_ptr"),
            )
        )
        if self.name == "merge_states_kernel":
            reads = writes = ""
        if self.name == "pair_gradients_kernel":  # in place
            writes = reads
        is_states = self.name == "segment_states_kernel" and "KEEP" not in parts
        variant = Variant(self.name, 90, reads, "" if is_states else writes, tuple(parts))
        for name, value in arguments.items():
            if name in flags:
                continue
            kind = argument_type(name, variant)
            assert not isinstance(value, torch.Tensor) or kind == f"*{DTYPES[value.dtype]}", name
            assert not (is_divisible(name, kind, variant) and name in odd), (name, variant)
        assert flags == constants(variant) and num_warps == sizes_of(variant)[1]
        self.found.add(variant)


def is_odd(value: object) -> bool:
    """Not divisible by 16, as Triton looks at arguments."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 != 0
    return isinstance(value, int) and value % 16 != 0


@pytest.fixture
def launches(monkeypatch):
    found: set[Variant] = set()
    modules = (divergences_triton, exponentials_triton, reverse_kl_triton, softmax_triton)
    for module in modules:
        for name in KERNELS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Launches(name, found))
    return found


def launch_all(dtype: torch.dtype, vocab: int, *, options: bool) -> None:
    """What the operations launch, of heads and of logits in `dtype`."""
    rows, hidden, softcap = 4, 16, 30.0 if options else 0.0
    x, weight = torch.zeros(rows, hidden, dtype=dtype), torch.zeros(vocab, hidden, dtype=dtype)
    ids, temperature = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
    head = Head(weight, torch.zeros(vocab) if options else None, temperature, softcap)
    numbers = torch.zeros(3, rows), torch.zeros(3, rows)
    chunks = triton_backend.TritonChunks(x, head, ids)
    for has_entropy in (False, True):
        chunks.statistics(has_entropy)
        exponentials_triton.Exponentials(chunks.x, chunks.head, ids, has_entropy=has_entropy)
    every = torch.arange(rows)
    assert chunks.hold(every).shape == (4, rows)
    chunks.gradients(every, *numbers, True, None, None)
    is_kept = dict(is_exact=True, has_entropy=True, needs_dw=True, workspace=0)
    kept = chunks.keep(every, vocab, **is_kept)
    kept.gradients(*numbers, [True, True, options], x, torch.float32)
    for db in (None, torch.zeros(vocab)) if options else (None,):
        gradients = torch.empty_like(x, dtype=torch.float32), None, db
        chunks.write_gradients(*numbers, True, *gradients, workspace=0)
    model = (x, weight, temperature, softcap)
    reverse_kl_triton.reverse_kl(model, model)
    head = Head(weight, None, temperature, softcap)
    raw, other = torch.zeros(2, rows, slab_sizes.padded_columns(vocab))[:, :, :vocab]
    for kind in KINDS:
        divergences_triton.divergences(raw, other, head, head, kind, 0.5, None, raw)
    logits = torch.zeros(rows, vocab, dtype=dtype)
    if dtype == torch.bfloat16 or not options:
        token = ids, temperature, softcap, vocab
        for has_entropy in (False, True) if not options and vocab % 16 == 0 else (False,):
            softmax_triton.logit_statistics(logits, *token, has_entropy)
        softmax_triton.logit_gradients(logits, logits, None, *token, 0, *numbers)


def test_variants_are_what_the_launchers_launch(launches):
    for dtype, odd in product((torch.bfloat16, torch.float32), (False, True)):
        launch_all(dtype, slab_sizes.SEGMENT + (17 if odd else 64), options=False)
    for dtype in (torch.bfloat16, torch.float32):
        launch_all(dtype, slab_sizes.SEGMENT, options=True)
    assert launches == {variant for variant in variants() if variant.capability == 90}


@pytest.mark.parametrize(
    "variant",
    [v for v in variants() if v.capability == 90 and v.is_aligned and v.flags != OPTIONS],
    ids=lambda variant: "-".join((variant.kernel, variant.reads, variant.writes, *variant.flags)),
)
def test_sizes_of_one_compile(variant):
    """Triton makes constants of them, which have not all that tensors have."""
    assert compile_kernel(variant, sizes_are_one=True).asm["cubin"]
