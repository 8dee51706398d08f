"""Ceilings of GPUs, and what products, passes over logits, copies and launches take under them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from codistill_kernels._linear import slab_sizes

# cuBLAS' usual tile on Hopper; a product takes whole waves of such tiles over the multiprocessors.
TILE = (128, 256)
SIDE = 8192  # of the product that `matmul` is measured with
# Assumptions that only a GPU can check.
ISSUE_SHARE = 0.7  # of the issue slots that a pass with row reductions fills
EXPOSED = 0.35  # share of an fp32 read-modify-write that a product does not hide
LAUNCH = 4e-6  # s: a kernel's start and end, or all of one that works on [N] numbers
WAIT = 100e-6  # s that the queue stays dry after the host has waited for a number of rows
LOAD = 0.3e-6  # s: a load from L2 that decides where the next one is


@dataclass(frozen=True)
class Device:
    name: str
    matmul: float
    """FLOP/s of cuBLAS, bf16, on a product of SIDE^3."""
    copy: float
    """Bytes/s, read and written."""
    multiprocessors: int
    lanes: int = 128
    """fp32 lanes of a multiprocessor."""
    clock: float = 1.75e9
    """Hz while the tensor cores rest."""

    def fullness(self, m: int, n: int) -> float:
        """How full the waves of a product are. Below a wave cuBLAS splits K or takes smaller
        tiles: half speed at worst."""
        waves = ceil(m / TILE[0]) * ceil(n / TILE[1]) / self.multiprocessors
        return waves / ceil(waves) if waves > 1 else max(waves, 0.5)

    def product(self, m: int, n: int, k: int, *, out_bytes: int, add: bool = False) -> float:
        """Seconds of [m, k] x [k, n], bf16; with `add` the fp32 result is added to."""
        # `matmul` was measured with waves that were not full either.
        full = self.fullness(m, n) / self.fullness(SIDE, SIDE)
        compute = 2 * m * n * k / (self.matmul * full)
        move = (2 * (m + n) * k + out_bytes * m * n) / self.copy
        added = EXPOSED * 2 * out_bytes * m * n / self.copy if add else 0.0
        return max(compute, move) + added

    def logits(self, read: float, lanes: float, instructions: float) -> float:
        """Seconds of a pass that moves so many bytes, or is bound by its instructions."""
        issue = self.multiprocessors * self.lanes * self.clock * ISSUE_SHARE
        return max(read / self.copy, lanes * instructions / issue)

    def chained_loads(self, rows: int, loads: int) -> float:
        """Seconds of a program a row with loads one after the other, four to a multiprocessor."""
        return ceil(rows / (4 * self.multiprocessors)) * loads * LOAD


# Measured with torch.mm of 8192^3 random bf16 numbers: 769 to 798 TFLOP/s on both; and with copies
# of 2 GiB. 132 multiprocessors: NVIDIA H100 white paper, SXM5.
MEASURED, MULTIPROCESSORS = 790e12, 132
H200 = Device("H200", MEASURED, 4.3e12, MULTIPROCESSORS)
H100 = Device("H100", MEASURED, 3.0e12, MULTIPROCESSORS)
# The H200's data sheet: 989 dense bf16 TFLOP/s, 4.8 TB/s. Assumed: the others reach its shares.
OF_MATMUL, OF_COPY = H200.matmul / 989e12, H200.copy / 4.8e12
# DGX B200 data sheet: 2250 dense bf16 TFLOP/s and 8 TB/s a GPU; 148 multiprocessors as CUDA reports
# them. No clock is published: that of the H200.
B200 = Device("B200", OF_MATMUL * 2250e12, OF_COPY * 8e12, 148)
# A100 80 GB SXM data sheet: 312 TFLOP/s, 2.039 TB/s; white paper: 108 multiprocessors of 64 fp32
# lanes, 1.41 GHz.
A100 = Device("A100", OF_MATMUL * 312e12, OF_COPY * 2.039e12, 108, lanes=64, clock=1.41e9)
DEVICES = {device.name: device for device in (H200, H100, B200, A100)}


def device_named(name: str) -> Device | None:
    """The device that torch.cuda.get_device_name calls so, e.g. "NVIDIA H100 80GB HBM3"."""
    return next((device for key, device in DEVICES.items() if key in name), None)


class Run:
    """Seconds by part and the peak of memory of a walk along the code."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.ways: list[str] = []
        self.held = self.peak = 0
        self.restart()

    def restart(self) -> None:
        self.parts: dict[str, float] = {}
        self.peak = self.held

    def spend(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def small(self, launches: int, waits: int = 0) -> None:
        self.spend("launches", launches * LAUNCH + waits * WAIT)

    def product(self, part: str, m: int, n: int, k: int, out_bytes: int, add: bool = False) -> None:
        self.spend(part, self.device.product(m, n, k, out_bytes=out_bytes, add=add))
        self.small(1)

    def logits(self, rows: int, columns: int, bytes_each: int, instructions: float) -> None:
        """A pass: its programs work on whole segments."""
        lanes = rows * slab_sizes.round_up(columns, slab_sizes.SEGMENT)
        self.spend("pass", self.device.logits(bytes_each * rows * columns, lanes, instructions))
        self.small(1)

    def copies(self, moved: float, launches: int = 1) -> None:
        self.spend("copies", moved / self.device.copy)
        self.small(launches)

    def take(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def give(self, size: int) -> None:
        self.held -= size

    @contextmanager
    def memory(self, size: int) -> Iterator[None]:
        self.take(size)
        yield
        self.give(size)
