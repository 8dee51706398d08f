"""Time slabs and the passes over them on this GPU, and propose faster constants.

    python -m bench tune --seconds 100

Nothing is changed. Constants that turn out faster are entered by hand in kernels/codistill_kernels:
ROWS and SEGMENT in slab_sizes.py, NUM_WARPS in softmax_triton.py. All times are written to
bench/results/<device>-tune.csv.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton

from bench import results
from bench.table import Table
from codistill_kernels._linear import products, slab_sizes, softmax_triton

ROWS = (2048, 4096, 8192)
SEGMENTS = (4096, 8192, 16384)
NUM_WARPS = (4, 8, 16, 32)
HIDDEN = (1536, 4096)  # Qwen2.5-Math 1.5B, Llama 3.1 8B
DTYPE = torch.bfloat16
# The passes of training: they read a slab of fp32 logits and write as many bf16 numbers.
PASSES = ("segment_states", "logit_gradients")
PRODUCT = "product"
Constants = tuple[int, int, int]  # ROWS, SEGMENT, NUM_WARPS


@dataclass(frozen=True)
class Candidate:
    """A product or a pass, with the constants that it is timed with."""

    step: str
    rows: int
    segment: int
    hidden: int | None = None
    """None for a pass."""
    num_warps: int | None = None
    """None for a product."""

    @property
    def bytes(self) -> int:
        """Bytes that are read and written."""
        logits = self.rows * self.segment
        if self.hidden is None:
            return (4 + DTYPE.itemsize) * logits
        return 4 * logits + DTYPE.itemsize * self.hidden * (self.rows + self.segment)

    @property
    def operations(self) -> int:
        """Floating-point operations of the product; 0 for a pass."""
        return 2 * self.rows * self.segment * (self.hidden or 0)


@dataclass(frozen=True)
class Row:
    """The time of a candidate."""

    device: str
    torch: str
    triton: str
    step: str
    rows: int
    segment: int
    hidden: int | None
    num_warps: int | None
    status: str
    """"ok", or why there are no figures."""
    median_ms: float | None = None
    gb_s: float | None = None
    tflops: float | None = None

    @property
    def picoseconds_per_logit(self) -> float:
        return 1e9 * self.median_ms / (self.rows * self.segment)


KEY = ("device", "step", "rows", "segment", "hidden", "num_warps")


def constants_now() -> Constants:
    """The constants that the kernels have at present."""
    return slab_sizes.ROWS, slab_sizes.SEGMENT, softmax_triton.NUM_WARPS


def choices() -> tuple[list[int], ...]:
    """Values of ROWS, SEGMENT and NUM_WARPS to try: the present one first, then the others."""
    every = zip(constants_now(), (ROWS, SEGMENTS, NUM_WARPS), strict=True)
    return tuple(list(dict.fromkeys((now, *others))) for now, others in every)


def candidates() -> Iterator[Candidate]:
    """All candidates. Those of the present constants come first, in case the run is cut off."""
    heights, segments, warps = choices()
    for rows, segment in itertools.product(heights, segments):
        yield from (Candidate(PRODUCT, rows, segment, hidden=hidden) for hidden in HIDDEN)
        if rows == heights[0]:  # passes take one program per row: they are timed at one height
            for number, step in itertools.product(warps, PASSES):
                yield Candidate(step, rows, segment, num_warps=number)


def call_of(candidate: Candidate, device: torch.device) -> Callable[[], None]:
    """The product or pass to time, on inputs that are made here."""
    rows, segment = candidate.rows, candidate.segment
    slab = torch.empty(rows, segment, device=device)
    if candidate.hidden is not None:
        x = torch.randn(rows, candidate.hidden, device=device, dtype=DTYPE)
        weight = torch.randn(segment, candidate.hidden, device=device, dtype=DTYPE)
        return lambda: products.product(x, weight.T, slab)
    slab.normal_()
    out = torch.empty(rows, segment, device=device, dtype=DTYPE)
    ids = torch.randint(0, segment, (rows,), device=device)
    token = ids, torch.ones(rows, device=device), 0.0, segment, 0
    if candidate.step == "segment_states":
        states = torch.empty(1, softmax_triton.STATES, rows, device=device)
        return lambda: softmax_triton.segment_states(slab, None, *token, states, False, out)
    numbers = torch.ones(3, rows, device=device)  # not zero: a row with coefficients 0 is skipped
    return lambda: softmax_triton.logit_gradients(slab, out, None, *token, numbers, numbers)


@contextmanager
def constants_of(candidate: Candidate) -> Iterator[None]:
    """The kernels launch with the candidate's SEGMENT and NUM_WARPS."""
    warps = candidate.num_warps or softmax_triton.NUM_WARPS
    with (
        mock.patch.object(slab_sizes, "SEGMENT", candidate.segment),
        mock.patch.object(softmax_triton, "NUM_WARPS", warps),
    ):
        yield


