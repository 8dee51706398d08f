"""Logits of a linear head in Triton: products on tensor cores, states from the accumulators.

One program goes through a split of the vocabulary for a tile of tokens and merges the states of its
tiles; the states of splits are merged by `merge_splits`. No [N, V] is written but for chunks whose
gradients are wanted. Splits, tiles and the order of sums depend on the vocabulary alone, so a row's
result does not depend on the other rows.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from codistill_kernels._head import Head
from codistill_kernels._softmax_torch import local_columns
from codistill_kernels._softmax_triton import (
    logit_gradients,
    merge_tile,
    scale,
)
from codistill_kernels._tiles import (
    GROUP_N,
    LINEAR_TILES,
    TILES_PER_SPLIT,
    Tile,
    tile_for,
)

# --- tiles -------------------------------------------------------------------------------------


@triton.jit
def load_tile(
    matrix,
    first_row,
    first_column,
    num_rows,
    num_columns,
    stride_row,
    USE_TMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_R, BLOCK_C] of a row-major matrix, a pointer or (TMA) a descriptor; 0 outside."""
    if USE_TMA:
        tile = matrix.load([first_row, first_column])
    else:
        rows = first_row + tl.arange(0, BLOCK_R)
        cols = first_column + tl.arange(0, BLOCK_C)
        mask = (rows < num_rows)[:, None] & (cols < num_columns)[None, :]
        at = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
        tile = tl.load(matrix + at, mask=mask, other=0.0)
    return tile


