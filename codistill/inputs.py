"""What a run reads besides its models, checked before a model is loaded."""

import logging
from dataclasses import dataclass, field
from typing import Any

import yaml

from codistill import checkpoint, distributed
from codistill.config import Config, ConfigError, require
from codistill.data import Problem, load_problems, overlap
from codistill.grading import Grader
from codistill.model import check_models, load_tokenizers
from codistill.reward_functions import RewardFunction, load_functions


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    tokenizer: Any
    problems: list[Problem]
    held_out: list[Problem]
    reward_functions: list[RewardFunction] = field(default_factory=list)


def load_inputs(config: Config) -> Inputs:
    """Everything that can be wrong about a run, checked before a model is loaded.

    Raises:
        ConfigError: a tokenizer, a problem or a reward function is missing or wrong, or the run is
            not the same.
    """
    tokenizer = load_tokenizers(config)
    check_models(config)
    limit = config.rollout.max_prompt_tokens
    problems = load_problems("data.train", config.data, tokenizer, max_prompt_tokens=limit)
    held_out = load_problems("data.eval", config.data, tokenizer, max_prompt_tokens=limit)
    rounds = config.rollout.sampling_rounds
    require(
        rounds == 1 or len(problems) >= 2 * config.rollout.prompts_per_step,
        "rollout.sampling_rounds",
        rounds,
        f"1 with the {len(problems)} problems of data.train: no prompts_per_step others are left",
    )
    functions = load_functions(config.reward.functions, problems[0].columns)
    check_same_run(config)
    if distributed.is_first():
        check_problems(config, problems, held_out)
    return Inputs(tokenizer, problems, held_out, functions)


def check_problems(config: Config, problems: list[Problem], held_out: list[Problem]) -> None:
    """Raise ConfigError for an answer that cannot be graded; warn of problems in both sets."""
    with make_grader(config) as grader:
        grader.check_golds("data.train", config.data.train, [p.answers for p in problems])
        grader.check_golds("data.eval", config.data.eval, [p.answers for p in held_out])
    if common := overlap(problems, held_out):
        logging.getLogger(__name__).warning(
            "data.eval: %d of %d problems are in data.train too: they are not held out",
            *(common, len(held_out)),
        )


def make_grader(config: Config) -> Grader:
    return Grader(timeout=config.reward.timeout, processes=distributed.helpers())


def check_same_run(config: Config) -> None:
    """A run goes on only as what it was."""
    folder = config.output_dir / config.name
    if checkpoint.latest(folder / "checkpoints") is None:
        return
    old = yaml.safe_load((folder / "config.yaml").read_text())
    new = config.model_dump(mode="json")
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        raise ConfigError(
            f"name = {config.name!r}: expected the configuration in {folder / 'config.yaml'}, to "
            f"go on with that run, or another name; {', '.join(changed)} changed"
        )
