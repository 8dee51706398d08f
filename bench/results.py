"""Rows of measurements: where they were made, what was measured, and the figures.

bench/results/<device>.csv holds the rows of one device. A row that is measured again replaces the
old one.
"""

import functools
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from bench.table import Table

FOLDER = Path(__file__).parent / "results"
OK = "ok"
# The columns that say what was measured; the rest of the key says how.
CASE = ("device", "operation", "model", "tokens", "hidden", "vocab", "inactive", "dtype")
KEY = (*CASE, "implementation", "mode")


@dataclass(frozen=True)
class Row:
    """One implementation of one operation, on one case in one mode (forward, backward or both)."""

    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    operation: str
    model: str
    tokens: int
    hidden: int
    vocab: int
    inactive: float
    dtype: str
    implementation: str
    version: str
    mode: str
    status: str
    """"ok", or why there are no figures."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    extra_mib: float | None = None
    """Peak memory beside the inputs; gradients and outputs count."""
    tflops: float | None = None
    """Rate of the products that the mathematics needs, over active tokens."""
    matmul_tflops: float | None = None
    """Rate of a matmul [N, H] x [H, V] that was measured directly before."""
    error: float | None = None
    """Largest relative error of a row of the outputs and gradients, against fp64."""
    roofline_ms: float | None = None
    """For our implementation alone: the time that `bench.roofline` predicts for its path."""

    @property
    def roofline_share(self) -> float | None:
        """Predicted over measured time: 1 is as fast as predicted."""
        return self.roofline_ms / self.median_ms if self.roofline_ms and self.median_ms else None

    @property
    def case(self) -> tuple:
        """What was measured, whatever the implementation and the mode."""
        return tuple(getattr(self, name) for name in CASE)

    @property
    def title(self) -> str:
        """The operation and its sizes in a line."""
        sizes = "x".join(str(size) for size in (self.tokens, self.hidden, self.vocab) if size)
        return f"{self.operation} {sizes}" + (
            f" {self.inactive:.0%} inactive" if self.inactive else ""
        )

    @property
    def is_at_model_size(self) -> bool:
        """Whether the vocabulary is a model's; a part of one only shows growth."""
        return " / " not in self.model

    @property
    def is_ok(self) -> bool:
        return self.status == OK

    @property
    def is_ours(self) -> bool:
        """Whether it is made of this project's kernels alone, in whatever combination."""
        return self.implementation.startswith("codistill")


def table(path: Path) -> Table[Row]:
    """The measurements in this file."""
    return Table(path, Row, KEY)


def read_all(folder: Path = FOLDER) -> list[Row]:
    """Measurements of all devices; other tables in the folder are left out."""
    tables = [table(path) for path in sorted(folder.glob("*.csv"))]
    return [row for found in tables if found.is_there() for row in found.read()]


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """The first columns of a row: device, driver, versions of torch and triton, commit."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(), output_of("nvidia-smi", *DRIVER).split("\n")[0]
    else:
        name, driver = cpu_name(), torch.backends.cpu.get_cpu_capability()
    return dict(
        device=name,
        driver=driver,
        torch=torch.__version__,
        triton=triton.__version__,
        commit=commit(),
    )


DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader")


def cpu_name() -> str:
    """Model of the processor and the number of cores that this process sees."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    model = found[1].strip() if found else "CPU"
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """Short hash, with a + where tracked files are changed; outside a checkout CODISTILL_COMMIT, or
    "unknown"."""
    here = output_of("git", "rev-parse", "--short", "HEAD")
    # What a benchmark writes changes nothing that is measured.
    paths = ("--", ":/", ":(top,exclude)bench/results", ":(top,exclude)README.md")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", *paths)
    return f"{here}+" if changed else here or os.environ.get("CODISTILL_COMMIT", "unknown")


def output_of(*command: str) -> str:
    """What a command prints; empty if it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(name: str) -> str:
    """A device's name as a file name: "AMD EPYC, 2 cores" becomes amd-epyc-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path_of(device: torch.device, suffix: str = "") -> Path:
    """A table of this device, in the folder CODISTILL_RESULTS or else in bench/results."""
    folder = Path(os.environ.get("CODISTILL_RESULTS", FOLDER))
    return folder / f"{slug(environment(device)['device'])}{suffix}.csv"
