"""The command eval: every model writes and is graded on every set, once per seed."""

import contextlib
import hashlib
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

import codistill_kernels
from codistill import distributed, failures
from codistill.comparing import GRADER_VERSION
from codistill.config import require
from codistill.config.data import RewardConfig
from codistill.config.evaluation import EvalOptions
from codistill.data import Problem, load_problems, warn_of_size
from codistill.engine import Engine, EngineSpec, check_engine, engine_kind, make_engine
from codistill.evaluation import answer
from codistill.failures import phase
from codistill.fingerprints import of_data, of_model
from codistill.grading import Grader
from codistill.model.policy import DTYPES
from codistill.model.pretrained import check_model, end_token_ids, load_tokenizer
from codistill.model.shape import check_split
from codistill.output.evaluation_files import (
    SETTINGS,
    check_settings,
    is_finished,
    seed_file,
    write_json,
    write_seed,
)
from codistill.output.evaluation_table import summarize, write_tables
from codistill.output.run_directory import check_shared, folder_lock
from codistill.run import quiet_libraries
from codistill.texts import StopStrings, graded_text
from codistill.versions import installed
from codistill.voting import find_answers

NEXT_MODEL = -1
"""In the place of an exit code: other models are left, each for a process that starts anew."""

STARTS = "CODISTILL_EVAL_STARTS"
"""Environment variable: how often this process has started anew."""

TIMEOUT = 3600.0
"""Seconds to wait for another process at the end of a seed; chosen, untested."""

ANY_LENGTH = 10**9  # tokens; the model's positions are the limit


@dataclass(frozen=True)
class Model:
    """A model, and the sets as its tokenizer reads them."""

    label: str
    path: str
    prints: dict[str, str]
    """Fingerprints of its files."""
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    sets: dict[str, list[Problem]]

    @property
    def folder(self) -> str:
        """Name of the folder for its seeds, which another model never has."""
        content = repr(sorted(self.prints.items()) or self.path)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        return f"{Path(self.path).name}-{digest}"


def run(options: EvalOptions, environment: dict[str, str]) -> int:
    """Evaluate one model after the other, and write the tables; the exit code.

    Each model has a process that starts anew, under the same id: an engine leaves process groups
    and memory behind that the next one would stumble over. Seeds that are finished are kept, so the
    process only has to run the same command again.

    environment: in which the process was started.

    Raises:
        ConfigError: an option or an input is missing or wrong; no model was loaded.
    """
    quiet_libraries()
    starts = int(environment.get(STARTS, "0"))
    code = failures.exit_code(lambda: evaluate(options, starts), options.output)
    if code == NEXT_MODEL:
        sys.stdout.flush()
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, environment | {STARTS: str(starts + 1)})
    return code


def evaluate(options: EvalOptions, starts: int) -> int:
    """Finish the first model that lacks seeds; NEXT_MODEL if there are others, else 0."""
    console = Console(quiet=not distributed.is_first())
    make_grader = Grader(timeout=RewardConfig().timeout, processes=distributed.helpers())
    with make_grader as grader, contextlib.ExitStack() as stack:
        with phase("loading"):
            models = load_models(options, grader)
        stack.enter_context(folder_lock(options.output, "output", options.output))
        failures.forget(options.output)
        settings = check_settings(options.output, settings_of(options))
        if distributed.is_first() and starts == 0:
            check_sets(options, models[0].sets, grader)
            write_json(options.output / SETTINGS, settings)
        todo = finish_first_model(options, models, grader, console, starts)
        if todo:
            return NEXT_MODEL
        if distributed.is_first():
            with phase("summary"):
                results = summarize(options, models, settings, grader)
                write_tables(results, options.output, console)
    return 0


def load_models(options: EvalOptions, grader: Grader) -> list[Model]:
    """Everything that can be wrong about the options, checked before a model is loaded."""
    check_engine("", options.engine, options.tensor_parallel)
    models = []
    for label, path in zip(labels(options.model), options.model, strict=True):
        positions = check_model("model", path)
        check_split("tensor_parallel", options.tensor_parallel, path)
        tokenizer = load_tokenizer("model", path)
        sets = {name: load_set(options, name, tokenizer, grader) for name in options.sets}
        limit = longest_prompt(sets) + options.max_tokens
        require(
            positions is None or limit <= positions,
            "max_tokens",
            options.max_tokens,
            f"no more than the {positions} positions of {path} less the longest prompt of "
            f"{longest_prompt(sets)} tokens",
        )
        ends = end_token_ids("model", path, tokenizer)
        models.append(Model(label, path, of_model(path), tokenizer, ends, sets))
    return models


