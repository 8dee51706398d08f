"""Experiments that tell why a GPU is not as fast as predicted. The most telling come first.

Each gives a number, the range that is expected, and what follows if the number is outside.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import codistill_kernels as kernels
from bench import exactness, ours
from bench.batch import Batch, make_batch
from bench.devices import device_named
from bench.findings import OK, Finding, holds, in_range
from bench.gold import REAL, SHARED, Inputs, Setting
from bench.measure import Runner, gpu_peak_mib, gpu_times
from bench.operations import OPERATIONS
from bench.shapes import head_shape
from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.chunks import Plan
from codistill_kernels._linear.products import fp32_sums, product
from codistill_kernels._linear.softmax_triton import STATES, segment_states
from codistill_kernels._linear.triton_backend import TritonChunks

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, SEGMENT = slab_sizes.ROWS, slab_sizes.SEGMENT
TOKENS, HIDDEN, VOCAB = 8192, 4096, 151936  # the larger goal
REPEATS = 10  # runs per round of what takes less than a millisecond
Bounds = tuple[float, float] | None
# Expected ranges by device.
SEGMENT_US = {"H200": (42.0, 52.0), "H100": (60.0, 74.0)}
WHOLE_MS = {"H200": (38.0, 46.5), "H100": (38.5, 47.5)}
COLUMNS_MS = {"H200": (52.0, 63.0), "H100": (53.0, 65.0)}


def here(ranges: dict[str, Bounds]) -> Bounds:
    """The range for this GPU, None if there is none."""
    device = device_named(torch.cuda.get_device_name())
    return ranges.get(device.name) if device else None


def hopper(low: float, high: float) -> Bounds:
    """A range for a product's time, which is the same on an H200 and an H100."""
    return here({"H200": (low, high), "H100": (low, high)})


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Gradients are made in this way, whatever the workspace. Empty: as the code chooses."""
    plan = Plan("kept" if name == SHARED else name, 0)
    with contextlib.ExitStack() as stack:
        if name:
            stack.enter_context(mock.patch.object(TritonChunks, "plan", lambda *_: plan))
            shares = lambda *_: name == SHARED  # noqa: E731
            stack.enter_context(mock.patch.object(slab_sizes, "shares_memory", shares))
        yield


# --- rates -------------------------------------------------------------------------------------


def randn(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(size, device="cuda", dtype=dtype)


def poisoned(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.full(size, torch.nan, device="cuda", dtype=dtype)


def milliseconds(run: Callable[[], object], out: Tensor, repeats: int = REPEATS) -> float:
    """Time on the GPU of a run, which must write all of `out`."""
    with fp32_sums:
        ms, _ = gpu_times(run, repeats=repeats)
    if not out.isfinite().all():
        raise AssertionError("an element of the output was not written, or is not finite")
    return ms


def copy_bytes_per_second(size: int) -> float:
    source = randn(size // 2)
    out = poisoned(size // 2)
    return 2e3 * size / milliseconds(lambda: out.copy_(source), out, 4)


def product_flops(rows: int, columns: int, inner: int) -> float:
    a, b, out = randn(rows, inner), randn(columns, inner), poisoned(rows, columns)
    return 2e3 * rows * columns * inner / milliseconds(lambda: torch.mm(a, b.T, out=out), out)


# --- experiments -------------------------------------------------------------------------------


def correctness() -> Iterator[Finding]:
    """The operation that all of the others are about; `first_contact` checks everything."""
    inputs = Inputs(REAL, Setting(BF16, torch.device("cuda"), "triton"))
    yield from exactness.check_linear_logps(inputs)


def slab_product() -> Iterator[Finding]:
    """The product that makes a slab of logits."""
    x, weight = randn(ROWS, HIDDEN), randn(SEGMENT, HIDDEN)
    out, rounded = poisoned(ROWS, SEGMENT, dtype=FP32), poisoned(ROWS, SEGMENT)
    ms = milliseconds(lambda: product(x, weight.T, out), out)
    baseline = milliseconds(lambda: torch.mm(x, weight.T, out=rounded), rounded)
    otherwise = "fp32 output is slow in cuBLAS: try a Triton product of 128 x 256 tiles"
    yield in_range("slab product, fp32 out", ms, "ms", hopper(0.33, 0.39), otherwise)
    yield in_range("slab product, rate of bf16 out", baseline / ms, "", (0.9, 1.1), otherwise)


def segment_pass() -> Iterator[Finding]:
    """The pass over a slab of logits, with and without exponentials that are kept."""
    slab = 2 * randn(ROWS, SEGMENT, dtype=FP32)
    states = torch.zeros((1, STATES, ROWS), dtype=FP32, device="cuda")
    ids = torch.randint(SEGMENT, (ROWS,), device="cuda")
    arguments = (slab, None, ids, torch.ones(ROWS, device="cuda"), 0.0, SEGMENT, 0, states)
    kept = poisoned(ROWS, SEGMENT)
    copied = copy_bytes_per_second(6 * slab.numel() // 2)
    otherwise = "bound by instructions: fewer of them, or 16 warps"
    ms = milliseconds(lambda: segment_states(*arguments, False, kept), kept)
    yield in_range("segment pass, exponentials kept", 1e3 * ms, "us", here(SEGMENT_US), otherwise)
    share = 6e3 * slab.numel() / ms / copied
    yield in_range("segment pass, share of a copy's rate", share, "", (0.9, 1.1), otherwise)
    ms = milliseconds(lambda: segment_states(*arguments, False), states)
    share = 4e3 * slab.numel() / ms / copied
    yield in_range("pass without exponentials, share of a copy", share, "", (0.85, 1.6), otherwise)


def gradient_products() -> Iterator[Finding]:
    """The two products that make the gradients from kept exponentials E."""
    e, weight = torch.rand((TOKENS, VOCAB), device="cuda", dtype=BF16), randn(VOCAB, HIDDEN)
    x, dw = randn(TOKENS, HIDDEN), poisoned(SEGMENT, HIDDEN)
    dx = poisoned(TOKENS, HIDDEN, dtype=FP32)
    otherwise = "a transposed E is slow: store E^T slab by slab"
    ms = milliseconds(lambda: product(e[:, :SEGMENT].T, x, dw), dw)
    yield in_range("dW of a segment, E_s^T x", ms, "ms", hopper(0.66, 0.76), otherwise)
    ms = milliseconds(lambda: product(e, weight, dx), dx, 2)
    otherwise = "a long sum is slow in cuBLAS: sum dX over pieces of the vocabulary"
    yield in_range("dX, E W", ms, "ms", hopper(12.6, 14.2), otherwise)


def whole() -> Iterator[Finding]:
    """The larger goal, beside the sum of its parts."""
    runner = larger_goal()
    total, _ = gpu_times(timed(runner, "kept"), rounds=5)
    otherwise = "compare with the parts"
    yield in_range("exponentials kept, larger goal", total, "ms", here(WHOLE_MS), otherwise)
    parts = sum_of_parts()
    otherwise = "the rest is gaps between launches, or work that is not counted"
    yield in_range("the same over the sum of its parts", total / parts, "", (0.95, 1.1), otherwise)
    columns, _ = gpu_times(timed(runner, "columns"), rounds=5)
    otherwise = "its pass writes dz, and each slab is made twice"
    yield in_range("by columns, larger goal", columns, "ms", here(COLUMNS_MS), otherwise)


def sum_of_parts() -> float:
    """Milliseconds of the products and passes of the larger goal, each measured alone."""
    found = {
        finding.what: float(finding.measured)
        for part in (slab_product, segment_pass, gradient_products)
        for finding in part()
    }
    slabs = TOKENS / ROWS * VOCAB / SEGMENT
    slab = found["slab product, fp32 out"] + found["segment pass, exponentials kept"] / 1e3
    dw = VOCAB / SEGMENT * found["dW of a segment, E_s^T x"]
    return slabs * slab + dw + found["dX, E W"]


def alignment() -> Iterator[Finding]:
    """Both gradient products with rows of logits that do not start at multiples of 16 bytes."""
    vocab = REAL.vocab
    x, weight = randn(ROWS, REAL.hidden), randn(vocab, REAL.hidden)
    dx, dw = poisoned(ROWS, REAL.hidden, dtype=FP32), poisoned(vocab, REAL.hidden)
    times = {}
    for width in (vocab, slab_sizes.padded_columns(vocab)):
        dz = torch.rand((ROWS, width), device="cuda", dtype=BF16)[:, :vocab]
        both = (
            milliseconds(lambda dz=dz: product(dz, weight, dx), dx, 2),
            milliseconds(lambda dz=dz: product(dz.T, x, dw), dw, 2),
        )
        times[width] = sum(both)
    unaligned, aligned = times.values()
    otherwise = "near 1, padding the rows of logits is cosmetic"
    ratio = unaligned / aligned
    yield in_range("products of unaligned over padded rows", ratio, "", (2, 5), otherwise)


def added_products() -> Iterator[Finding]:
    """The time of adding a chunk's part to the head's gradient, by tokens of the chunk."""
    dw = torch.zeros((VOCAB, HIDDEN), dtype=FP32, device="cuda")
    for rows, low, high in ((1024, 1.6, 2.0), (2048, 3.2, 3.7), (4096, 6.5, 6.9)):
        e, x = randn(rows, VOCAB), randn(rows, HIDDEN)
        ms = milliseconds(functools.partial(product, e.T, x, dw, add=True), dw, 2)
        otherwise = "decides the least number of tokens of a chunk, slab_sizes.FEW_ROWS"
        yield in_range(f"dW += E^T x of {rows} tokens", ms, "ms", hopper(low, high), otherwise)


def equal_bits() -> Iterator[Finding]:
    """The same bits again, and for some tokens alone, across the border of two slabs."""
    batch, some = larger_goal().batch, slice(ROWS - 512, ROWS + 512)
    whole, again = (kept_gradients(batch, slice(0, TOKENS)) for _ in range(2))
    alone = kept_gradients(batch, some)
    for name, result in whole.items():
        yield holds(f"{name}: same bits again", torch.equal(result, again[name]))
    yield holds("logps: rows of two slabs alone", torch.equal(whole["logps"][some], alone["logps"]))
    # Equal bits are not promised here: a product of fewer rows may split its sum.
    is_equal = torch.equal(whole["dX"][some], alone["dX"])
    verdict = OK if is_equal else "cuBLAS splits the sum: pad rows more"
    yield Finding("dX: 1024 rows alone", "yes" if is_equal else "no", "", "yes", verdict)


def kept_gradients(batch: Batch, rows: slice) -> dict[str, Tensor]:
    """Log-probabilities and gradients of these rows, from kept exponentials."""
    x = batch.hidden_states.detach()[rows].requires_grad_()
    weight = batch.weight.detach().requires_grad_()
    with way("kept"):
        logps = kernels.linear_logps(x, weight, batch.token_ids[rows])
        logps.backward(batch.upstream[rows])
    return {"logps": logps.detach(), "dX": x.grad, "dW": weight.grad}


def memory() -> Iterator[Finding]:
    """Peak memory of the larger goal in each way."""
    runner = larger_goal()
    for name, gib in (("kept", 3.73), (SHARED, 2.57), ("columns", 1.60)):
        peak = gpu_peak_mib(timed(runner, name), runner.batch) / 1024
        bounds = (0.97 * gib, 1.05 * gib)
        otherwise = "the allocator rounds up, or a copy is alive that was not counted"
        yield in_range(f"memory, {name}, larger goal", peak, "GiB", bounds, otherwise)


def larger_goal() -> Runner:
    batch = make_batch(head_shape("Qwen3-8B", TOKENS, is_cpu=False), BF16, torch.device("cuda"))
    return Runner(OPERATIONS["linear_policy_loss"], ours.linear_policy_loss, batch)


def timed(runner: Runner, name: str) -> Callable[[], None]:
    """Forward and backward pass in this way."""

    def run() -> None:
        with way(name):
            runner.both()

    return run


EXPERIMENTS = (
    correctness,
    slab_product,
    segment_pass,
    gradient_products,
    whole,
    alignment,
    added_products,
    equal_bits,
    memory,
)
