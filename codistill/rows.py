"""Files of rows, in the forms that people keep problems in."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from codistill.config import ConfigError, require
from codistill.config.base import printable
from codistill.downloads import is_lfs_pointer

KINDS = (
    "a .jsonl, .json or .csv file, which may be a .gz, a .parquet file, a folder of .parquet or "
    ".jsonl files, or one that datasets saved"
)
PARTS = (".parquet", ".jsonl", ".jsonl.gz")
"""Endings of the files that a folder is read for."""
PART_OF_SET = re.compile(r"(.+?)-\d+-of-\d+\.")
"""How datasets and the Hub name the parts of a set: train-00000-of-00002.parquet."""

SETS, STATE = SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that datasets saved."""

UNREADABLE = (
    *(EOFError, KeyError, OSError, TypeError, ValueError),
    *(csv.Error, pa.ArrowException, zlib.error),
)
"""What the libraries raise for a file that is not what its name says."""


def read_rows(key: str, path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json, .csv or .parquet file or of a folder that `Dataset.save_to_disk`
    wrote.

    Raises:
        ConfigError: the file is missing or cannot be read.
    """
    reader = read_arrow if path.is_dir() else reader_of(path)
    if reader is None:
        raise ConfigError(f"{key} = {str(path)!r}: expected {KINDS}")
    require(path.is_dir() or path.is_file(), key, str(path), "a file that exists")
    expected = "the file itself: it is a Git LFS pointer (git lfs pull fetches it)"
    require(not is_lfs_pointer(path), key, str(path), expected)
    try:
        rows = reader(path)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is no object with fields")
        return rows
    except RecursionError as error:
        raise ConfigError(f"{key} = {str(path)!r}: expected rows of few levels") from error
    except UNREADABLE as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{key} = {str(path)!r}: expected rows of problems: {message}") from error


def parts_of(key: str, path: Path) -> list[Path]:
    """The files of a folder of .parquet or .jsonl files, by name; else the path alone.

    Raises:
        ConfigError: the files are of several sets, such as train and test.
    """
    if not path.is_dir() or any((path / name).exists() for name in SAVED):
        return [path]
    parts = sorted(
        file
        for file in path.iterdir()
        if file.name.lower().endswith(PARTS) and not file.name.startswith(".")
    )
    matches = [PART_OF_SET.match(part.name) for part in parts]
    sets = sorted({match.group(1) for match in matches if match})
    require(
        len(sets) <= 1,
        key,
        str(path),
        f"a folder of one set, found {printable(', '.join(sets))}: name the files in a list",
    )
    return parts or [path]


def reader_of(path: Path) -> Callable[[Path], list] | None:
    """What reads a file of this name; None if nothing does."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return read_parquet
    readers = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv}
    return readers.get(Path(name.removesuffix(".gz")).suffix)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, compressed by gzip or not, without a byte order mark."""
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8: {error}") from error


def read_jsonl(path: Path) -> list:
    return rows_of_lines(read_text(path))


def rows_of_lines(text: str) -> list:
    """The rows of a text with one JSON object per line."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def read_json(path: Path) -> list:
    """The rows of a file with a list of objects, with one object on many lines, or with one object
    per line as in .jsonl: such files are often named .json too."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return json.loads(text)
    try:
        return [json.loads(text)]
    except ValueError:
        return rows_of_lines(text)


def read_csv(path: Path) -> list:
    """The rows of a file whose first line names the fields. Every value is a text."""
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"row {number} has more values than the first line has names")
    return rows


def read_parquet(path: Path) -> list:
    return pyarrow.parquet.read_table(path).to_pylist()


def read_arrow(folder: Path) -> list:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    if (folder / SETS).is_file():
        splits = json.loads((folder / SETS).read_text())["splits"]
        names = ", ".join(str(folder / split) for split in splits)
        raise ValueError(f"this folder holds several sets, give one of {names}")
    if not (folder / STATE).is_file():
        raise ValueError("this folder has no state.json, so datasets did not save it, and no parts")
    rows: list = []
    for part in json.loads((folder / STATE).read_text())["_data_files"]:
        with pa.memory_map(str(folder / part["filename"])) as source:
            rows += pyarrow.ipc.open_stream(source).read_all().to_pylist()
    return rows
