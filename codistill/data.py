"""Problems: read from a file, made into prompts, drawn in an order that seed and step fix."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from codistill.config import ConfigError, require
from codistill.config.data import DataConfig
from codistill.grading import last_boxed
from codistill.templates import CHAT, encode, render

PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "solution")

REDRAW_STREAM = 2**34  # larger than the number of any epoch, whose random streams are others


@dataclass(frozen=True)
class Problem:
    """A problem, its gold answers and the token ids of its prompt."""

    problem: str
    answers: tuple[str, ...]
    """Each of them is right."""
    prompt: str
    prompt_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)
    """The row as it is in the file, for reward functions."""


def load_problems(
    key: Literal["data.train", "data.eval"],
    config: DataConfig,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
) -> list[Problem]:
    """The problems of the file under this key of the configuration.

    Raises:
        ConfigError: the file is missing, cannot be read or has no row, a field of a row is missing
            or empty, or a prompt is too long.
    """
    path = {"data.train": config.train, "data.eval": config.eval}[key]
    rows = read_rows(key, path)
    require(bool(rows), key, str(path), "at least one problem, found none")
    names = list(dict.fromkeys(name for row in rows for name in row))
    fields = [
        next((f for f in known if f in names), "") for known in (PROBLEM_FIELDS, ANSWER_FIELDS)
    ]
    require(
        all(fields),
        key,
        str(path),
        f"rows with {' or '.join(PROBLEM_FIELDS)} and {' or '.join(ANSWER_FIELDS)}, "
        f"found {', '.join(names)}",
    )
    if config.template == CHAT and not tokenizer.chat_template:
        raise ConfigError(
            "data.template = 'chat': expected a tokenizer with a chat template, small.path has none"
        )
    problems = []
    for number, row in enumerate(rows, start=1):
        problem, answers = row.get(fields[0]), gold_answers(fields[1], row.get(fields[1]))
        if not isinstance(problem, str) or not problem or not answers:
            wrong = fields[1] if isinstance(problem, str) and problem else fields[0]
            raise ConfigError(f"{key} = {str(path)!r}: {expected(wrong)} in row {number}")
        prompt = render(config.template, problem, tokenizer)
        prompt_ids = encode(prompt, tokenizer)
        if len(prompt_ids) > max_prompt_tokens:
            raise ConfigError(
                f"rollout.max_prompt_tokens = {max_prompt_tokens}: expected at least "
                f"{len(prompt_ids)}, the length of the prompt in row {number} of {path}"
            )
        columns = dict.fromkeys(names) | row
        problems.append(Problem(problem, answers, prompt, prompt_ids, columns))
    return problems


def expected(name: str) -> str:
    """What a field of this name should hold."""
    if name in PROBLEM_FIELDS:
        return f"expected a text as {name}"
    if name == "solution":
        return "expected a solution with a \\boxed{} answer"
    return f"expected a text, a number or a list of them as {name}"


def gold_answers(name: str, value: Any) -> tuple[str, ...]:
    """The answers in field `name`; none if one of them cannot be used."""
    if name == "solution":
        value = last_boxed(value) if isinstance(value, str) else None
    values = value if isinstance(value, list) else [value]
    texts = [answer_text(value) for value in values]
    return tuple(texts) if all(texts) else ()


def answer_text(value: Any) -> str:
    """The text of an answer: 142.0 -> "142", 1e-7 -> "0.0000001", text without the space around it;
    "" if it is no answer."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, float | Decimal) or not math.isfinite(value):
        return ""
    return str(int(value)) if value == int(value) else f"{Decimal(str(value)):f}"


def read_rows(key: str, path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json or .parquet file or of a folder that `Dataset.save_to_disk` wrote.

    Raises:
        ConfigError: the file is missing or cannot be read.
    """
    readers = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
    kinds = "a .jsonl, .json or .parquet file, or a folder that datasets saved"
    require(path.suffix in readers or path.is_dir(), key, str(path), kinds)
    require(path.exists(), key, str(path), "a file that exists")
    reader = read_arrow if path.is_dir() else readers[path.suffix]
    try:
        rows = reader(path)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is no object with fields")
        return rows
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{key} = {str(path)!r}: expected rows of problems: {message}") from error


def read_jsonl(path: Path) -> list:
    """The rows of a file with one JSON object per line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def read_json(path: Path) -> list:
    """The rows of a file with a list of objects, or with one object per line as in .jsonl: such
    files are often named .json too."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else read_jsonl(path)


def read_parquet(path: Path) -> list:
    return pyarrow.parquet.read_table(path).to_pylist()


def read_arrow(folder: Path) -> list:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        names = ", ".join(str(folder / split) for split in splits)
        raise ValueError(f"this folder holds several sets, give one of {names}")
    if not (folder / "state.json").is_file():
        raise ValueError("this folder has no state.json, so datasets did not save it")
    rows: list = []
    for part in json.loads((folder / "state.json").read_text())["_data_files"]:
        with pa.memory_map(str(folder / part["filename"])) as source:
            rows += pyarrow.ipc.open_stream(source).read_all().to_pylist()
    return rows


def overlap(problems: Sequence[Problem], held_out: Sequence[Problem]) -> int:
    """How many held-out problems are training problems too, white space aside."""
    known = {" ".join(problem.problem.split()) for problem in problems}
    return sum(" ".join(problem.problem.split()) in known for problem in held_out)


def draw(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Indices of the `batch` problems of step `step` (from 0) among `count` problems.

    Every epoch has a new random order, and a batch may end one epoch and begin the next. The result
    depends on the arguments alone, so a run that goes on after any step draws what it would have.
    """
    first = step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(count) for e in epochs])
    start = first - epochs[0] * count
    return order[start : start + batch]


def redraw(count: int, batch: int, step: int, seed: int) -> Iterator[np.ndarray]:
    """Batch after batch of indices that step `step` (from 0) has not drawn yet, in a random order
    of this step, until fewer than `batch` are left.

    The result depends on the arguments alone, as with `draw`, whose later steps do not change.
    """
    others = np.setdiff1d(np.arange(count), draw(count, batch, step, seed))
    order = np.random.default_rng([seed, REDRAW_STREAM, step]).permutation(others)
    for first in range(0, len(order) - batch + 1, batch):
        yield order[first : first + batch]