@triton.jit
def product_tile(
    x,
    weight,
    first_n,
    first_v,
    num_rows,
    vocab_size,
    hidden,
    stride_xn,
    stride_wv,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Raw logits [BLOCK_N, BLOCK_V] without the bias: fp32 sums, never rounded."""
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for h in range(0, hidden, BLOCK_H):
        x_tile = load_tile(x, first_n, h, num_rows, hidden, stride_xn, USE_TMA, BLOCK_N, BLOCK_H)
        w_tile = load_tile(
            weight, first_v, h, vocab_size, hidden, stride_wv, USE_TMA, BLOCK_V, BLOCK_H
        )
        # ieee: fp32 operands are not cut to TF32.
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def halves(tile, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tile.reshape([BLOCK_N, 2, BLOCK_V // 2]).permute(0, 2, 1))


@triton.jit
def my_tiles(num_rows, num_splits, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Token tile and vocabulary split of this program: GROUP_N token tiles go through the splits
    side by side, so that they find a weight tile in L2."""
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_rows, BLOCK_N)
    first = program // (GROUP_N * num_splits) * GROUP_N
    size = tl.minimum(num_tiles - first, GROUP_N)
    within = program % (GROUP_N * num_splits)
    return first + within % size, within // size


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def linear_statistics_kernel(
    x,
    weight,
    bias_ptr,
    token_ids_ptr,
    temperature_ptr,
    states_ptr,
    raw_ptr,
    num_rows,
    vocab_size,
    hidden,
    num_splits,
    stride_xn,
    stride_wv,
    stride_raw_n,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE_RAW: tl.constexpr,
    USE_TMA: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tile_n, split = my_tiles(num_rows, num_splits, GROUP_N, BLOCK_N)
    first_n = tile_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    target_column = tl.load(token_ids_ptr + offs_n, mask=mask_n, other=-1)
    temperature = tl.load(temperature_ptr + offs_n, mask=mask_n, other=1.0)
    maximum = tl.full([BLOCK_N], -float("inf"), tl.float32)
    rest = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    start = split * (TILES_PER_SPLIT * BLOCK_V)
    stop = tl.minimum(start + TILES_PER_SPLIT * BLOCK_V, vocab_size)
    for first_v in range(start, stop, BLOCK_V):
        raw = product_tile(
            x,
            weight,
            first_n,
            first_v,
            num_rows,
            vocab_size,
            hidden,
            stride_xn,
            stride_wv,
            USE_TMA,
            BLOCK_N,
            BLOCK_V,
            BLOCK_H,
        )
        # A quarter at a time: what the epilogue needs besides would not fit into the registers.
        left, right = halves(raw, BLOCK_N, BLOCK_V)
        quarter_0, quarter_1 = halves(left, BLOCK_N, BLOCK_V // 2)
        quarter_2, quarter_3 = halves(right, BLOCK_N, BLOCK_V // 2)
        for quarter in tl.static_range(4):
            if quarter == 0:
                part_raw = quarter_0
            elif quarter == 1:
                part_raw = quarter_1
            elif quarter == 2:
                part_raw = quarter_2
            else:
                part_raw = quarter_3
            first = first_v + quarter * (BLOCK_V // 4)
            local_v = tl.arange(0, BLOCK_V // 4)
            mask_v = first + local_v < vocab_size
            if HAS_BIAS:
                part_raw += tl.load(bias_ptr + first + local_v, mask=mask_v, other=0.0)[None, :]
            if STORE_RAW:
                # 64 bits for the tile's start, 32 within, and whole tiles: pointers and masks would
                # take as many registers as the logits.
                start_ptr = raw_ptr + first_n.to(tl.int64) * stride_raw_n + first
                at = tl.arange(0, BLOCK_N)[:, None] * stride_raw_n + local_v[None, :]
                tl.store(start_ptr + at, part_raw)
            z = scale(part_raw, softcap, temperature[:, None], HAS_SOFTCAP)
            is_target = (first + local_v)[None, :] == target_column[:, None]
            target += tl.sum(tl.where(is_target & mask_v[None, :], z, 0.0), axis=1)
            z = tl.where(mask_v[None, :], z, -float("inf"))
            maximum, rest, weighted = merge_tile(maximum, rest, weighted, z)
    # states: [4, splits, N]
    at = states_ptr + split.to(tl.int64) * num_rows + offs_n
    part = num_splits.to(tl.int64) * num_rows
    tl.store(at, maximum, mask=mask_n)
    tl.store(at + part, rest, mask=mask_n)
    tl.store(at + 2 * part, weighted, mask=mask_n)
    tl.store(at + 3 * part, target, mask=mask_n)


# --- launchers ---------------------------------------------------------------------------------


def as_operands(hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of stride 1, of one dtype: fp32 where they differ."""
    if hidden_states.dtype != weight.dtype or weight.dtype == torch.float64:
        hidden_states, weight = hidden_states.float(), weight.float()
    return tuple(t if t.stride(1) == 1 else t.contiguous() for t in (hidden_states, weight))


def fits_tma(*operands: Tensor) -> bool:
    """Descriptors want compute capability 9, rows and the start on 16 bytes. fp32 products are not
    bound by loads."""
    return all(
        t.is_cuda
        and t.element_size() == 2
        and torch.cuda.get_device_capability(t.device)[0] >= 9
        and t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        for t in operands
    )


def descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    block = [block_rows, block_columns]
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def num_splits(vocab: int, tile: Tile) -> int:
    return triton.cdiv(vocab, tile.block_v * TILES_PER_SPLIT)


def blocks_of(tile: Tile) -> dict[str, int]:
    """The constants and launch options that both kernels take from the table."""
    return dict(
        TILES_PER_SPLIT=TILES_PER_SPLIT,
        GROUP_N=GROUP_N,
        BLOCK_N=tile.block_n,
        BLOCK_V=tile.block_v,
        BLOCK_H=tile.block_h,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def linear_statistics(hidden_states: Tensor, head: Head, token_ids: Tensor) -> Tensor:
    """[4, N]"""
    return launch_statistics(hidden_states, head, token_ids, keep=False)[0]


def launch_statistics(
    hidden_states: Tensor, head: Head, token_ids: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """[4, N], and with `keep` the raw logits x . w + bias, [N, V] fp32, else an empty tensor."""
    x, weight = as_operands(hidden_states, head.weight)
    rows, vocab = len(x), len(weight)
    tile = tile_for(LINEAR_TILES, x.device, x.dtype)
    splits = num_splits(vocab, tile)
    states = torch.empty((4, splits, rows), dtype=torch.float32, device=x.device)
    shape = (
        tile.block_n * triton.cdiv(rows, tile.block_n),
        tile.block_v * triton.cdiv(vocab, tile.block_v),
    )
    raw = states.new_empty(shape if keep else (0, 0))
    use_tma = fits_tma(x, weight)
    if rows:
        linear_statistics_kernel[(triton.cdiv(rows, tile.block_n) * splits,)](
            descriptor(x, tile.block_n, tile.block_h) if use_tma else x,
            descriptor(weight, tile.block_v, tile.block_h) if use_tma else weight,
            states if head.bias is None else head.bias.float().contiguous(),
            token_ids.contiguous(),
            head.temperature.contiguous(),
            states,
            raw if keep else states,
            rows,
            vocab,
            x.shape[1],
            splits,
            x.stride(0),
            weight.stride(0),
            raw.stride(0),
            head.softcap,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap != 0,
            STORE_RAW=keep,
            USE_TMA=use_tma,
            **blocks_of(tile),
        )
    return merge_splits(states), raw[:rows, :vocab]


def merge_splits(states: Tensor) -> Tensor:
    """[4, N] from the states [4, splits, N] of disjoint ranges."""
    maximum, rest, weighted, target = states
    largest, at = maximum.max(dim=0, keepdim=True)
    shift = torch.where(maximum == largest, 0.0, maximum - largest)
    factor = torch.where(maximum == -torch.inf, 0.0, shift.exp())
    weighted = factor * (torch.where(factor == 0, 0.0, shift) * (1 + rest) + weighted)
    # Of the split that holds the maximum only the rest: 1 + rest - 1 would round it.
    parts = (factor * (1 + rest)).scatter(0, at, rest.gather(0, at))
    return torch.stack((largest.squeeze(0), parts.sum(0), weighted.sum(0), target.sum(0)))


class TritonChunks:
    """Raw logits x . w + bias of one chunk of rows at a time."""

    BUFFERS = 2  # [R, V] fp32 alive at once: raw logits and their gradient, at most as wide
    FEW_ROWS = 0

    def __init__(self, hidden_states: Tensor, head: Head, token_ids: Tensor) -> None:
        self.hidden_states, self.token_ids = hidden_states, token_ids
        # Once, where every launch would convert them.
        self.x, self.weight = as_operands(hidden_states, head.weight)
        self.head = replace(head, weight=self.weight)

    def statistics(self) -> Tensor:
        """[4, N] of all rows, none of them held."""
        return linear_statistics(self.x, self.head, self.token_ids)

    def hold(self, rows: Tensor) -> Tensor:
        """Keep the raw logits of these rows; their statistics [4, R]."""
        self.rows = rows
        head, ids = self.head.of_rows(rows), self.token_ids[rows]
        statistics, self.raw = launch_statistics(self.x[rows], head, ids, keep=True)
        return statistics

    def weight_gradients(self) -> Tensor:
        """Zeros for `gradients` to add to."""
        return torch.zeros(self.weight.shape, dtype=torch.float32, device=self.x.device)

    def gradients(
        self,
        kept: Tensor,
        coefficients: Tensor,
        log_softmax: Tensor,
        needs_hidden: bool,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor | None:
        """dx [K, H] of rows `kept` of those held, which ends their being held; adds to dw, db."""
        rows = self.rows[kept]
        ids, x = self.token_ids[rows], self.x[rows]
        raw = self.raw if len(kept) == len(self.raw) else self.raw[kept]
        dz = torch.empty(raw.shape, dtype=x.dtype, device=x.device)
        at_target = torch.zeros(len(rows), dtype=torch.float32, device=x.device)
        logit_gradients(
            raw,
            dz,
            ids,
            self.head.temperature[rows],
            self.head.softcap,
            raw.shape[1],
            coefficients,
            log_softmax,
            at_target,
        )
        self.raw = None
        here, _ = local_columns(ids, len(self.weight))
        at_target = at_target[:, None]  # 0 where the token is not here
        if db is not None:
            db += dz.sum(dim=0, dtype=torch.float32)
            db.index_put_((here,), at_target.squeeze(1), accumulate=True)
        if dw is not None:
            add_product(dw, dz.T, x)
            # index_put_, unlike index_add_, adds in the same order each time.
            dw.index_put_((here,), at_target * x, accumulate=True)
        if not needs_hidden:
            return None
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        add_product(dx, dz, self.weight)
        return dx.addcmul_(at_target, self.weight[here].float())


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in fp32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
