"""Measurements as rows: where they were made, of what, and the figures.

bench/results/<device>.csv holds the rows of one device. A row that is measured again takes the
place of the old one.
"""

import csv
import functools
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import triton

FOLDER = Path(__file__).parent / "results"
OK = "ok"


@dataclass(frozen=True)
class Row:
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
    """Peak beside the inputs; gradients and outputs count."""
    tflops: float | None = None
    """Of the products that the mathematics needs, over active tokens."""
    matmul_tflops: float | None = None
    """Of a matmul [N, H] x [H, V] measured beside it."""
    error: float | None = None
    """Against fp64, of the worst row of the outputs and gradients, relative."""
    roofline_ms: float | None = None
    """Of our implementation: what `bench.roofline` gives the path that it takes."""

    @property
    def roofline_share(self) -> float | None:
        """1: as fast as predicted."""
        return self.roofline_ms / self.median_ms if self.roofline_ms and self.median_ms else None

    @property
    def case(self) -> tuple:
        """What was measured, by whatever implementation, in whatever mode."""
        sizes = (self.tokens, self.hidden, self.vocab, self.inactive)
        return (self.device, self.operation, self.model, *sizes, self.dtype)

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        sizes = "x".join(str(size) for size in (self.tokens, self.hidden, self.vocab) if size)
        return f"{self.operation} {sizes}" + (
            f" {self.inactive:.0%} inactive" if self.inactive else ""
        )

    @property
    def key(self) -> tuple:
        return (*self.case, self.implementation, self.mode)

    @property
    def is_at_model_size(self) -> bool:
        """Not of a part of a model's vocabulary, which only shows growth."""
        return " / " not in self.model

    @property
    def is_ok(self) -> bool:
        return self.status == OK


TYPES = {
    field.name: float if "float" in str(field.type) else int if "int" in str(field.type) else str
    for field in fields(Row)
}

HEADER = [field.name for field in fields(Row)]
HEADERS = (HEADER, HEADER[:-1])  # the second: of tables without roofline_ms


def read(path: Path) -> list[Row]:
    """Raises ValueError if the file is no table of measurements."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames not in HEADERS:
            raise ValueError(f"{path} must be a table of measurements, got {reader.fieldnames}")
        return [
            Row(**{name: TYPES[name](text) if text else None for name, text in row.items()})
            for row in reader
        ]


def read_all(folder: Path = FOLDER) -> list[Row]:
    """Measurements of all devices; other tables in the folder are left out."""
    headers = [",".join(header) for header in HEADERS]
    tables = [path for path in sorted(folder.glob("*.csv")) if first_line(path) in headers]
    return [row for path in tables for row in read(path)]


def first_line(path: Path) -> str:
    with path.open() as file:
        return file.readline().strip()


def add(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a table, in the place of those with the same key."""
    table = {row.key: row for row in read(path)} if path.exists() else {}
    table |= {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for row in table.values():
            writer.writerow(map(as_text, astuple(row)))


def as_text(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else value


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """The first columns of a row."""
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
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    model = found[1].strip() if found else "CPU"
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """Short hash, with a + where files are changed; "unknown" outside a checkout."""
    here = output_of("git", "rev-parse", "--short", "HEAD")
    # Rows that are being written change nothing that is measured.
    paths = ("--", ":/", ":(top,exclude)bench/results", ":(top,exclude)README.md")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", *paths)
    return f"{here}+" if changed else here or os.environ.get("CODISTILL_COMMIT", "unknown")


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path_of(device: torch.device, suffix: str = "") -> Path:
    """Table of this device, in bench/results or where CODISTILL_RESULTS says."""
    folder = Path(os.environ.get("CODISTILL_RESULTS", FOLDER))
    return folder / f"{slug(environment(device)['device'])}{suffix}.csv"
