"""What a run reads besides its models, checked before a model is loaded."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codistill import checkpoint, distributed
from codistill.config import Config, ConfigError, load_config, require
from codistill.config.changes import Changes, changes_between, may_change
from codistill.data import Problem, contradictions, load_problems, overlap
from codistill.files import read_object, read_rows
from codistill.fingerprints import INPUTS, Fingerprints, brief, changed, fingerprints
from codistill.grading import Grader
from codistill.losses import make_policy_loss
from codistill.model.definition import check_trainable
from codistill.model.pretrained import check_models, end_token_ids, load_tokenizers
from codistill.reward_functions import RewardFunction, load_functions
from codistill.templates import CHAT, DATE, asks_for_the_date


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    tokenizer: Any
    end_token_ids: tuple[int, ...]
    """Tokens that end a completion of the writer."""
    problems: list[Problem]
    held_out: list[Problem]
    reward_functions: list[RewardFunction] = field(default_factory=list)
    changes: Changes = field(default_factory=dict)
    """Keys of the configuration that are not as before, where a run goes on."""
    fingerprints: Fingerprints = field(default_factory=dict)
    """What tells the files of problems and models from others."""


def load_inputs(config: Config) -> Inputs:
    """Everything that can be wrong about a run, checked before a model is loaded.

    Raises:
        ConfigError: a setting of the loss, a tokenizer, a problem or a reward function is missing
            or wrong, or a run of this name is there that cannot go on with this configuration.
    """
    for name in config.trained:
        make_policy_loss(config, name)
    check_models(config)
    tokenizer = load_tokenizers(config)
    for name in config.loaded:
        check_trainable(f"{name}.path", config.model(name).path, len(tokenizer))
    ends = end_token_ids(f"{config.writer}.path", config.model(config.writer).path, tokenizer)
    limit = config.rollout.max_prompt_tokens
    problems = load_problems("data.train", config.data, tokenizer, max_prompt_tokens=limit)
    held_out = load_problems("data.eval", config.data, tokenizer, max_prompt_tokens=limit)
    rounds = config.rollout.sampling_rounds
    require(
        rounds == 1 or len(problems) >= 2 * config.rollout.prompts_per_step,
        "rollout.sampling_rounds",
        rounds,
        f"1 with the {len(problems)} problems of data.train: fewer than prompts_per_step are left "
        "for a second round",
    )
    functions = load_functions(config.reward, problems[0].columns)
    prints = fingerprints(config)
    changes = changes_of_run(config, len(problems), prints)
    if distributed.is_first():
        check_problems(config, problems, held_out)
        if config.data.template == CHAT and asks_for_the_date(tokenizer):
            message = "data.template: the date that the chat template asks for is always %s"
            logging.getLogger(__name__).info(message, DATE)
    return Inputs(tokenizer, ends, problems, held_out, functions, changes, prints)


def check_problems(config: Config, problems: list[Problem], held_out: list[Problem]) -> None:
    """Raise ConfigError for an answer that cannot be graded; warn of what may be a mistake."""
    with make_grader(config) as grader:
        grader.check_golds("data.train", config.data.train, [p.answers for p in problems])
        grader.check_golds("data.eval", config.data.eval, [p.answers for p in held_out])
    logger = logging.getLogger(__name__)
    for key, found in (("data.train", problems), ("data.eval", held_out)):
        if count := contradictions(found):
            logger.warning("%s: %d problems occur again with another answer", key, count)
    if common := overlap(problems, held_out):
        logger.warning(
            "data.eval: %d of %d problems are in data.train too: they are not held out",
            *(common, len(held_out)),
        )


def make_grader(config: Config) -> Grader:
    """A grader with this process's share of the machine's cores."""
    return Grader(timeout=config.reward.timeout, processes=distributed.helpers())


def changes_of_run(config: Config, num_problems: int, prints: Fingerprints) -> Changes:
    """The keys that are not as before, if there is a checkpoint to go on from.

    prints: what the files of problems and models are now. Their paths may change, their contents
    may not, those of data.eval excepted.

    Raises:
        ConfigError: a key or a file has changed that the numbers of a step depend on, the run has
            gone beyond its new end, or its checkpoints are gone or incomplete.
    """
    folder = config.output_dir / config.name
    done = checkpoint.latest(folder / "checkpoints")
    if done is None:
        check_nothing_is_lost(config, folder)
        return {}
    path = folder / "config.yaml"
    try:
        before = load_config(["--config", str(path)])  # keys that are new have their defaults
    except ConfigError as error:
        raise ConfigError(
            f"name = {config.name!r}: expected another name, {path} is of another version: {error}"
        ) from error
    changes = changes_between(before, config)
    stored = stored_prints(folder)
    fixed = [
        f"{key} = {new!r}: expected {old!r}"
        for key, (old, new) in changes.items()
        if not (may_change(key) or key in stored)
    ]
    if fixed:
        raise ConfigError(f"{'; '.join(fixed)} as in {path}, to go on with that run, or a new name")
    changes |= changes_of_files(config, stored, prints)
    total = config.total_steps(num_problems)
    key = "training.steps" if config.training.steps else "training.epochs"
    value = config.training.steps or config.training.epochs
    require(total >= done, key, value, f"at least the {done} steps that are done in {folder}")
    return changes


def check_nothing_is_lost(config: Config, folder: Path) -> None:
    """Raise ConfigError for a run that must have had checkpoints, and has none: to start anew would
    erase its metrics."""
    done = max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)
    require(
        done < config.checkpoint.every,
        "name",
        config.name,
        f"the checkpoints of the {done} steps in {folder}/metrics.jsonl, there are none; to start "
        "anew give another name, or move that file away",
    )


def stored_prints(folder: Path) -> Fingerprints:
    """What the files of the run were when it began; nothing where that is not known."""
    stored = read_object(folder / INPUTS)
    if not stored:
        logging.getLogger(__name__).warning(
            "%s: cannot be read: whether problems and models are those of the start is not known",
            folder / INPUTS,
        )
    return stored


def changes_of_files(config: Config, stored: Fingerprints, prints: Fingerprints) -> Changes:
    """The held-out problems, if they are others than before.

    Raises:
        ConfigError: the training problems or a model are others.
    """
    changes: Changes = {}
    for key in stored.keys() & prints.keys():
        names = changed(stored[key], prints[key])
        if not names:
            continue
        if key != "data.eval":
            section, _, name = key.partition(".")
            raise ConfigError(
                f"{key} = {str(getattr(getattr(config, section), name))!r}: expected what the run "
                f"began with, changed since: {', '.join(names)}; a new name starts anew"
            )
        changes[f"contents of {key}"] = (brief(stored[key]), brief(prints[key]))
    return changes
