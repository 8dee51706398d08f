"""CSV files whose rows are dataclass instances: every file in bench/results is such a table."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, astuple, fields
from pathlib import Path
from types import NoneType
from typing import Generic, TypeVar, get_args, get_type_hints

Row = TypeVar("Row")


class Table(Generic[Row]):
    """Rows of one dataclass in a CSV file, with one column per field, in the fields' order.

    A field holds text, a number or None, which is written as an empty cell. Floats keep four
    significant digits. Two rows that agree in the columns of `key` measure the same thing: the
    newer one replaces the older one.
    """

    def __init__(self, path: Path, row_type: type[Row], key: Sequence[str]) -> None:
        self.path, self.row_type, self.key = path, row_type, key

    def is_there(self) -> bool:
        """Whether the file exists and has the header of this table."""
        return self.path.exists() and self.fits(self.header())

    def read(self) -> list[Row]:
        """All rows. A column that is missing at the end, in a file from before its field was added,
        has the field's default.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: the header is that of another table. The message names the file.
        """
        header = self.header()
        if not self.fits(header):
            names = ", ".join(column_names(self.row_type))
            raise ValueError(f"{self.path} must be a table with the columns {names}, got {header}")
        types = get_type_hints(self.row_type)
        with self.path.open(newline="") as file:
            return [
                self.row_type(**{name: value_of(cell, types[name]) for name, cell in row.items()})
                for row in csv.DictReader(file)
            ]

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; a row takes the place of an older one with the same key."""
        old = self.read() if self.path.exists() else []
        self.write({self.key_of(row): row for row in (*old, *rows)}.values())

    def write(self, rows: Iterable[Row]) -> None:
        """Replace the file. A process that is stopped meanwhile leaves the old file whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(text_of(self.row_type, rows))
        os.replace(part, self.path)

    def key_of(self, row: Row) -> tuple:
        return tuple(getattr(row, name) for name in self.key)

    def header(self) -> list[str]:
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])

    def fits(self, header: list[str]) -> bool:
        """Whether these are the columns, except perhaps for some at the end that have defaults."""
        missing = fields(self.row_type)[len(header) :]
        is_start = header == column_names(self.row_type)[: len(header)]
        return is_start and all(field.default is not MISSING for field in missing)


def text_of(row_type: type[Row], rows: Iterable[Row]) -> str:
    """The rows as CSV text, with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column_names(row_type))
    writer.writerows([as_cell(value) for value in astuple(row)] for row in rows)
    return text.getvalue()


def column_names(row_type: type) -> list[str]:
    return [field.name for field in fields(row_type)]


def as_cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def value_of(cell: str, declared: type) -> object:
    """The cell's text as the declared type of its field: str, int or float, each with or without
    None."""
    options = get_args(declared) or (declared,)
    if not cell and NoneType in options:
        return None
    kind: Callable[[str], object] = options[0]
    return kind(cell)
