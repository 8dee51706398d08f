"""The numbers of one run, as they are kept: bench/results/study/TASK/METHOD/seed_K.json."""

import json
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pyarrow.parquet as pq

from codistill.files import read_rows, write_text
from codistill.versions import installed

KEPT = [
    "reward/accuracy",
    "reward/kept_accuracy",
    "reward/kd",
    "reward/zero_fraction",
    "rollout/mean_tokens",
    "rollout/truncated_fraction",
    "grad_norm/small",
    "grad_norm/large",
    "ratio/large_ess",
    "ratio/large_clip_fraction",
    "ratio/large_kl",
    "time/rollout",
    "time/hint",
    "time/score",
    "time/update_small",
    "time/update_large",
    "time/step",
]
"""Keys of metrics.jsonl that are kept for every step, where the run has them."""
KD_STD = "reward/kd_std"
"""Standard deviation of the KD rewards of a prompt's rollouts, mean over prompts (nats, α
included): a value per evaluation, from the rollouts that are kept in samples/."""
DIGITS = 5


@dataclass
class Record:
    """Numbers of one run."""

    method: str
    seed: int
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    """Every start: when, how it ended, seconds. A start without an end was killed."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Rows of evaluations.jsonl."""
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    """A value per step of each key of `KEPT`; None where it was not finite."""
    file: Path = field(default=Path(), repr=False)

    @classmethod
    def begin(
        cls, file: Path, method: str, seed: int, command: list[str], versions: dict[str, str]
    ) -> "Record":
        """Write down that the run was started."""
        record = read(file)
        record.method, record.seed = method, seed
        record.command, record.versions = " ".join(["python", *command]), versions
        record.starts.append({"at": datetime.now(UTC).isoformat(timespec="seconds")})
        record.write()
        return record

    def end(self, status: str, seconds: float) -> None:
        self.starts[-1] |= {"status": status, "seconds": round(seconds, 1)}
        self.write()

    def take(self, folder: Path) -> None:
        """Read the numbers of a finished run from its folder."""
        steps = read_rows(folder / "metrics.jsonl")
        self.metrics = {
            key: [None if row[key] is None else rounded(row[key]) for row in steps]
            for key in KEPT
            if key in steps[0]
        }
        if "reward/kd" in self.metrics:
            self.metrics[KD_STD] = [rounded(v) for v in kd_deviations(folder / "samples")]
        self.evaluations = [
            {key: rounded(value) for key, value in row.items()}
            for row in read_rows(folder / "evaluations.jsonl")
        ]

    @property
    def finished(self) -> bool:
        return bool(self.starts) and self.starts[-1].get("status") == "finished"

    @property
    def steps(self) -> int:
        """Steps of the run; 0 before it is finished."""
        return len(next(iter(self.metrics.values()), []))

    def summary(self) -> str:
        """One line for the terminal."""
        first, last = self.evaluations[0], self.evaluations[-1]
        parts = [
            f"{name} {first[name]:.1%} -> {last[name]:.1%}"
            for name in ("small", "large")
            if name in last
        ]
        return f"{', '.join(parts)}, {self.starts[-1]['seconds']:.0f} s"

    def write(self) -> None:
        content = asdict(self)
        del content["file"]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(content, indent=None, separators=(",", ":")) + "\n")


def read(file: Path) -> Record:
    """The record in a file; an empty one if there is none."""
    if not file.exists():
        return Record("", 0, file=file)
    return Record(**json.loads(file.read_text()), file=file)


def kd_deviations(samples: Path) -> list[float]:
    """`KD_STD` of each file of rollouts, in the order of steps."""
    found = []
    for file in sorted(samples.glob("*.parquet")):
        table = pq.read_table(file, columns=["prompt", "kd"]).to_pylist()
        groups = [list(rows) for _, rows in groupby(table, key=lambda row: row["prompt"])]
        found.append(mean(pstdev(row["kd"] for row in group) for group in groups))
    return found


def rounded(value: float) -> float:
    """`DIGITS` of a number; whole ones stay."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def versions() -> dict[str, str]:
    """What a run depends on: packages, and this repository's commit."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return installed() | {"commit": commit}
