"""Files that come from elsewhere: what can be seen of them before they are loaded."""

import json
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from codistill.config import Config, ConfigError, require
from codistill.config.base import first_line
from codistill.config.schema import check_data_files

POINTER = b"version https://git-lfs.github.com/spec/"
NEEDED, GENERATION = ("config.json", "tokenizer_config.json"), "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shapes = dict[str, tuple[int, ...]]


HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
MODEL = "a folder that exists, or a Hub name"


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS left a pointer here in the place of the file itself."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def cached_folder(name: str) -> Path | None:
    """Where the cache of the Hugging Face Hub has the whole model of this name; None if it lacks a
    file, or does not know whether there is one.

    A model that is there is read from there: the Hub is not asked for a newer one, which takes
    minutes without a network.
    """
    files = {file: try_to_load_from_cache(name, file) for file in (*NEEDED, GENERATION)}
    if files[GENERATION] is None or not all(isinstance(files[file], str) for file in NEEDED):
        return None
    folder = Path(str(files[NEEDED[0]])).parent
    try:
        is_whole = all((folder / file).is_file() for file in weight_files("path", folder))
    except ConfigError:
        return None
    return folder if is_whole else None


def source(path: str) -> str:
    """What transformers and vLLM are to load: the folder that a model is in, also that of a cached
    Hub name; else the name."""
    folder = None if Path(path).is_dir() else cached_folder(path)
    return path if folder is None else str(folder)


def is_here(key: str, path: str) -> bool:
    """Whether a model is on this computer, in a folder or the Hub's cache; if so, it is whole.

    Raises:
        ConfigError: under configuration key `key`, it is not whole, or the path is neither a folder
            nor a name that the Hub may know.
    """
    is_folder = Path(path).is_dir()
    require(is_folder or HUB_NAME.fullmatch(path) is not None, key, path, MODEL)
    folder = Path(source(path))
    if folder.is_dir():
        check_model_folder(key, folder)
    return folder.is_dir()


def check_files(config: Config) -> None:
    """Raise ConfigError for a file of problems that is not there, or a model of which `is_here`
    says so. A command calls this before it imports torch, which takes seconds."""
    check_data_files(config)
    for name in config.loaded:
        is_here(f"{name}.path", config.model(name).path)


def check_model_folder(key: str, folder: Path) -> Shapes:
    """Shapes of the weights in a model's folder, by name. Only headers are read.

    Raises:
        ConfigError: under configuration key `key`, a file is missing, empty, cut off, a pointer of
            Git LFS, or not what its name says.
    """
    for file in sorted(folder.iterdir()):
        expected = f"files themselves: {file.name} is a Git LFS pointer (git lfs pull fetches it)"
        require(not is_lfs_pointer(file), key, str(folder), expected)
    read_object(key, folder, "config.json")
    shapes: Shapes = {}
    for name in weight_files(key, folder):
        expected = f"the weights {name}, which are not there"
        require((folder / name).is_file(), key, str(folder), expected)
        try:
            with safe_open(folder / name, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            reason = first_line(error)
            require(False, key, str(folder), f"a whole safetensors file {name}: {reason}")
    return shapes


def weight_files(key: str, folder: Path) -> list[str]:
    """Names of the files that hold the weights."""
    if (folder / INDEX).is_file():
        files = read_object(key, folder, INDEX).get("weight_map")
        names = files.values() if isinstance(files, dict) else [None]
        valid = all(isinstance(name, str) for name in names)
        require(valid, key, str(folder), f"a weight_map of file names in {INDEX}")
        return sorted(set(names))
    pickled = any(folder.glob("*.bin")) and not (folder / SINGLE).is_file()
    expected = (
        f"{SINGLE}; a .bin file is a pickle, which can run code when it is read, and is refused"
    )
    require(not pickled, key, str(folder), expected)
    return [SINGLE]


def read_object(key: str, folder: Path, name: str) -> dict:
    """The JSON object in a file of a model's folder."""
    require((folder / name).is_file(), key, str(folder), f"a model's folder, with {name} in it")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key} = {str(folder)!r}: expected JSON in {name}: {error}") from error
    require(isinstance(content, dict), key, str(folder), f"an object in {name}")
    return content
