"""What every Triton kernel compiles to, for every GPU and tile of the table, without a GPU.

    python -m bench ahead_of_time

writes bench/results/ahead_of_time.csv: registers a thread, bytes of spilled registers, bytes of
shared memory, and which matrix instructions there are.
"""

import argparse
import csv
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from codistill_kernels import _linear_triton, _reverse_kl_triton, _softmax_triton
from codistill_kernels._tiles import BLOCK_COLUMNS, LINEAR_TILES, PAIR_TILES, Tile
from codistill_kernels._tiles import GROUP_N as TILES_IN_GROUP

TABLE = Path(__file__).parent / "results" / "ahead_of_time.csv"
CAPABILITIES = (80, 90, 100)
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SHARED_LIMIT_KIB = {80: 163, 90: 227, 100: 227}  # a block's, CUDA C++ programming guide, table 30
# In the order of preference: the first that occurs is what a kernel runs on.
INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync")
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        _linear_triton.linear_statistics_kernel,
        _reverse_kl_triton.reverse_kl_kernel,
        _softmax_triton.logit_statistics_kernel,
        _softmax_triton.logit_gradients_kernel,
    )
}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Variant:
    """A kernel as the launchers may launch it."""

    kernel: str
    capability: int
    dtype: torch.dtype
    flags: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Row:
    kernel: str
    capability: int
    dtype: str
    tile: str
    flags: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: str


def variants() -> Iterator[Variant]:
    for capability, dtype in itertools.product(CAPABILITIES, DTYPES):
        may_use_tma = capability >= 90 and dtype == torch.bfloat16
        for tma, options, store in itertools.product(
            (False, True) if may_use_tma else (False,), (False, True), (False, True)
        ):
            flags = dict(USE_TMA=tma, HAS_BIAS=options, HAS_SOFTCAP=options, STORE_RAW=store)
            yield Variant("linear_statistics_kernel", capability, dtype, tuple(flags.items()))
            if not (options or store):
                yield Variant("reverse_kl_kernel", capability, dtype, (("USE_TMA", tma),))
        flags = (("HAS_SOFTCAP", True),)
        yield Variant("logit_statistics_kernel", capability, dtype, flags)
        yield Variant("logit_gradients_kernel", capability, dtype, (*flags, ("SPLIT_TARGET", True)))


def tile_of(variant: Variant) -> Tile | None:
    tables = {"linear_statistics_kernel": LINEAR_TILES, "reverse_kl_kernel": PAIR_TILES}
    table = tables.get(variant.kernel)
    return table and table[variant.capability // 10, variant.dtype != torch.float32]


def constants(variant: Variant, tile: Tile | None) -> dict[str, int | bool]:
    flags = dict(variant.flags)
    if tile is None:
        return flags | dict(BLOCK_V=BLOCK_COLUMNS)
    blocks = dict(BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h)
    splits = dict(TILES_PER_SPLIT=_linear_triton.TILES_PER_SPLIT, GROUP_N=TILES_IN_GROUP)
    return flags | blocks | splits


def argument_type(name: str, variant: Variant, tile: Tile | None) -> str:
    operand = DTYPES[variant.dtype]
    if name.startswith(("x", "weight")):
        assert tile is not None
        rows = tile.block_n if name.startswith("x") else tile.block_v
        is_descriptor = dict(variant.flags)["USE_TMA"]
        return f"tensordesc<{operand}[{rows}, {tile.block_h}]>" if is_descriptor else f"*{operand}"
    # logit_statistics_kernel reads the caller's logits; logit_gradients_kernel writes operands.
    if (variant.kernel, name) in (
        ("logit_statistics_kernel", "logits_ptr"),
        ("logit_gradients_kernel", "out_ptr"),
    ):
        return f"*{operand}"
    if name.endswith("_ptr"):
        return "*i64" if name == "token_ids_ptr" else "*fp32"
    return "fp32" if name == "softcap" else "i32"


def compile_variant(variant: Variant) -> Row:
    tile = tile_of(variant)
    compiled = compile_kernel(variant, sizes_are_one=False)
    registers, spilled = resources(compiled.asm["cubin"])
    found = [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]]
    return Row(
        variant.kernel,
        variant.capability,
        DTYPES[variant.dtype],
        "x".join(map(str, astuple(tile))) if tile else str(BLOCK_COLUMNS),
        " ".join(name for name, on in variant.flags if on),
        registers,
        spilled,
        compiled.metadata.shared,
        found[0] if found else "",
    )


def compile_kernel(variant: Variant, *, sizes_are_one: bool):
    """sizes_are_one: as Triton compiles for sizes and strides of 1, which it makes constants."""
    kernel, tile = KERNELS[variant.kernel], tile_of(variant)
    types = {name: argument_type(name, variant, tile) for name in kernel.arg_names}
    values = constants(variant, tile)
    if sizes_are_one:
        never = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        sizes = {name for name, kind in types.items() if kind == "i32"} - never
        values = dict.fromkeys(sizes, 1) | values
    signature = {name: "constexpr" if name in values else kind for name, kind in types.items()}
    # What real shapes are: pointers, strides and hidden sizes on 16 elements.
    divisible = [
        (index,)
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.startswith(("stride", "hidden")))
    ]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in values.items()},
        attrs={index: [["tt.divisibility", 16]] for index in divisible},
    )
    launch = dict(num_warps=_softmax_triton.NUM_WARPS, enable_fp_fusion=True)
    if tile is not None:
        launch |= dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=launch)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: what did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOL), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text
    ).groups()
    return int(registers), int(stack) + int(local)


def compile_all() -> list[Row]:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_variant, variants()))


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser("python -m bench ahead_of_time", description=__doc__).parse_args(
        arguments
    )
    rows = compile_all()
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(map(astuple, rows))
    print(f"{TABLE}: {len(rows)} kernels, {sum(row.spilled_bytes > 0 for row in rows)} spill")
    return 0
