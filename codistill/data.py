"""Problems: read from a file, made into prompts, drawn in an order that seed and step fix."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from codistill.config import ConfigError, require
from codistill.config.base import printable
from codistill.config.data import DataConfig
from codistill.grading import last_boxed
from codistill.rows import read_rows
from codistill.templates import CHAT, Message, broken_character, encode, render

PROBLEM_FIELDS = ("problem", "question", "prompt")
VERL_ANSWER = "reward_model.ground_truth"
ANSWER_FIELDS = ("final_answer", "ground_truth", VERL_ANSWER, "answer", "solution")
"""From the most to the least specific: an `answer` beside a `final_answer` is a long text."""

KNOWN_SIZES = {
    **dict.fromkeys(("minerva", "minervamath"), 272),
    "math500": 500,
    **dict.fromkeys(("amc", "amc23", "amc2024"), 40),
    "olympiadbench": 675,
}
"""How many problems the sets of the paper's tables have, by name in small letters and digits. Their
accuracies are multiples of one over so many, except one of Minerva."""

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
    key: str,
    config: DataConfig,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    path: Path | None = None,
) -> list[Problem]:
    """The problems of the file that the configuration has under `key`.

    path: that file; by default the one of the training problems.

    Raises:
        ConfigError: the file is missing, cannot be read or has no row, a field of a row is missing,
            empty or no text, or a prompt is empty or too long.
    """
    path = path or config.train
    rows = read_rows(key, path)
    require(bool(rows), key, str(path), "at least one problem, found none")
    names = list(dict.fromkeys(name for row in rows for name in row))
    problem_field, answer_field = chosen_fields(key, path, rows, names)
    if config.template == CHAT and not tokenizer.chat_template:
        raise ConfigError(
            "data.template = 'chat': expected a tokenizer with a chat template, this one has none"
        )
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            content = problem_of(problem_field, row.get(problem_field), config.template)
            answers = answers_of(answer_field, row)
            prompt = render(config.template, content, tokenizer)
        except ValueError as error:
            found = f"row {number}, which has {printable(', '.join(map(str, row)))}"
            raise ConfigError(f"{key} = {str(path)!r}: {error} in {found}") from error
        prompt_ids = encode(prompt, tokenizer)
        require(bool(prompt_ids), key, str(path), f"a prompt of tokens in row {number}, found none")
        if len(prompt_ids) > max_prompt_tokens:
            raise ConfigError(
                f"rollout.max_prompt_tokens = {max_prompt_tokens}: expected at least "
                f"{len(prompt_ids)}, the length of the prompt in row {number} of {path}"
            )
        text = content if isinstance(content, str) else content[-1]["content"]
        columns = dict.fromkeys(names) | row
        problems.append(Problem(text, answers, prompt, prompt_ids, columns))
    return problems


def chosen_fields(
    key: str, path: Path, rows: list[dict[str, Any]], names: list[str]
) -> tuple[str, str]:
    """The fields that hold problem and answer: the first of those known that the file has."""
    found = {*names} | ({VERL_ANSWER} if any(map(verl_answer, rows)) else set())
    known = (PROBLEM_FIELDS, ANSWER_FIELDS)
    problem, answer = (next((f for f in fields if f in found), "") for fields in known)
    require(
        bool(problem and answer),
        key,
        str(path),
        f"rows with {' or '.join(PROBLEM_FIELDS)} and {' or '.join(ANSWER_FIELDS)}, "
        f"found {printable(', '.join(map(str, names)))}",
    )
    return problem, answer


def problem_of(name: str, value: Any, template: str) -> str | list[Message]:
    """The problem in field `name`: a text, or messages for the chat template.

    Raises:
        ValueError: it is neither, or blank.
    """
    if isinstance(value, list) and value and all(map(is_message, value)):
        if template != CHAT:
            raise ValueError(f"expected data.template = 'chat' for the messages of {name}")
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in value]
        for turn in messages:
            check_text(name, turn["content"])
        return messages
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text or a list of messages as {name}")
    check_text(name, value)
    return value


def is_message(turn: Any) -> bool:
    """Whether this is a turn of a conversation."""
    return isinstance(turn, dict) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")
    )


def answers_of(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """The gold answers in field `name`.

    Raises:
        ValueError: there is none, or one of them cannot be used.
    """
    answers = gold_answers(name, verl_answer(row) if name == VERL_ANSWER else row.get(name))
    if not answers and name == "solution":
        raise ValueError("expected a solution with a \\boxed{} answer")
    if not answers:
        raise ValueError(f"expected a text, a number or a list of them as {name}")
    for answer in answers:
        check_text(name, answer)
    return answers


def verl_answer(row: dict[str, Any]) -> Any:
    """`reward_model.ground_truth` of verl's files; None where there is none."""
    nested = row.get("reward_model")
    return nested.get("ground_truth") if isinstance(nested, dict) else None


