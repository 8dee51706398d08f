"""The options of the command eval."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from codistill.config.base import (
    CommandOptions,
    UserPath,
    UserPathOrName,
    check_temperature,
    expanded,
    require,
)
from codistill.config.data import SET_NAMES, PromptConfig, is_set_name
from codistill.config.machinery import OwnEngine, StopString


class EvalOptions(PromptConfig, CommandOptions):
    """Accuracy of models on sets of problems: mean and standard deviation over seeds.

    The same command goes on where it was stopped: each seed that is finished is kept.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m codistill eval", cli_kebab_case=True)

    model: list[UserPathOrName] = Field(
        min_length=1,
        description="folder or Hub name of a model; given again, one more row of the table",
    )
    data: list[str] = Field(
        min_length=1,
        description="NAME=FILE, a set of problems, in a file as data.eval has it; given again, one "
        "more column",
    )
    template: str = Field(
        max_length=10**4,
        description="text of a prompt: r1, boxed, chat, or a text with {problem}, as data.template",
    )
    output: UserPath = Field(description="folder for the table and all completions")
    seeds: int = Field(
        5, gt=0, le=10**4, description="completions of each problem, one per seed from 0 on"
    )
    temperature: float = Field(
        1.0, ge=0, le=2, description="divides the logits; 0 is greedy, else at least 0.01"
    )
    max_tokens: int = Field(3072, gt=0, le=10**7, description="longest completion (tokens)")
    stop: list[StopString] = Field(
        [], max_length=100, description="texts that end a completion, as rollout.stop"
    )
    skip_special_tokens: bool = Field(
        True, description="special tokens are no part of the text that is graded"
    )
    limit: int | None = Field(None, gt=0, description="only the first problems of each set")
    engine: OwnEngine = Field(
        "auto", description="auto: vllm where it is installed, else hf, which is slower"
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="type of the weights")
    kv_cache_gib: float = Field(
        4.0, ge=0.001, le=10**4, description="vLLM's KV cache on each process (GiB)"
    )
    tensor_parallel: int = Field(
        1, gt=0, le=10**4, description="processes that share a model, as rollout.tensor_parallel"
    )

    @model_validator(mode="after")
    def check_options(self) -> Self:
        for entry in self.data:
            name, equals, path = entry.partition("=")
            require(bool(equals and path), "data", entry, "NAME=FILE")
            require(is_set_name(name), "data", entry, f"NAME=FILE with {SET_NAMES}")
        for key in ("model", "data"):
            given = getattr(self, key)
            require(len(set(given)) == len(given), key, given, "each one once")
        require(len(self.sets) == len(self.data), "data", self.data, "another NAME for each file")
        check_temperature(self.temperature)
        expected = "1 with temperature 0: greedy completions are the same for every seed"
        require(self.temperature > 0 or self.seeds == 1, "seeds", self.seeds, expected)
        return self

    def check_processes(self, world_size: int) -> None:
        """Raise ConfigError unless processes divide evenly over engines."""
        sharers, expected = self.tensor_parallel, f"a divisor of the {world_size} processes"
        require(world_size % sharers == 0, "tensor_parallel", sharers, expected)

    @property
    def sets(self) -> dict[str, Path]:
        """The file of each set, by name."""
        entries = (entry.partition("=") for entry in self.data)
        return {name: Path(expanded(path)) for name, _, path in entries}
