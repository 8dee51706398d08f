"""The folder that the command eval writes: settings.json, one file for each finished seed of a
model and a set, and what they come to in results.json and table.md."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from codistill import distributed, files
from codistill.config import ConfigError
from codistill.config.changes import flatten

SETTINGS = "settings.json"
COLUMNS = pa.schema(
    {
        "number": pa.int64(),  # of the problem, from 0
        "problem": pa.string(),
        "gold": pa.string(),
        "completion": pa.string(),
        "answer": pa.string(),  # null: none was found
        "correct": pa.bool_(),
        "tokens": pa.int64(),
        "truncated": pa.bool_(),
    }
)
"""A row for each problem."""


def check_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the folder's results have, with those of sets that are new.

    Raises:
        ConfigError: a setting, or the file of a set of this name, is not as it was.
    """
    before = files.read_object(folder / SETTINGS)
    old, new = flatten(before), flatten(settings)
    for key in sorted(old.keys() | new.keys() if before else ()):
        is_set = key.startswith("data.")
        if old.get(key) != new.get(key) and not (is_set and (key not in old or key not in new)):
            raise ConfigError(
                f"{key} = {new.get(key)!r}: expected {old.get(key)!r} as in {folder / SETTINGS}, "
                "to go on there, or another folder as output"
            )
    return settings | {"data": before.get("data", {}) | settings["data"]}


def write_json(path: Path, content: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def seed_file(folder: Path, model: str, name: str, seed: int) -> Path:
    """The file of a seed. model: the name of the model's folder; name: of the set."""
    return folder / "rows" / model / name / f"seed_{seed}.parquet"


def write_seed(path: Path, rows: list[dict[str, Any]], *, failures: int, timeouts: int) -> None:
    """Write a finished seed, whole.

    failures, timeouts: how many completions grading failed on, and took too long for.
    """
    counts = {"failures": str(failures), "timeouts": str(timeouts)}
    table = pa.Table.from_pylist(rows, schema=COLUMNS.with_metadata(counts))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, lambda unfinished: pyarrow.parquet.write_table(table, unfinished))


def read_seed(path: Path) -> pa.Table:
    return pyarrow.parquet.read_table(path)


def is_finished(path: Path) -> bool:
    """Whether the first process has the file of a seed, and can read it. Collective, so that all
    processes do the same seeds."""
    found = distributed.is_first() and path.is_file()
    try:
        found = found and pyarrow.parquet.read_metadata(path).num_rows > 0
    except (OSError, pa.ArrowException):
        message = "%s: cannot be read, is written again"
        logging.getLogger(__name__).warning(message, path)
        found = False
    return distributed.totals([int(found)]) == [1]
