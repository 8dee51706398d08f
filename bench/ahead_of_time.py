"""What every Triton kernel compiles to for each GPU that it is meant for. Needs no GPU.

    python -m bench ahead_of_time

writes bench/results/ahead_of_time.csv: registers per thread, bytes of spilled registers and of
shared memory, instructions, and how the kernel reads and writes its row of logits.
"""

import argparse
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.table import Table
from codistill_kernels._linear import exponentials_triton, slab_sizes, softmax_triton
from codistill_kernels._pair import divergences, divergences_triton, reverse_kl_triton

TABLE = Path(__file__).parent / "results" / "ahead_of_time.csv"
CAPABILITIES = (80, 90, 100)
# Shared memory per thread block: CUDA C++ programming guide, table 30.
SHARED_LIMIT_KIB = {80: 163, 90: 227, 100: 227}
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        softmax_triton.segment_states_kernel,
        softmax_triton.merge_states_kernel,
        softmax_triton.logit_gradients_kernel,
        exponentials_triton.finish_exponentials_kernel,
        reverse_kl_triton.pair_states_kernel,
        divergences_triton.pair_sums_kernel,
        divergences_triton.pair_gradients_kernel,
    )
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE = 16  # bytes: the most that one load or store of a thread moved before sm_100
OPTIONS = ("HAS_BIAS", "HAS_SOFTCAP")
ENTROPY = "HAS_ENTROPY"
PAIR_OPTIONS = ("STUDENT_SOFTCAP", "TEACHER_SOFTCAP")
KINDS = tuple(divergences.DIVERGENCES)
NUMBERS = ("softcap", "student_softcap", "teacher_softcap", "jsd_weight", "log_odds")
# Flags for sizes that 16 does not divide. With such a vocabulary the last slab has odd columns, but
# its rows are padded; logits that the caller passes have rows of an odd stride.
ODD_COLUMNS, ODD_ROWS = "ODD_COLUMNS", "ODD_ROWS"


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and flags of one launch."""

    kernel: str
    capability: int
    reads: str
    writes: str
    flags: tuple[str, ...] = ()

    @property
    def is_aligned(self) -> bool:
        return ODD_COLUMNS not in self.flags and ODD_ROWS not in self.flags


@dataclass(frozen=True)
class Row:
    """What a variant compiles to."""

    kernel: str
    capability: int
    reads: str
    """Type of the logits or exponentials that it reads."""
    writes: str
    """Type of the exponentials or gradients that it writes; empty if it writes only states."""
    flags: str
    segment: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions_per_logit: float
    """Instructions of the program divided by the logits of a thread. For kernels on two models by
    pairs of logits, for merge_states_kernel by rows."""
    wide_loaded_bytes: int
    """Bytes per thread that loads of 16 bytes or more move."""
    wide_stored_bytes: int
    narrow_loads: int
    """Number of loads of less than 16 bytes: single numbers of the row, or logits one by one."""
    narrow_stores: int
    triton: str

    @property
    def logits_of_a_thread(self) -> int:
        return self.segment // (32 * self.warps)


# The columns that say what was compiled.
KEY = ("kernel", "capability", "reads", "writes", "flags", "segment", "warps")


def table(path: Path = TABLE) -> Table[Row]:
    return Table(path, Row, KEY)


def variants() -> Iterator[Variant]:
    """Every variant that the launchers launch."""
    # Each is (reads, writes, flags): first those of selective_logps, then those of slabs.
    of_slabs = [
        (*options, *entropy, *odd)
        for entropy in ((), (ENTROPY,))
        for options, odd in (((), ()), (OPTIONS, ()), ((), (ODD_COLUMNS,)))
    ]
    states = (
        *(("bf16", "", flags) for flags in ((), (ENTROPY,), ("HAS_SOFTCAP",), (ODD_ROWS,))),
        *(("fp32", "", flags) for flags in (*of_slabs, (ODD_ROWS,))),
        *(("fp32", out, (*flags, "KEEP")) for out in ("bf16", "fp32") for flags in of_slabs),
    )
    gradients = (
        *(("bf16", "bf16", flags) for flags in ((), ("HAS_SOFTCAP",), (ODD_ROWS,))),
        *(("fp32", "bf16", flags) for flags in ((), OPTIONS, (ODD_COLUMNS,))),
        *(("fp32", "fp32", flags) for flags in ((), OPTIONS, (ODD_ROWS,), (ODD_COLUMNS,))),
    )
    pairs = ((), PAIR_OPTIONS, (ODD_COLUMNS,))
    launches = {
        "segment_states_kernel": states,
        "merge_states_kernel": (("", "", ()),),
        "logit_gradients_kernel": gradients,
        "finish_exponentials_kernel": (("bf16", "bf16", ()), ("fp32", "fp32", ())),
        "pair_states_kernel": tuple(("fp32", "", flags) for flags in pairs),
        "pair_sums_kernel": tuple(
            ("fp32", "", (kind, *flags)) for kind in KINDS for flags in pairs
        ),
        "pair_gradients_kernel": tuple(
            ("fp32", "fp32", (kind, *flags)) for kind in KINDS for flags in pairs
        ),
    }
    for capability, (kernel, kinds) in itertools.product(CAPABILITIES, launches.items()):
        yield from (Variant(kernel, capability, *kind) for kind in kinds)


def constants(variant: Variant) -> dict[str, int | bool | str]:
    """Values of the kernel's constexpr parameters."""
    every = dict(
        SEGMENT=slab_sizes.SEGMENT,
        STATES=softmax_triton.STATES,
        BLOCK_N=softmax_triton.MERGED_ROWS,
    )
    every |= {name: name in variant.flags for name in (*OPTIONS, *PAIR_OPTIONS, ENTROPY, "KEEP")}
    if variant.kernel.startswith("pair"):
        every |= dict(KIND=next((kind for kind in KINDS if kind in variant.flags), ""))
    names = KERNELS[variant.kernel].arg_names
    return {name: value for name, value in every.items() if name in names}