def labels(paths: list[str]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def load_set(options: EvalOptions, name: str, tokenizer: Any, grader: Grader) -> list[Problem]:
    problems = load_problems(
        f"data.{name}",
        options,
        tokenizer,
        paths=[options.sets[name]],
        max_prompt_tokens=ANY_LENGTH,
        grader=grader,
    )
    return problems[: options.limit]


def longest_prompt(sets: dict[str, list[Problem]]) -> int:
    return max(len(problem.prompt_ids) for problems in sets.values() for problem in problems)


def settings_of(options: EvalOptions) -> dict[str, Any]:
    """What the numbers depend on besides the models and their seeds."""
    versions = {"python": sys.version.split()[0], "codistill": codistill_kernels.__version__}
    return {
        "template": options.template,
        "system": options.system,
        "chat_template_arguments": options.chat_template_arguments,
        "stop": options.stop,
        "skip_special_tokens": options.skip_special_tokens,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "limit": options.limit,
        "engine": engine_kind(options.engine),
        "dtype": options.dtype,
        "grader": {"name": "math-verify, as codistill.grading uses it", "version": GRADER_VERSION},
        "versions": versions | installed(),
        "data": {n: of_data(f"data.{n}", [path]) for n, path in options.sets.items()},
    }


def check_sets(options: EvalOptions, sets: dict[str, list[Problem]], grader: Grader) -> None:
    """Raise ConfigError for an answer that cannot be graded; warn of a set of unusual size."""
    for name, problems in sets.items():
        golds = [problem.answers for problem in problems]
        grader.check_golds(f"data.{name}", options.sets[name], golds)
        if options.limit is None:
            warn_of_size(name, len(problems))


def finish_first_model(
    options: EvalOptions, models: list[Model], grader: Grader, console: Console, starts: int
) -> bool:
    """Write the seeds that are missing of the first model that lacks any; whether others do."""
    with phase("loading"):
        device = distributed.start(TIMEOUT, f"start {starts}")
        check_shared(options.output, "output", options.output)
    engine: Engine | None = None
    try:
        todo = [(model, missing) for model in models if (missing := missing_seeds(options, model))]
        if todo:
            model, missing = todo[0]
            console.print(f"loading {model.label} ...", highlight=False)
            with phase("loading"):
                engine = make_engine(options.engine, engine_spec(options, model, device))
            console.print(f"engine: {engine.name}, {dist.get_world_size()} processes")
            for name, seed in missing:
                write_answers(options, model, name, seed, engine, grader, console)
        dist.barrier()  # a process that ends early closes connections that others still use
        return len(todo) > 1
    finally:
        if engine is not None:
            engine.close()
        if dist.is_initialized():  # vLLM takes the group down with itself
            dist.destroy_process_group()


def missing_seeds(options: EvalOptions, model: Model) -> list[tuple[str, int]]:
    """Each set and seed that the model has no file of. Collective."""
    return [
        (name, seed)
        for name in options.sets
        for seed in range(options.seeds)
        if not is_finished(seed_file(options.output, model.folder, name, seed))
    ]


def engine_spec(options: EvalOptions, model: Model, device: Any) -> EngineSpec:
    return EngineSpec(
        path=model.path,
        vocab_size=len(model.tokenizer),
        end_token_ids=model.end_token_ids,
        max_model_tokens=longest_prompt(model.sets) + options.max_tokens,
        dtype=DTYPES[options.dtype],
        device=device,
        kv_cache_gib=options.kv_cache_gib,
        stop=StopStrings(model.tokenizer, tuple(options.stop)) if options.stop else None,
        tensor_parallel=options.tensor_parallel,
        path_key="model",
        section="",
    )


def write_answers(
    options: EvalOptions,
    model: Model,
    name: str,
    seed: int,
    engine: Engine,
    grader: Grader,
    console: Console,
) -> None:
    """Let the engine answer a set with one seed, and write the file of that. Collective."""
    problems, started = model.sets[name], time.perf_counter()
    text = partial(
        graded_text,
        model.tokenizer,
        end_token_ids=model.end_token_ids,
        skip_special_tokens=options.skip_special_tokens,
    )
    with phase("generate"):
        answers = answer(
            engine,
            grader,
            text,
            problems,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            seed=seed,
        )
        columns: dict[str, list] = {
            "number": answers.indices,
            "problem": [problems[number].problem for number in answers.indices],
            "gold": [" or ".join(problems[number].answers) for number in answers.indices],
            "completion": answers.texts,
            "answer": find_answers(grader, answers.texts),
            "correct": answers.correct,
            "tokens": answers.tokens,
            "truncated": answers.truncated,
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        gathered: list[list[dict]] | None = None
        if distributed.is_first():
            gathered = [[]] * dist.get_world_size()
        dist.gather_object(rows, gathered)
    if gathered is None:
        return
    rows = sorted((row for part in gathered for row in part), key=lambda row: row["number"])
    with phase("write"):
        path = seed_file(options.output, model.folder, name, seed)
        write_seed(path, rows, failures=answers.failures, timeouts=answers.timeouts)
    accuracy = sum(row["correct"] for row in rows) / len(rows)
    seconds = time.perf_counter() - started
    console.print(
        f"{model.label}  {name}  seed {seed}: {accuracy:.2%}  {seconds:.0f} s", highlight=False
    )
