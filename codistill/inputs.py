"""What a run reads besides its models, checked before a model is loaded."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codistill import checkpoint, distributed
from codistill.config import Config, ConfigError, load_config, require
from codistill.config.changes import Changes, changes_between, may_change
from codistill.config.schema import held_out_key
from codistill.data import (
    Problem,
    contradictions,
    golds_of_files,
    hidden_fields,
    load_problems,
    overlap,
    warn_of_size,
)
from codistill.engine import check_engine
from codistill.files import read_object, read_rows
from codistill.fingerprints import INPUTS, Fingerprints, brief, changed, fingerprints
from codistill.grading import TAGS, Grader
from codistill.losses import make_policy_loss
from codistill.model.definition import check_trainable
from codistill.model.pretrained import check_models, end_token_ids, load_tokenizers
from codistill.model.shape import check_split
from codistill.output.loggers import check_loggers
from codistill.reward_functions import RewardFunction, load_functions
from codistill.templates import CHAT, DATE, asks_for_the_date
from codistill.texts import StopStrings, graded_text


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    tokenizer: Any
    end_token_ids: tuple[int, ...]
    """Tokens that end a completion of the writer."""
    problems: list[Problem]
    held_out: dict[str, list[Problem]]
    """By name of the set, "" where there is one without a name."""
    reward_functions: list[RewardFunction] = field(default_factory=list)
    changes: Changes = field(default_factory=dict)
    """Keys of the configuration that are not as before, where a run goes on."""
    fingerprints: Fingerprints = field(default_factory=dict)
    """What tells the files of problems and models from others."""
    stop: StopStrings | None = None
    """Texts that end a completion, besides `end_token_ids`."""
    skip_special_tokens: bool = True
    """Whether `text` has no special tokens."""

    def text(self, token_ids: list[int]) -> str:
        """The text of a completion, as it is graded: without the end token."""
        return graded_text(
            self.tokenizer,
            token_ids,
            self.end_token_ids,
            skip_special_tokens=self.skip_special_tokens,
        )


def has_gpu() -> bool:
    """Whether this process can train on a GPU."""
    import torch  # not above: mistakes in the configuration do not wait for it

    return torch.cuda.is_available()


def load_inputs(config: Config) -> Inputs:
    """Everything that can be wrong about a run, checked before a model is loaded.

    Raises:
        ConfigError: a setting of the loss, a tokenizer, a problem or a reward function is missing
            or wrong, or a run of this name is there that cannot go on with this configuration.
    """
    for name in config.trained:
        make_policy_loss(config, name)
    expected = "false: there is no GPU here whose memory the engine could leave"
    require(not config.rollout.sleep or has_gpu(), "rollout.sleep", True, expected)
    if distributed.is_first():
        check_loggers(config)
    sharers = config.rollout.tensor_parallel
    check_engine("rollout.", config.rollout.engine, sharers)
    check_models(config)
    check_split("rollout.tensor_parallel", sharers, config.model(config.writer).path)
    if config.evaluates_large and has_gpu():  # without one its server runs in one process
        check_split("rollout.tensor_parallel", sharers, config.model("large").path)
    tokenizer = load_tokenizers(config)
    for name in config.loaded:
        model = config.model(name)
        check_trainable(f"{name}.path", model.path, len(tokenizer), model.lora)
    ends = end_token_ids(f"{config.writer}.path", config.model(config.writer).path, tokenizer)
    limit = config.rollout.max_prompt_tokens
    with make_grader(config) as grader:
        terms: dict[str, Any] = dict(max_prompt_tokens=limit, grader=grader)
        problems = load_problems(
            "data.train", config.data, tokenizer, paths=config.data.train, **terms
        )
        held_out = {
            name: load_problems(held_out_key(name), config.data, tokenizer, paths=[path], **terms)
            for name, path in config.held_out.items()
        }
        if distributed.is_first():
            check_problems(config, problems, held_out, grader)
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
        if config.data.template == CHAT and asks_for_the_date(tokenizer):
            message = "data.template: the date that the chat template asks for is always %s"
            logging.getLogger(__name__).info(message, DATE)
        warn_of_hidden_tags(config, tokenizer)
    strings = tuple(config.rollout.stop)
    return Inputs(
        *(tokenizer, ends, problems, held_out, functions, changes, prints),
        stop=StopStrings(tokenizer, strings) if strings else None,
        skip_special_tokens=config.rollout.skip_special_tokens,
    )


def warn_of_hidden_tags(config: Config, tokenizer: Any) -> None:
    """Warn of tags that the format reward asks for and that no graded text will have."""
    if not (config.reward.format and config.rollout.skip_special_tokens):
        return

    def is_shown(tag: str, skip: bool) -> bool:
        ids = tokenizer.encode(tag, add_special_tokens=False)
        return tag in tokenizer.decode(ids, skip_special_tokens=skip)

    hidden = [tag for tag in TAGS if is_shown(tag, False) and not is_shown(tag, True)]
    if hidden:
        logging.getLogger(__name__).warning(
            "reward.format: %s are special tokens, which are not in the text that is graded; "
            "rollout.skip_special_tokens = false shows them",
            ", ".join(hidden),
        )


def check_problems(
    config: Config,
    problems: list[Problem],
    held_out: dict[str, list[Problem]],
    grader: Grader,
) -> None:
    """Raise ConfigError for an answer that cannot be graded; warn of what may be a mistake."""
    logger = logging.getLogger(__name__)
    sets = {"data.train": problems} | {held_out_key(n): found for n, found in held_out.items()}
    for key, found in sets.items():
        for file, golds in golds_of_files(found).items():
            grader.check_golds(key, file, golds)
        if fields := hidden_fields(config.data.problem_field, found):
            logger.warning("%s: no prompt shows the fields %s", key, ", ".join(fields))
    for key, found in sets.items():
        if count := contradictions(found):
            logger.warning("%s: %d problems occur again with another answer", key, count)
    for name, found in held_out.items():
        warn_of_size(name, len(found))
        if common := overlap(problems, found):
            logger.warning(
                "%s: %d of %d problems are in data.train too: they are not held out",
                *(held_out_key(name), common, len(found)),
            )


def make_grader(config: Config) -> Grader:
    """A grader with this process's share of the machine's cores."""
    return Grader(timeout=config.reward.timeout, processes=distributed.helpers())


def changes_of_run(config: Config, num_problems: int, prints: Fingerprints) -> Changes:
    """The keys that are not as before, if there is a checkpoint to go on from.

    prints: what the files of problems and models are now. Their paths may change, their contents
    may not, those of held-out problems excepted.

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
        if key in ("data.train", *(f"{name}.path" for name in config.loaded)):
            section, _, name = key.partition(".")
            value = config.model_dump(mode="json")[section][name]
            raise ConfigError(
                f"{key} = {value!r}: expected what the run began with, changed since: "
                f"{', '.join(names)}; a new name starts anew"
            )
        changes[f"contents of {key}"] = (brief(stored[key]), brief(prints[key]))
    return changes
