"""Files that are whole or absent, whatever ends the process while they are written; and reading
those that may be damaged all the same."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "unexpected pos")
"""What libraries that raise no OSError say; the last is torch's writer of tensors."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file of another name, and give it the name `path` once it is on the disk.

    Until then `path` is as it was; a reader never sees a part of the new file.
    """
    unfinished = path.with_name(f"unfinished_{path.name}")
    try:
        write(unfinished)
        sync(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def append_line(path: Path, line: str) -> None:
    """Add a line at the end; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def finish_folder(unfinished: Path, folder: Path) -> None:
    """Give a folder the name `folder`, in the place of what is there, once all its files are on the
    disk."""
    for path in (*unfinished.rglob("*"), unfinished):
        sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sha256(path: Path) -> str:
    """Checksum of all bytes of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that the disk is full, a quota used up or a file too large."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(text in str(error) for text in FULL_TEXTS)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; none if there is no file.

    Lines that are no row are left out: a process that is killed may leave half a line at the end,
    a computer that loses its power also zeros.
    """
    if not path.is_file():
        return []
    rows = map(parse_object, path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [row for row in rows if isinstance(row.get("step"), int)]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is missing or damaged."""
    return parse_object(path.read_text(errors="replace")) if path.is_file() else {}


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; an empty one if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
