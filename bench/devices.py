"""The highest rates of GPUs, and the time that products, passes over logits, copies and launches
take at these rates."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from codistill_kernels._linear import slab_sizes

# cuBLAS' usual tile on Hopper; a product takes whole waves of such tiles over the multiprocessors.
TILE = (128, 256)
SIDE = 8192  # rows, columns and inner size of the product that `Device.matmul` is measured with
# Assumptions that only a GPU can check.
ISSUE_SHARE = 0.7  # share of the issue slots that a pass with row reductions fills
EXPOSED = 0.35  # share of an fp32 read-modify-write that a product does not hide
LAUNCH = 4e-6  # s for a kernel's start and end, or for all of a kernel that works on [N] numbers
WAIT = 100e-6  # s that the GPU is idle after the host has waited for a number from it
LOAD = 0.3e-6  # s for a load from L2 whose result is the address of the next one


@dataclass(frozen=True)
class Device:
    """A GPU's highest rates."""

    name: str
    matmul: float
    """FLOP/s of cuBLAS on a bf16 product of SIDE^3."""
    copy: float
    """Bytes/s of a copy, bytes read and bytes written added up."""
    multiprocessors: int
    lanes: int = 128
    """fp32 lanes per multiprocessor."""
    clock: float = 1.75e9
    """Hz while the tensor cores are idle."""

    def fullness(self, m: int, n: int) -> float:
        """Share of the multiprocessors that the tiles of an [m, n] product keep busy. With less
        than a wave of tiles cuBLAS splits the inner size or takes smaller tiles: 0.5 at worst."""
        waves = ceil(m / TILE[0]) * ceil(n / TILE[1]) / self.multiprocessors
        return waves / ceil(waves) if waves > 1 else max(waves, 0.5)

    def product(self, m: int, n: int, k: int, *, out_bytes: int, add: bool = False) -> float:
        """Seconds for [m, k] x [k, n] in bf16; with `add` the result is added to what is there."""
        # The waves of the product that `matmul` was measured with were not full either.
        full = self.fullness(m, n) / self.fullness(SIDE, SIDE)
        compute = 2 * m * n * k / (self.matmul * full)
        move = (2 * (m + n) * k + out_bytes * m * n) / self.copy
        added = EXPOSED * 2 * out_bytes * m * n / self.copy if add else 0.0
        return max(compute, move) + added

    def logits(self, read: float, lanes: float, instructions: float) -> float:
        """Seconds for a pass that moves `read` bytes and runs so many instructions in each lane:
        whichever takes longer."""
        issue = self.multiprocessors * self.lanes * self.clock * ISSUE_SHARE
        return max(read / self.copy, lanes * instructions / issue)

    def chained_loads(self, rows: int, loads: int) -> float:
        """Seconds for one program per row whose loads wait for each other; four programs run on a
        multiprocessor at once."""
        return ceil(rows / (4 * self.multiprocessors)) * loads * LOAD


# Measured: torch.mm of 8192^3 random bf16 numbers reached 769 to 798 TFLOP/s on both GPUs; the
# rates of copies are those of 2 GiB. 132 multiprocessors: NVIDIA H100 white paper, SXM5.
MEASURED, MULTIPROCESSORS = 790e12, 132
H200 = Device("H200", MEASURED, 4.3e12, MULTIPROCESSORS)
H100 = Device("H100", MEASURED, 3.0e12, MULTIPROCESSORS)
# The H200's data sheet promises 989 dense bf16 TFLOP/s and 4.8 TB/s. Assumption: the GPUs below
# reach the same shares of what theirs promise.
OF_MATMUL, OF_COPY = H200.matmul / 989e12, H200.copy / 4.8e12
# DGX B200 data sheet: 2250 dense bf16 TFLOP/s and 8 TB/s per GPU; CUDA reports 148 multiprocessors.
# Its clock is not published: the H200's is used.
B200 = Device("B200", OF_MATMUL * 2250e12, OF_COPY * 8e12, 148)
# A100 80 GB SXM data sheet: 312 TFLOP/s, 2.039 TB/s; white paper: 108 multiprocessors of 64 fp32
# lanes, 1.41 GHz.
A100 = Device("A100", OF_MATMUL * 312e12, OF_COPY * 2.039e12, 108, lanes=64, clock=1.41e9)
DEVICES = {device.name: device for device in (H200, H100, B200, A100)}


def device_named(name: str) -> Device | None:
    """The device with this name from torch.cuda.get_device_name, e.g. "NVIDIA H100 80GB HBM3"; None
    if it is not known."""
    words = re.split(r"[^A-Za-z0-9]+", name)  # a "GH200" is no H200
    return next((device for key, device in DEVICES.items() if key in words), None)


class Run:
    """Adds up seconds by kind of work, and memory, while the functions of `bench.paths` walk along
    the code."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.ways: list[str] = []
        self.held = self.peak = 0
        self.restart()

    def restart(self) -> None:
        """Forget the time so far; what is held in memory stays."""
        self.parts: dict[str, float] = {}
        self.peak = self.held

    def spend(self, part: str, seconds: float) -> None:
        """Add time to a kind of work."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def small(self, launches: int, waits: int = 0) -> None:
        """Kernels on [N] numbers, and times that the host waits for the GPU."""
        self.spend("launches", launches * LAUNCH + waits * WAIT)

    def product(self, part: str, m: int, n: int, k: int, out_bytes: int, add: bool = False) -> None:
        """[m, k] x [k, n]; out_bytes: per element of the result; add: see `Device.product`."""
        self.spend(part, self.device.product(m, n, k, out_bytes=out_bytes, add=add))
        self.small(1)

    def logits(self, rows: int, columns: int, bytes_each: int, instructions: float) -> None:
        """A pass over logits, `bytes_each` read and written per logit. Programs work on whole
        segments, also where columns are fewer."""
        lanes = rows * slab_sizes.round_up(columns, slab_sizes.SEGMENT)
        self.spend("pass", self.device.logits(bytes_each * rows * columns, lanes, instructions))
        self.small(1)

    def copies(self, moved: float, launches: int = 1) -> None:
        """Copies that read and write so many bytes together."""
        self.spend("copies", moved / self.device.copy)
        self.small(launches)

    def take(self, size: int) -> None:
        """Allocate so many bytes; `give` frees them."""
        self.held += size
        self.peak = max(self.peak, self.held)

    def give(self, size: int) -> None:
        self.held -= size

    @contextmanager
    def memory(self, size: int) -> Iterator[None]:
        """Bytes that are held only meanwhile."""
        self.take(size)
        yield
        self.give(size)
