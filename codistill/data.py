"""Problems: read from a file, made into prompts, drawn in an order that seed and step fix."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from codistill.answers import last_boxed
from codistill.config import ConfigError, require
from codistill.config.base import printable
from codistill.config.data import PromptConfig
from codistill.grading import Grader
from codistill.rows import parts_of, read_rows
from codistill.templates import CHAT, Message, broken_character, encode, lost_text, render

PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = (
    *("final_answer", "ground_truth", "reward_model.ground_truth", "answer", "solution"),
)
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


CONTEXT_FIELDS = ("body", "choices", "context", "options", "passage")
"""What a problem is often incomplete without; no prompt shows these fields."""


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
    file: Path = Path()
    row: int = 0
    """Its number in the file, from 1."""


class UnusableRow(ValueError):
    """A row that no problem can be made of; reason: what is said of all such rows together."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def load_problems(
    key: str,
    config: PromptConfig,
    tokenizer: Any,
    *,
    paths: Sequence[Path],
    max_prompt_tokens: int,
    grader: Grader | None = None,
) -> list[Problem]:
    """The problems of the files that the configuration has under `key`.

    grader: finds answers that cannot be graded, where unusable rows are skipped.

    Raises:
        ConfigError: a file is missing, cannot be read or has no row, or a row is unusable and
            `data.unusable` is "stop", or all are: a field is missing, empty or no text, or the
            prompt is empty, too long or loses text in the tokenizer.
    """
    files = [part for path in paths for part in parts_of(key, path)]
    tables = [(file, read_rows(key, file)) for file in files]
    where = ", ".join(map(str, paths))
    count = sum(len(rows) for _, rows in tables)
    require(count > 0, key, where, "at least one problem, found none")
    if config.template == CHAT and not tokenizer.chat_template:
        raise ConfigError(
            f"{config.section}template = 'chat': expected a tokenizer with a chat template, this "
            "one has none"
        )
    maker = ProblemMaker(key, config, tokenizer, max_prompt_tokens)
    problems = [problem for file, rows in tables for problem in maker.problems(file, rows)]
    if config.unusable == "skip" and grader is not None:
        unreadable = set(grader.unreadable([problem.answers for problem in problems]))
        maker.skipped["with an answer that cannot be graded"] += len(unreadable)
        problems = [p for number, p in enumerate(problems) if number not in unreadable]
    reasons = ", ".join(f"{n} {reason}" for reason, n in maker.skipped.items() if n)
    skipped = f"{count - len(problems)} of {count} rows skipped: {reasons}"
    require(bool(problems), key, where, f"at least one row to use, {skipped}")
    if reasons:
        logging.getLogger(__name__).warning("%s: %s", key, skipped)
    names = list(dict.fromkeys(name for _, rows in tables for row in rows for name in row))
    return [replace(p, columns=dict.fromkeys(names) | p.columns) for p in problems]


class ProblemMaker:
    """Makes problems of rows; counts the reasons for which it skips some."""

    def __init__(
        self, key: str, config: PromptConfig, tokenizer: Any, max_prompt_tokens: int
    ) -> None:
        self.key, self.config, self.tokenizer = key, config, tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.skipped: Counter[str] = Counter()

    def problems(self, file: Path, rows: list[dict[str, Any]]) -> Iterator[Problem]:
        """The problems of one file, whose rows have their problem and answer in the same fields.

        Raises ConfigError for a row that is unusable and not to be skipped.
        """
        if not rows:
            return
        fields = chosen_fields(self.key, file, rows, self.config)
        for number, row in enumerate(rows, start=1):
            try:
                yield self.problem(file, number, row, *fields)
            except UnusableRow as error:
                if self.config.unusable == "stop":
                    raise self.refused(error, file, number, row) from error
                self.skipped[error.reason] += 1
            except ValueError as error:
                raise self.refused(error, file, number, row) from error

    def refused(
        self, error: ValueError, file: Path, number: int, row: dict[str, Any]
    ) -> ConfigError:
        found = f"row {number}, which has {printable(', '.join(row))}"
        return ConfigError(f"{self.key} = {str(file)!r}: {error} in {found}")

    def problem(
        self, file: Path, number: int, row: dict[str, Any], problem_field: str, answer_field: str
    ) -> Problem:
        """Raises ValueError if the row makes none."""
        config, tokenizer = self.config, self.tokenizer
        content = problem_of(problem_field, row, config)
        answers = answers_of(answer_field, row)
        arguments = config.chat_template_arguments
        prompt = render(
            config.template, content, tokenizer, system=config.system, arguments=arguments
        )
        prompt_ids = encode(prompt, tokenizer)
        if not prompt_ids:
            raise UnusableRow("without a token in the prompt", "expected a prompt of tokens")
        if len(prompt_ids) > self.max_prompt_tokens:
            raise UnusableRow(
                f"with a prompt of more than {self.max_prompt_tokens} tokens",
                f"expected rollout.max_prompt_tokens of at least {len(prompt_ids)}, the length of "
                "the prompt",
            )
        loss = lost_text(prompt, tokenizer)
        if loss:
            raise UnusableRow(
                "with text that the tokenizer loses",
                f"expected a prompt whose text the tokenizer keeps, it reads {loss[0]!r} as "
                f"{loss[1]!r}",
            )
        text = content if isinstance(content, str) else content[-1]["content"]
        return Problem(text, answers, prompt, prompt_ids, row, file, number)