def check_text(name: str, text: str) -> None:
    """Raise ValueError for characters that no text has: NUL, or half of a surrogate pair."""
    broken = broken_character(text)
    if broken is not None:
        raise ValueError(f"expected a text without {broken!r} as {name}")


def gold_answers(name: str, value: Any) -> tuple[str, ...]:
    """The answers in field `name`; none if one of them cannot be used.

    Where a text has `####`, as in GSM8K, what comes before is how the answer was found.
    """
    if name == "solution":
        value = last_boxed(value) if isinstance(value, str) else None
    values = value if isinstance(value, list) else [value]
    texts = [answer_text(value).rpartition("####")[2].strip() for value in values]
    return tuple(texts) if all(texts) else ()


def answer_text(value: Any) -> str:
    """The text of an answer: 142.0 -> "142", 1e-7 -> "0.0000001", text without the space around it;
    "" if it is no answer."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, float | Decimal) or not math.isfinite(value):
        return ""
    return str(int(value)) if value == int(value) else f"{Decimal(str(value)):f}"


def overlap(problems: Sequence[Problem], held_out: Sequence[Problem]) -> int:
    """How many held-out problems are training problems too, white space aside."""
    known = {" ".join(problem.problem.split()) for problem in problems}
    return sum(" ".join(problem.problem.split()) in known for problem in held_out)


def warn_of_size(name: str, count: int) -> None:
    """Warn where a set has the name of a well-known one and another number of problems."""
    known = "".join(letter for letter in name.lower() if letter.isalnum())
    expected = KNOWN_SIZES.get(known, count)
    if count != expected:
        logging.getLogger(__name__).warning(
            "%s has %d problems here, and %d in the paper: their numbers do not compare",
            *(name, count, expected),
        )


def contradictions(problems: Sequence[Problem]) -> int:
    """How many problems occur more than once, with different answers."""
    answers: dict[str, set[tuple[str, ...]]] = {}
    for problem in problems:
        answers.setdefault(problem.prompt, set()).add(problem.answers)
    return sum(len(found) > 1 for found in answers.values())


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


def counted(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Each index, and how often it has come before: 7, 3, 7 -> (7, 0), (3, 0), (7, 1)."""
    before: Counter[int] = Counter()
    draws = []
    for index in indices:
        draws.append((index, before[index]))
        before[index] += 1
    return draws


def redraw(count: int, batch: int, step: int, seed: int) -> Iterator[np.ndarray]:
    """Batch after batch of indices that step `step` (from 0) has not drawn yet, in a random order
    of this step, until fewer than `batch` are left.

    The result depends on the arguments alone, as with `draw`, whose later steps do not change.
    """
    others = np.setdiff1d(np.arange(count), draw(count, batch, step, seed))
    order = np.random.default_rng([seed, REDRAW_STREAM, step]).permutation(others)
    for first in range(0, len(order) - batch + 1, batch):
        yield order[first : first + batch]
