"""Time tiles of the Triton forward kernel on this GPU and propose rows of the tile table.

    python -m bench.tune

Nothing is changed: what is faster goes into kernels/codistill_kernels/_tiles.py by hand, with the
printed line as its source.
"""

import itertools
import sys
from unittest import mock

import torch
import triton

from codistill_kernels import _linear_triton
from codistill_kernels._head import Head
from codistill_kernels._tiles import LINEAR_TILES, Tile, tile_for

SHAPES = ((4096, 1536, 151936), (4096, 4096, 128256))  # N, H, V: Qwen2.5-Math 1.5B, Llama 3.1 8B
CANDIDATES = tuple(
    Tile(block_n=n, block_v=v, block_h=h, num_warps=warps, num_stages=stages)
    for n, v, h, warps, stages in itertools.product(
        (64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
    )
)


def milliseconds(tile: Tile, hidden_states: torch.Tensor, head: Head, ids: torch.Tensor) -> float:
    """Median time of the forward pass; infinite where the tile does not fit on the GPU."""
    with mock.patch.object(_linear_triton, "tile_for", lambda *_: tile):
        try:
            return triton.testing.do_bench(
                lambda: _linear_triton.linear_statistics(hidden_states, head, ids),
                return_mode="median",
            )
        except triton.runtime.errors.OutOfResources:
            return float("inf")


def main() -> int:
    if not torch.cuda.is_available():
        print("bench.tune must run on a GPU, found none", file=sys.stderr)
        return 2
    dtype = torch.bfloat16
    for rows, hidden, vocab in SHAPES:
        x = torch.randn(rows, hidden, device="cuda", dtype=dtype)
        weight = torch.randn(vocab, hidden, device="cuda", dtype=dtype) / hidden**0.5
        head = Head(weight, None, torch.ones(rows, device="cuda"), 0.0)
        ids = torch.randint(0, vocab, (rows,), device="cuda")
        times = {tile: milliseconds(tile, x, head, ids) for tile in CANDIDATES}
        now = milliseconds(tile_for(LINEAR_TILES, x.device, dtype), x, head, ids)
        print(f"{rows}x{hidden}x{vocab} {dtype}: {now:.2f} ms with the table's tile")
        for tile in sorted(times, key=times.__getitem__)[:5]:
            print(f"  {times[tile]:.2f} ms  {tile}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
