"""What is known about the gold answers of a file, kept in the user's cache for its next start."""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from codistill.comparing import GRADER_VERSION


def load_texts(golds: Sequence[str]) -> list[str] | None:
    """The `golds` that are only text to math-verify; None if they have not been checked by
    this grader with this math-verify, or the cache is damaged."""
    try:
        texts = json.loads(file_of(golds).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = set(golds)
    is_sound = isinstance(texts, list) and all(isinstance(t, str) and t in known for t in texts)
    return texts if is_sound else None


def save_texts(golds: Sequence[str], texts: Sequence[str]) -> None:
    """Remember that `golds` have been checked and which are only text. A cache that cannot be
    written is no error: the next start checks again."""
    path = file_of(golds)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(texts), encoding="utf-8")
        part.replace(path)
    except OSError:
        return


def file_of(golds: Sequence[str]) -> Path:
    """The file for these answers, graded by this version of the grader and of math-verify."""
    content = json.dumps([GRADER_VERSION, version("math-verify"), *golds])
    return cache_folder() / "golds" / f"{hashlib.sha256(content.encode()).hexdigest()}.json"


def cache_folder() -> Path:
    """XDG_CACHE_HOME/codistill, by default ~/.cache/codistill."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The convention ignores a relative path.
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "codistill"
