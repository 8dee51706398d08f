"""Whether the files that a run reads are those it began with, wherever they lie now."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from codistill import files
from codistill.config import Config
from codistill.config.schema import held_out_key
from codistill.rows import parts_of

Fingerprints = dict[str, dict[str, str]]
"""Key of the configuration -> name of a file -> what tells its content from another."""

INPUTS = "inputs.json"
"""The file in a run's folder that holds them."""

MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "vocab.json", "merges.txt", "*.jinja"),
)
PIECES, PIECE_BYTES = 64, 4096  # 1/4 MiB of each file of weights, however large it is


def fingerprints(config: Config) -> Fingerprints:
    """What the files of problems and of all models that are loaded hold now.

    Problems: sha256 of each file, or of each file in a folder. Models: `sampled` of the weights
    and sha256 of every other file; a model from the Hub is known by its commit.
    """
    data = {"data.train": config.data.train}
    data |= {held_out_key(name): [path] for name, path in config.held_out.items()}
    prints = {key: of_data(key, paths) for key, paths in data.items()}
    return prints | {f"{name}.path": of_model(config.model(name).path) for name in config.loaded}


def of_data(key: str, paths: Sequence[Path]) -> dict[str, str]:
    """The only path is called "contents" if it is a file: it may have another name when the run
    goes on. So may each of several, "contents 1" and so on."""
    prints: dict[str, str] = {}
    for number, path in enumerate(paths, start=1):
        place = f" {number}" if len(paths) > 1 else ""
        if not path.is_dir():
            prints[f"contents{place}"] = files.sha256(path)
            continue
        parts = parts_of(key, path)
        if parts == [path]:  # that datasets saved
            parts = sorted(file for file in path.iterdir() if file.is_file())
        prints |= {f"{file.name}{place}": files.sha256(file) for file in parts}
    return prints


def of_model(path: str) -> dict[str, str]:
    """The files of a model's folder that training depends on, or the commit of a Hub name."""
    folder = Path(path)
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, "config.json")
        return {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}
    found = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    return {
        file.name: sampled(file) if file.suffix == ".safetensors" else files.sha256(file)
        for file in sorted(found)
    }


def sampled(path: Path) -> str:
    """sha256 of a file's size and of PIECES pieces of it, from the first byte to the last.

    Reads as little of 30 GB as of 1 MB. The first piece is the header of a file of weights. Weights
    that were trained differ nearly everywhere; a change of a few numbers alone can be missed.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(PIECES):
            file.seek(max(0, size - PIECE_BYTES) * piece // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of the files that are others, are new or are gone."""
    return sorted(name for name in before | now if before.get(name) != now.get(name))


def brief(prints: dict[str, str]) -> str:
    """A few digits that stand for all files, to be printed."""
    return "+".join(value[:8] for value in prints.values())
