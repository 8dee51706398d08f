"""Tile sizes of the Triton kernels, by kind of GPU and operand dtype.

Chosen by what compiles without spilling (bench/results/ahead_of_time.csv); untimed.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    block_n: int
    """Tokens."""
    block_v: int
    """Vocabulary rows."""
    block_h: int
    """Terms of a sum of products at a time."""
    num_warps: int
    num_stages: int


HALVES = (torch.bfloat16, torch.float16)
# By compute capability (major; 0: the interpreter) and whether operands are 16 bits wide.
# Two programs of 128 x 64 fit on a multiprocessor: one multiplies while the other is in its
# epilogue.
LINEAR_TILES = {
    (0, False): Tile(block_n=64, block_v=256, block_h=64, num_warps=4, num_stages=1),
    (8, True): Tile(block_n=128, block_v=64, block_h=32, num_warps=8, num_stages=3),
    (9, True): Tile(block_n=128, block_v=64, block_h=64, num_warps=8, num_stages=4),
    (10, True): Tile(block_n=128, block_v=64, block_h=64, num_warps=8, num_stages=4),
    (8, False): Tile(block_n=64, block_v=32, block_h=16, num_warps=8, num_stages=3),
    (9, False): Tile(block_n=64, block_v=32, block_h=16, num_warps=4, num_stages=3),
    (10, False): Tile(block_n=64, block_v=32, block_h=16, num_warps=4, num_stages=3),
}
PAIR_TILES = {
    (0, False): Tile(block_n=64, block_v=256, block_h=64, num_warps=4, num_stages=1),
    (8, True): Tile(block_n=64, block_v=128, block_h=32, num_warps=8, num_stages=3),
    (9, True): Tile(block_n=128, block_v=64, block_h=64, num_warps=8, num_stages=3),
    (10, True): Tile(block_n=128, block_v=64, block_h=64, num_warps=8, num_stages=3),
    (8, False): Tile(block_n=32, block_v=64, block_h=16, num_warps=8, num_stages=3),
    (9, False): Tile(block_n=32, block_v=64, block_h=16, num_warps=8, num_stages=3),
    (10, False): Tile(block_n=32, block_v=64, block_h=16, num_warps=8, num_stages=3),
}
TILES_PER_SPLIT = 32  # vocabulary tiles whose states one program merges before it writes them
GROUP_N = 8  # token tiles that share a tile of the weight while it is in L2
BLOCK_COLUMNS = 1024  # of logits that are in memory


def tile_for(table: dict[tuple[int, bool], Tile], device: torch.device, dtype: torch.dtype) -> Tile:
    """The row of this GPU, or of the newest before it."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    is_half = dtype in HALVES
    return table[max(row for row, half in table if row <= major and half == is_half), is_half]
