"""What the terminal shows while a run goes on and at its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from codistill.output.summary import EVALUATIONS_AVERAGED

PHASES = ("rollout", "score", "update_small", "update_large", "sync")
ROWS = 12
"""How many steps the live table shows."""


class Progress:
    """A live table of the last steps in a terminal; one line per step anywhere else."""

    def __init__(self, console: Console, *, total_steps: int, first_step: int) -> None:
        self.console, self.total_steps = console, total_steps
        self.first_step, self.started = first_step, time.perf_counter()
        self.rows: list[list[str]] = []
        self.live: Live | None = None

    @contextmanager
    def show(self) -> Iterator[None]:
        """Show the live table, in a terminal, while the block runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=4) as self.live:
            yield

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers of a step that has ended, and how long the rest will take."""
        done = step - self.first_step + 1
        left = (self.total_steps - step) * (time.perf_counter() - self.started) / done
        position = f"step {step}/{self.total_steps}"
        eta = f"ETA {int(left) // 60}:{int(left) % 60:02d}"
        formats = {
            "accuracy": ("reward/accuracy", ".1%"),
            "KD reward": ("reward/kd", "+.4f"),
            "tokens": ("rollout/mean_tokens", ".1f"),
            **{phase.replace("_", " "): (f"time/{phase}", ".2f") for phase in PHASES},
            "tokens/s": ("tokens_per_second", ".0f"),
            "small MFU": ("mfu/small", ".0%"),
            "large MFU": ("mfu/large", ".0%"),
            "GiB": ("memory/step", ".1f"),
        }
        # An algorithm that trains one model has fewer numbers.
        cells = {
            name: format(numbers[key], form)
            for name, (key, form) in formats.items()
            if key in numbers
        }
        if self.live is None:
            texts = [position, *(f"{name} {value}" for name, value in cells.items()), eta]
            self.console.print("  ".join(texts), soft_wrap=True, highlight=False)
            return
        self.rows = [*self.rows, [str(step), *cells.values()]][-ROWS:]
        # Without edges and padding the table fits a terminal of 80 columns.
        table = Table(
            box=box.SIMPLE_HEAD, padding=0, caption=f"{position}, {eta}; times in seconds"
        )
        for name in ("step", *cells):
            table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        self.live.update(table)


def print_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """Print accuracy before and after training, what the run cost and where its files are."""
    table = Table(title="held-out accuracy", title_justify="left")
    for name in ("model", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name in summary:
        if name.partition("/")[0] not in ("small", "large"):
            continue
        before, after = summary[name]["before"], summary[name]["after"]
        change = f"{100 * (after - before):+.1f} points"
        table.add_row(name, f"{before:.1%}", f"{after:.1%}", change)
    console.print(table)
    count, minutes = summary["problems"], summary["seconds"] / 60
    console.print(
        f"{count} problems; after: mean of the last {EVALUATIONS_AVERAGED} evaluations or fewer; "
        f"{summary['steps']} steps, {minutes:.1f} minutes",
        soft_wrap=True,
        highlight=False,
    )
    files = {
        "curves.png": "curves",
        "metrics.jsonl": "the numbers of each step",
        "evaluations.jsonl": "held-out accuracy",
        "samples/": "rollouts (parquet)",
        f"export/step_{summary['steps']}/": "what was trained, in Hugging Face format",
        f"checkpoints/step_{summary['steps']}/": "what the run can go on from",
        "config.yaml": "the complete configuration",
    }
    for name, text in files.items():
        console.print(f"  {folder / name}  {text}", soft_wrap=True, highlight=False)