def argument_type(name: str, variant: Variant) -> str:
    """Triton's name for the type of a parameter."""
    if name in ("token_ids_ptr", "rows_ptr", "target_column_ptr"):
        return "*i64"
    if name in ("logits_ptr", "student_ptr", "teacher_ptr"):
        return f"*{variant.reads}"
    if name in ("exponentials_ptr", "out_ptr"):
        return f"*{variant.writes or 'fp32'}"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in NUMBERS else "i32"


def is_divisible(name: str, kind: str, variant: Variant) -> bool:
    """Whether Triton compiles for a multiple of 16: pointers, and sizes that it may look at."""
    if name in {p.name for p in KERNELS[variant.kernel].params if p.do_not_specialize}:
        return False
    if ODD_ROWS in variant.flags and name in ("columns", "out_columns", "stride_n", "stride_out_n"):
        return False
    if ODD_COLUMNS in variant.flags and name == "columns":
        return False
    return kind == "i32" or kind.startswith("*")


def compile_kernel(variant: Variant, *, sizes_are_one: bool = False):
    """Compile a variant. sizes_are_one: for sizes and strides of 1, which Triton makes constant."""
    kernel = KERNELS[variant.kernel]
    types = {name: argument_type(name, variant) for name in kernel.arg_names}
    values = constants(variant)
    if sizes_are_one:
        never = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        sizes = {name for name, kind in types.items() if kind == "i32"} - never
        values = dict.fromkeys(sizes, 1) | values
    signature = {name: "constexpr" if name in values else kind for name, kind in types.items()}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in values.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(signature.items())
            if is_divisible(name, kind, variant)
        },
    )
    options = dict(num_warps=sizes_of(variant)[1], enable_fp_fusion=True)
    return triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=options)


def sizes_of(variant: Variant) -> tuple[int, int]:
    """Logits per program (rows for merge_states_kernel) and warps per program."""
    if variant.kernel == "merge_states_kernel":
        return softmax_triton.MERGED_ROWS, 1
    return slab_sizes.SEGMENT, softmax_triton.NUM_WARPS


def compile_variant(variant: Variant) -> Row:
    """Compile a variant and count what is in its machine code."""
    compiled = compile_kernel(variant)
    cubin = compiled.asm["cubin"]
    segment, warps = sizes_of(variant)
    registers, spilled = resources(cubin)
    opcodes = disassembled(cubin)
    loads = [width(code) for code in opcodes if re.match(r"LDG\b|LDGSTS\b", code)]
    stores = [width(code) for code in opcodes if re.match(r"STG\b", code)]
    return Row(
        variant.kernel,
        variant.capability,
        variant.reads,
        variant.writes,
        " ".join(variant.flags),
        segment,
        warps,
        registers,
        spilled,
        compiled.metadata.shared,
        round(len(opcodes) * 32 * warps / segment, 2),
        sum(size for size in loads if size >= WIDE),
        sum(size for size in stores if size >= WIDE),
        sum(size < WIDE for size in loads),
        sum(size < WIDE for size in stores),
        triton.__version__,
    )


def run_tool(cubin: bytes, name: str, *options: str) -> str:
    """What one of the CUDA tools that come with Triton prints about a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack: what did not fit into registers."""
    text = run_tool(cubin, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def disassembled(cubin: bytes) -> list[str]:
    """Opcodes of the program, without the NOPs that fill its end."""
    text = run_tool(cubin, "nvdisasm", "-c", "-ndf")  # labels of branches are not read
    # /*0a10*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", text, re.MULTILINE)
    return [code for code in found if code != "NOP"]


def width(opcode: str) -> int:
    """Bytes that a global load or store moves per thread, from opcodes such as LDG.E.128."""
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(found[1]) // 8 if found else 4


def compile_all() -> list[Row]:
    """All variants, compiled by as many processes as there are cores."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_variant, variants()))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench ahead_of_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=TABLE, help="default: %(default)s")
    options = parser.parse_args(arguments)
    rows = compile_all()
    table(options.output).write(rows)
    spilling = sum(row.spilled_bytes > 0 for row in rows)
    print(f"{options.output}: {len(rows)} kernels, {spilling} spill")
    return 0