def milliseconds(candidate: Candidate) -> float:
    """Median time on this GPU; the slab is not in its cache at the start."""
    with constants_of(candidate), products.fp32_sums:
        call = call_of(candidate, torch.device("cuda"))
        return triton.testing.do_bench(call, return_mode="median")


def measure(candidate: Candidate, time_of: Callable[[Candidate], float]) -> Row:
    """Time a candidate; an error becomes the row's status. time_of: milliseconds of a candidate."""
    where = results.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    columns = (where["device"], where["torch"], where["triton"], *astuple(candidate))
    try:
        median = time_of(candidate)
    except Exception as error:  # the compiler, the launch or the memory failed: try the others
        lines = str(error).strip().splitlines() or [""]
        return Row(*columns, f"failed: {type(error).__name__}: {lines[0]}")
    tflops = candidate.operations / median / 1e9 if candidate.operations else None
    return Row(*columns, results.OK, median, candidate.bytes / median / 1e6, tflops)


def measure_all(time_of: Callable[[Candidate], float], path: Path, seconds: float) -> list[Row]:
    """Measure candidates until the time is up. Each row is written as soon as it is measured."""
    deadline = time.monotonic() + seconds
    todo, rows = list(candidates()), []
    table = Table(path, Row, KEY)
    table.write([])
    for candidate in todo:
        if time.monotonic() > deadline:
            print(f"{len(rows)} of {len(todo)} candidates in {seconds:g} s")
            break
        rows.append(measure(candidate, time_of))
        table.add(rows[-1:])
        print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: Row) -> str:
    """A row for a person to read."""
    width = f"{row.num_warps} warps" if row.hidden is None else f"hidden {row.hidden}"
    name = f"{row.step:16} {row.rows:5} x {row.segment:5} {width:12}"
    if row.status != results.OK:
        return f"{name} {row.status}"
    tflops = "" if row.tflops is None else f" {row.tflops:5.0f} TFLOP/s"
    return f"{name} {row.median_ms:7.4f} ms {row.gb_s:5.0f} GB/s{tflops}"


def totals(rows: list[Row]) -> dict[Constants, float]:
    """Picoseconds per logit that a product (mean over the hidden sizes) and both passes take
    together, for all constants for which all of them were measured; the fastest first."""
    found = {
        (row.step, row.rows, row.segment, row.hidden or row.num_warps): row.picoseconds_per_logit
        for row in rows
        if row.status == results.OK
    }
    sums = {}
    for height, segment, warps in itertools.product(*choices()):
        products = [found.get((PRODUCT, height, segment, hidden)) for hidden in HIDDEN]
        passes = [found.get((step, constants_now()[0], segment, warps)) for step in PASSES]
        if None not in (*products, *passes):
            sums[height, segment, warps] = sum(products) / len(products) + sum(passes)
    return dict(sorted(sums.items(), key=lambda item: item[1]))


def proposal(rows: list[Row]) -> list[str]:
    """Lines of text: the present constants, and the three fastest."""
    sums, now = totals(rows), constants_now()
    if not sums:
        return ["no constants with all of the product and the passes measured"]

    def line(constants: Constants) -> str:
        names = zip(("ROWS", "SEGMENT", "NUM_WARPS"), constants, strict=True)
        ratio = f" ({sums[constants] / sums[now] - 1:+.1%})" if now in sums else ""
        return ", ".join(f"{n} = {c}" for n, c in names) + f": {sums[constants]:.2f}{ratio}"

    present = line(now) if now in sums else "not measured"
    lines = ["picoseconds per logit, product and passes together", f"now       {present}"]
    return lines + [f"proposed  {line(constants)}" for constants in list(sums)[:3]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=100, help="time to stop after")
    parser.add_argument("--output", type=Path, help="default: bench/results/<device>-tune.csv")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds:g}")
    if not torch.cuda.is_available():
        print("bench tune must run on a GPU, found none", file=sys.stderr)
        return 2
    path = options.output or results.path_of(torch.device("cuda"), suffix="-tune")
    rows = measure_all(milliseconds, path, options.seconds)
    print(*proposal(rows), path, sep="\n")
    return 0
