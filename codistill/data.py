"""Problems: read from a file, turned into prompts, drawn in an order fixed by seed and step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from codistill.config import ConfigError, DataConfig, require

REDRAW_STREAM = 2**34  # beside the epochs, which are below


@dataclass(frozen=True)
class Problem:
    """A problem, its gold answer and the token ids of its prompt."""

    problem: str
    answer: str
    prompt: str
    prompt_ids: list[int]


def load_problems(
    key: str, config: DataConfig, tokenizer, *, max_prompt_tokens: int
) -> list[Problem]:
    """Problems of the file under configuration key `key` ("data.train" or "data.eval").

    Raises:
        ConfigError: no such file, not readable, a field missing or empty, no row, prompt too long.
    """
    path: Path = getattr(config, key.rsplit(".", 1)[-1])
    table = read_table(key, path)
    for column in ("problem", "answer"):
        require(
            column in table.column_names,
            key,
            str(path),
            f"rows with the fields problem and answer, found {', '.join(table.column_names)}",
        )
    require(table.num_rows > 0, key, str(path), "at least one problem, found none")
    problems = []
    for number, row in enumerate(table.select(["problem", "answer"]).to_pylist(), start=1):
        require(
            bool(row["problem"]) and row["answer"] is not None,
            key,
            str(path),
            f"problem and answer in every row, row {number} lacks one",
        )
        prompt = config.template.replace("{problem}", str(row["problem"]))
        prompt_ids = tokenizer.encode(prompt)
        if len(prompt_ids) > max_prompt_tokens:
            raise ConfigError(
                f"rollout.max_prompt_tokens = {max_prompt_tokens}: expected at least "
                f"{len(prompt_ids)}, the length of the prompt in row {number} of {path}"
            )
        problems.append(Problem(str(row["problem"]), str(row["answer"]), prompt, prompt_ids))
    return problems


def read_table(key: str, path: Path) -> pa.Table:
    readers = {".jsonl": pyarrow.json.read_json, ".parquet": pyarrow.parquet.read_table}
    require(path.suffix in readers, key, str(path), "a .jsonl or .parquet file")
    require(path.is_file(), key, str(path), "a file that exists")
    if path.stat().st_size == 0:  # pyarrow calls this an error of the format
        return pa.table({"problem": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    try:
        return readers[path.suffix](path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{key} = {str(path)!r}: expected {path.suffix} rows: {error}") from error


def draw(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Indices of the `batch` problems of step `step` (from 0) among `count`.

    Epoch after epoch in a new random order, without a gap at the border. A function of its
    arguments alone, so a run that starts again at any step draws what it would have drawn.
    """
    first = step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(count) for e in epochs])
    start = first - epochs[0] * count
    return order[start : start + batch]


def redraw(count: int, batch: int, step: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of `batch` problems again and again that step `step` (from 0) has not drawn yet, in
    an order of this step's own, until too few are left.

    A function of its arguments alone, like `draw`, and independent of it: no later step moves.
    """
    others = np.setdiff1d(np.arange(count), draw(count, batch, step, seed))
    order = np.random.default_rng([seed, REDRAW_STREAM, step]).permutation(others)
    for first in range(0, len(order) - batch + 1, batch):
        yield order[first : first + batch]
