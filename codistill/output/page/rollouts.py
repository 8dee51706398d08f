"""The rollouts that the page embeds, from samples/*.parquet."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from codistill.output.page.runs import Run, is_number

STEPS = 4
"""Rollouts are taken from so many of the newest steps, if there are as many; chosen, untested."""
DIGITS = 4
TOKEN_COLUMNS = {
    "texts": "token_texts",
    "ids": "token_ids",
    "small": "small_logps",
    "large": "large_logps",
    "engine": "engine_logps",
}
"""Name in the page -> column; runs of older versions have none of them."""

Rollout = dict[str, Any]


def read_rollouts(run: Run, limit: int) -> tuple[list[Rollout], list[str]]:
    """At most `limit` rollouts of a run, from its newest steps, and one line for each file that
    cannot be read.

    The first rollouts of each of STEPS steps, equally many: one step may have more than `limit`,
    and a step alone shows no progress.
    """
    rollouts: list[Rollout] = []
    notices = []
    files = sorted(run.folder.glob("samples/step_*.parquet"), reverse=True)[:STEPS]
    for place, file in enumerate(files):
        share = (limit - len(rollouts)) // (len(files) - place)
        try:
            rollouts += [rollout(run, file, row) for row in first_rows(file, share)]
        except (OSError, pyarrow.ArrowException, ValueError, KeyError) as error:
            notices.append(f"{file} is damaged: its rollouts are left out ({type(error).__name__})")
    return rollouts, notices


def first_rows(file: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a file, without reading all of it."""
    if count == 0:
        return []
    with pyarrow.parquet.ParquetFile(file) as parquet:
        batches = parquet.iter_batches(batch_size=count)
        return next(batches, pyarrow.record_batch({})).to_pylist()


def rollout(run: Run, file: Path, row: dict[str, Any]) -> Rollout:
    """A row of a file as the page's script takes it, every number finite or None."""
    own = {
        "run": run.name,
        "step": int(file.stem.removeprefix("step_")),
        "prompt": row["prompt"],
        "answer": row["answer"],
        "completion": row["completion"],
        "right": (row["accuracy"] or 0) > 0,
        "kept": row["kept"],
        "truncated": row["truncated"],
        "length": row["tokens"],
        "hint": row.get("hint_tokens") or 0,
        "reward": rounded(row.get("score", row["accuracy"])),
        "terms": {name: rounded(row[key]) for key, name in terms(row)},
    }
    tokens = {name: row[key] for name, key in TOKEN_COLUMNS.items() if row.get(key) is not None}
    return own | {name: [rounded(value) for value in values] for name, values in tokens.items()}


def terms(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Columns of a rollout's numbers, and what the page calls them."""
    for key in row:
        if key in ("accuracy", "format"):
            yield key, key
        elif key == "kd":
            yield key, "KD (nats)"
        elif key.startswith(("reward/", "advantage/")):
            kind, _, name = key.partition("/")
            yield key, name if kind == "reward" else f"advantage of {name}"


def rounded(value: Any) -> Any:
    """A float of few digits, None if it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return round(value, DIGITS) if math.isfinite(value) else None


def colour_limit(rollouts: list[Rollout]) -> float:
    """The log-ratio at which the colours of tokens end (nats, a multiple of 0.5, at most 5): 95 %
    of all tokens are within."""
    ratios = [
        abs(large - small)
        for row in rollouts
        for small, large in zip(row.get("small", ()), row.get("large", ()), strict=False)
        if is_number(small) and is_number(large)
    ]
    return min(5.0, max(0.5, np.ceil(2 * np.quantile(ratios, 0.95)) / 2)) if ratios else 1.0