def chosen_fields(
    key: str, file: Path, rows: list[dict[str, Any]], config: PromptConfig
) -> tuple[str, str]:
    """The fields that hold problem and answer: those of the configuration, else the first of those
    known that the file has."""
    names = dict.fromkeys(name for row in rows for name in field_names(row))
    wanted = (
        (config.problem_field,) if config.problem_field else PROBLEM_FIELDS,
        (config.answer_field,) if config.answer_field else ANSWER_FIELDS,
    )
    found = [next((f for f in fields if f in names or has_value(rows, f)), "") for fields in wanted]
    problem, answer = found
    expected = " and ".join(" or ".join(fields) for fields in wanted)
    require(
        bool(problem and answer),
        *(key, str(file)),
        f"rows with {expected}, found {printable(', '.join(names))}; "
        f"{config.section}problem_field and {config.section}answer_field name others",
    )
    if others := ", ".join(name for name in wanted[1] if name in names and name != answer):
        message = "%s = %r: answers are those of %s, not of %s"
        logging.getLogger(__name__).info(message, key, str(file), answer, others)
    return problem, answer


def field_names(row: dict[str, Any]) -> Iterator[str]:
    """Names of a row's fields, and of the fields in them, dotted."""
    for name, value in row.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in value)


def has_value(rows: list[dict[str, Any]], name: str) -> bool:
    """Whether any row has something in the field of this name."""
    return any(value_of(row, name) is not None for row in rows)


def value_of(row: dict[str, Any], name: str) -> Any:
    """What is in the field of this name, which may be dotted; None without it."""
    if name in row:
        return row[name]
    places = [place for place, letter in enumerate(name) if letter == "."]
    parts = ((row.get(name[:place]), name[place + 1 :]) for place in places)
    found = (value_of(inner, rest) for inner, rest in parts if isinstance(inner, dict))
    return next((value for value in found if value is not None), None)


def problem_of(name: str, row: dict[str, Any], config: PromptConfig) -> str | list[Message]:
    """The problem in field `name`: a text, or messages for the chat template.

    Raises:
        ValueError: it is neither, or blank.
    """
    value = value_of(row, name)
    if isinstance(value, list) and value and all(map(is_message, value)):
        if config.template != CHAT:
            key = f"{config.section}template"
            raise ValueError(f"expected {key} = 'chat' for the messages of {name}")
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in value]
        for turn in messages:
            check_text(name, turn["content"])
        return messages
    expected = f"expected a text or a list of messages as {name}"
    if name in PROBLEM_FIELDS and name not in row and any(f in row for f in PROBLEM_FIELDS):
        raise ValueError(f"{expected}, as in other rows,")
    if not isinstance(value, str) or not value.strip():
        raise UnusableRow("without problem", expected)
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
    answers = gold_answers(name, value_of(row, name))
    if not answers and name == "solution":
        raise UnusableRow("without answer", "expected a solution with a \\boxed{} answer")
    if not answers:
        expected = f"expected a text, a number or a list of them as {name}"
        raise UnusableRow("without answer", expected)
    for answer in answers:
        check_text(name, answer)
    return answers


def check_text(name: str, text: str) -> None:
    """Raise UnusableRow for characters that no text has: NUL, or half of a surrogate pair."""
    broken = broken_character(text)
    if broken is not None:
        raise UnusableRow(
            "with characters that no text has", f"expected a text without {broken!r} as {name}"
        )


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


def golds_of_files(problems: Sequence[Problem]) -> dict[Path, list[tuple[str, ...]]]:
    """The answers of each row of each file; none where a row was skipped."""
    golds: dict[Path, list[tuple[str, ...]]] = {}
    for problem in problems:
        rows = golds.setdefault(problem.file, [])
        rows += [()] * (problem.row - 1 - len(rows))
        rows.append(problem.answers)
    return golds


def hidden_fields(problem_field: str | None, problems: Sequence[Problem]) -> list[str]:
    """Fields with what a problem is often incomplete without, and no prompt shows."""
    names = {name for problem in problems for name, value in problem.columns.items() if value} - {
        problem_field
    }
    return sorted(name for name in names if name.lower() in CONTEXT_FIELDS)


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
