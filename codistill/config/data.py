"""The sections of the configuration about problems and rewards."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from codistill.config.base import Section, UserPath, require
from codistill.templates import CHAT, Argument, broken_character, is_template


def truth(value: Any) -> Any:
    """A text that says true or false is that: the command line has texts alone."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def several(value: Any) -> Any:
    """One path is a list of one."""
    return [value] if isinstance(value, str | Path) else value


SET_NAMES = "a name of at most 60 letters, digits and . _ - + @, which begins with no ."


def is_set_name(name: str) -> bool:
    """Whether a set of problems can be called this in a table, and in the names of its files."""
    return re.fullmatch(r"[\w\-+@][\w.\-+@]{0,59}", name) is not None


class PromptConfig(Section):
    """How rows of files become problems, and problems prompts."""

    section: ClassVar[str] = ""
    """What precedes the names of these keys where the user gives them."""

    problem_field: str | None = Field(
        None,
        min_length=1,
        description="field of a row with the problem, a.b for the field b of a field a; by default "
        "the first of problem, question and prompt that a file has",
    )
    answer_field: str | None = Field(
        None,
        min_length=1,
        description="field of a row with the answer; by default the first of final_answer, "
        "ground_truth, reward_model.ground_truth, answer and solution that a file has",
    )
    unusable: Literal["stop", "skip"] = Field(
        "stop",
        description="rows without a problem or an answer, with an answer that cannot be graded, "
        "with a prompt of more than rollout.max_prompt_tokens or with text that the tokenizer "
        "loses. stop: they are an error; skip: they are left out, and counted",
    )
    template: str = Field(
        "{problem}",
        max_length=10**4,
        description="text of a prompt: r1 (Table 4), boxed (Table 5), chat (the tokenizer's own "
        "chat template), or a text in which {problem} is replaced by the problem",
    )

    system: str | None = Field(
        None,
        min_length=1,
        max_length=10**4,
        description="with template chat: a system message before each problem that has none",
    )
    chat_template_arguments: dict[str, Annotated[Argument, BeforeValidator(truth)]] = Field(
        {},
        description="with template chat: arguments of the tokenizer's chat template, such as "
        "enable_thinking: false",
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        expected = "r1, boxed, chat or a text with {problem}"
        require(is_template(self.template), "template", self.template, expected)
        if self.template != CHAT:
            require(self.system is None, "system", self.system, "nothing without template chat")
            arguments = self.chat_template_arguments
            expected = "nothing without template chat"
            require(not arguments, "chat_template_arguments", arguments, expected)
        broken = None if self.system is None else broken_character(self.system)
        require(broken is None, "system", self.system, f"a text without {broken!r}")
        return self


class DataConfig(PromptConfig):
    section: ClassVar[str] = "data."

    train: Annotated[list[UserPath], BeforeValidator(several)] = Field(
        min_length=1,
        description="training problems: .jsonl, .json, .csv (these also as .gz), .parquet, a "
        "folder of .parquet or .jsonl files, one that datasets saved, or a list of any of these, "
        "with a problem and an answer in each row",
    )
    eval: UserPath | None = Field(
        None,
        description="held-out problems, in a file of the same kinds; evaluation.sets takes several",
    )


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
