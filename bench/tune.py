"""Time tiles of the Triton forward kernel on this GPU and propose rows of the tile table.

    python -m bench tune --seconds 100

Nothing is changed: what is faster goes into kernels/codistill_kernels/_tiles.py by hand. All times
are in bench/results/<device>-tune.csv.
"""

import argparse
import csv
import itertools
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, fields
from pathlib import Path
from unittest import mock

import torch
import triton

from bench import results
from codistill_kernels import _linear_triton
from codistill_kernels._head import Head
from codistill_kernels._tiles import LINEAR_TILES, Tile, tile_for

SHAPES = ((4096, 1536, 151936), (4096, 4096, 128256))  # N, H, V: Qwen2.5-Math 1.5B, Llama 3.1 8B
DTYPE = torch.bfloat16
# In the order in which they are tried while there is time: the most work a byte of shared memory
# first, see the table's comment on what spills.
CANDIDATES = tuple(
    Tile(block_n=n, block_v=v, block_h=h, num_warps=warps, num_stages=stages)
    for (n, v, warps), h, stages in itertools.product(
        ((128, 256, 8), (128, 128, 8), (256, 128, 8), (128, 128, 4), (128, 64, 8), (64, 256, 8)),
        (64, 128),
        (3, 4, 2),
    )
)
COMPILERS = 8  # processes that fill Triton's cache


def inputs(rows: int, hidden: int, vocab: int) -> tuple[torch.Tensor, Head, torch.Tensor]:
    x = torch.randn(rows, hidden, device="cuda", dtype=DTYPE)
    weight = torch.randn(vocab, hidden, device="cuda", dtype=DTYPE) / hidden**0.5
    head = Head(weight, None, torch.ones(rows, device="cuda"), 0.0)
    return x, head, torch.randint(0, vocab, (rows,), device="cuda")


def milliseconds(tile: Tile, *arguments) -> float:
    """Median time of the forward pass; infinite where the tile does not fit on the GPU."""
    with mock.patch.object(_linear_triton, "tile_for", lambda *_: tile):
        try:
            return triton.testing.do_bench(
                lambda: _linear_triton.linear_statistics(*arguments), return_mode="median", rep=50
            )
        except triton.runtime.errors.OutOfResources:
            return float("inf")


def compile_tile(tile: Tile) -> None:
    """So that Triton finds it in its cache: sizes are no constants, one launch does for all."""
    with mock.patch.object(_linear_triton, "tile_for", lambda *_: tile):
        try:
            _linear_triton.linear_statistics(*inputs(256, 512, 1024))
        except triton.runtime.errors.OutOfResources:
            pass  # `milliseconds` says so


def row(tile: Tile) -> str:
    sizes = ", ".join(f"{field.name}={getattr(tile, field.name)}" for field in fields(tile))
    major = torch.cuda.get_device_capability()[0]
    return f"({major}, True): Tile({sizes}),"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=100, help="to stop after")
    parser.add_argument("--output", type=Path, help="default: bench/results/<device>-tune.csv")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench tune must run on a GPU, found none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    now = tile_for(LINEAR_TILES, torch.device("cuda"), DTYPE)
    tiles = list(dict.fromkeys((now, *CANDIDATES)))
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_tile, tiles)
        cases = [inputs(*shape) for shape in SHAPES]
        times: dict[Tile, list[float]] = {}
        for tile, _ in zip(tiles, compiled, strict=True):
            if time.monotonic() > deadline:
                print(f"{len(times)} of {len(tiles)} tiles tried")
                break
            times[tile] = [milliseconds(tile, *case) for case in cases]
        pool.shutdown(wait=False, cancel_futures=True)
    path = options.output or results.path_of(torch.device("cuda"), suffix="-tune")
    write(times, path)
    for index, shape in enumerate(SHAPES):
        best = sorted(times, key=lambda tile: times[tile][index])[:3]  # noqa: B023  (used at once)
        print(f"{'x'.join(map(str, shape))}: {times[now][index]:.2f} ms with the table's tile")
        for tile in best:
            print(f"  {times[tile][index]:.2f} ms  {row(tile)}")
    print(path)
    return 0


def write(times: dict[Tile, list[float]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        shapes = ["x".join(map(str, shape)) + "_ms" for shape in SHAPES]
        writer.writerow([*(field.name for field in fields(Tile)), *shapes])
        for tile, figures in times.items():
            writer.writerow([*astuple(tile), *map(results.as_text, figures)])
