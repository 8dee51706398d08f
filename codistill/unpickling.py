"""Reading a checkpoint without running code from it.

torch.distributed.checkpoint keeps its metadata and every value that is no tensor as pickles, which
may call any function while they are read. Both are looked at here before torch reads them.
"""

import dataclasses
import enum
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

PACKAGE = "torch.distributed.checkpoint."
HARMLESS = {("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout")}


class MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but torch's records of what lies where, types of numbers and shapes."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and (module == "torch" or module.startswith(PACKAGE)):
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, torch.dtype) or is_record(found):
                return found
        if (module, name) in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}")


def is_record(found: object) -> bool:
    """Whether this is a class of plain values."""
    return isinstance(found, type) and (
        dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)
    )


def check_metadata(path: Path) -> str | None:
    """Why the metadata of a checkpoint must not be read by torch; None if it may."""
    try:
        MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a pickle that is no pickle raises almost anything
        return f"has a {path.name} that is no metadata: {' '.join(str(error).split())}"
    return None


class PlainPlanner(DefaultLoadPlanner):
    """Loads numbers, texts, lists and dictionaries besides tensors, and nothing else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises at anything else
        value.seek(0)
        super().load_bytes(read_item, value)
