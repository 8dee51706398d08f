"""The sections of the configuration about problems and rewards."""

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from codistill.config.base import Section, UserPath, require
from codistill.templates import is_template

SET_NAMES = "a name of at most 60 letters, digits and . _ - + @, which begins with no ."


def is_set_name(name: str) -> bool:
    """Whether a set of problems can be called this in a table, and in the names of its files."""
    return re.fullmatch(r"[\w\-+@][\w.\-+@]{0,59}", name) is not None


class DataConfig(Section):
    train: UserPath = Field(
        description="training problems: .jsonl, .json, .csv (these also as .gz), .parquet or a "
        "folder that datasets saved, with a problem and an answer in each row"
    )
    eval: UserPath | None = Field(
        None,
        description="held-out problems, in a file of the same kinds; evaluation.sets takes several",
    )
    template: str = Field(
        "{problem}",
        max_length=10**4,
        description="text of a prompt: r1 (Table 4), boxed (Table 5), chat (the tokenizer's own "
        "chat template), or a text in which {problem} is replaced by the problem",
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        expected = "r1, boxed, chat or a text with {problem}"
        require(is_template(self.template), "template", self.template, expected)
        return self


class RewardConfig(Section):
    format: bool = Field(
        False,
        description="add 0.25 for each of <think> </think> <answer> </answer> that occurs exactly "
        "once (appendix B), as template r1 asks for; accuracy counts 1",
    )
    timeout: float = Field(
        5.0, ge=0.01, le=3600, description="hard limit for grading one completion (seconds)"
    )
    function_timeout: float = Field(
        300.0,
        gt=0,
        le=1e6,
        description="limit for one call of a reward function of yours (seconds); other processes "
        "wait for it no longer than distributed.timeout",
    )
    functions: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        {},
        description="your own rewards, added to r: import path of a function(prompts, completions, "
        "completion_ids, **columns) that returns a number for each completion, and its weight",
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        taken = {"accuracy", "format", "kd", "effective", "zero_fraction", "kept_accuracy"}
        for path in self.functions:
            name = path.rpartition(".")[2]
            require("." in path.strip("."), "functions", path, "an import path, module.function")
            unused = f"a function of another name; reward/{name} is a metric already"
            require(name not in taken, "functions", path, unused)
            taken.add(name)
        return self
