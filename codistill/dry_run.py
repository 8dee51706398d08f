"""A dry run: everything is checked as at a start, and what would run is printed."""

import math
from collections.abc import Iterable, Iterator

import torch
import yaml

from codistill import checkpoint, distributed
from codistill.config import Config
from codistill.data import Problem
from codistill.engine import engine_kind
from codistill.inputs import Inputs, load_inputs
from codistill.model.pretrained import num_parameters
from codistill.run import quiet_libraries

CHECKPOINT_BYTES = 12  # per weight: fp32, and two moments of AdamW


def dry_run(config: Config) -> None:
    """Check what a start checks before a model is loaded; print the configuration and, as comments
    below it, the plan of a step. Nothing is written: no folder is made and no lock taken.

    Raises:
        ConfigError: as `load_inputs`.
    """
    quiet_libraries()
    inputs = load_inputs(config)
    if distributed.is_first():
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        for name, text in plan(config, inputs, distributed.world_size()):
            print(f"# {name + ':':<19} {text}")


def plan(config: Config, inputs: Inputs, processes: int) -> Iterator[tuple[str, str]]:
    """What would run on so many processes: pairs of a name and a text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = engine_kind(config.rollout.engine)
    sharers = config.rollout.tensor_parallel
    shared = f", shared by {sharers} processes each" if sharers > 1 else ""
    yield "processes", f"{processes} on {device}, rollout engine {engine}{shared}"
    sizes = {name: num_parameters(config.model(name).path) for name in config.loaded}
    for name, size in sizes.items():
        yield f"{name} model", f"{size:,} parameters, {role(config, name)}"
    yield from steps(config, inputs)
    yield from one_step(config, inputs.problems, processes)
    trained = sum(sizes[name] for name in config.trained)
    yield from between_steps(config, inputs, trained)
    yield "files", str(config.output_dir / config.name)
    yield "loggers", ", ".join(["metrics.jsonl", *config.log.to])


def role(config: Config, name: str) -> str:
    """What a model does in a run."""
    parts = ["writes the rollouts"] if name == config.writer else []
    if name not in config.trained:
        return ", ".join([*parts, "frozen"])
    parts += [f"learns at {config.model(name).learning_rate:g}"]
    return ", ".join([*parts, "a frozen copy as reference"] if config.loss.beta else parts)


def steps(config: Config, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """How long the run is, and how much of it is done."""
    total = config.total_steps(len(inputs.problems))
    done = checkpoint.latest(config.output_dir / config.name / "checkpoints") or 0
    text = f"{total:,} of {len(inputs.problems):,} problems"
    yield "steps", f"{text}, {done:,} of them done" if done else text
    count = total * config.optimizer_steps
    yield "optimizer steps", f"{count:,} for each model that learns"


def one_step(
    config: Config, problems: Iterable[Problem], processes: int
) -> Iterator[tuple[str, str]]:
    """What a step consists of; numbers that depend on what is written are the largest possible."""
    rollout, kept = config.rollout, config.kept
    prompts, generations = rollout.prompts_per_step, rollout.num_generations
    prompt = max(len(problem.prompt_ids) for problem in problems)
    length = prompt + rollout.max_completion_tokens
    yield "prompts per step", f"{prompts:,}, {prompts // processes:,} for each process"
    text = f"{prompts * generations:,}, M = {generations} per prompt"
    rounds = rollout.sampling_rounds
    yield "rollouts", text + (f", in each of at most {rounds} rounds" if rounds > 1 else "")
    yield "trained on", f"{prompts * kept:,}, G = {kept} per prompt"
    tokens = prompts * generations * length
    parts = f"{prompt:,} of a prompt and {rollout.max_completion_tokens:,} of a completion"
    yield "tokens", f"at most {tokens:,}, with {parts}"
    # `pack` puts at least this many rollouts into every row but the last.
    fit = config.training.tokens_per_micro_batch // length
    share = prompts // processes
    mini_batches = config.training.mini_batches
    scored = math.ceil(share * generations / fit)
    trained = mini_batches * math.ceil(share * kept / mini_batches / fit)
    counts = f"{scored:,} to score and {trained:,} to train each model"
    yield "micro-batches", f"at most {counts}, on each process"


def between_steps(config: Config, inputs: Inputs, weights: int) -> Iterator[tuple[str, str]]:
    """Evaluations and checkpoints of the whole run; weights: how many are trained."""
    total = config.total_steps(len(inputs.problems))
    count = len(multiples(config.evaluation.every, total)) + 1  # before the first step, too
    yield "evaluations", f"{count:,}, each of {sum(map(len, inputs.held_out.values())):,} problems"
    count = len(multiples(config.checkpoint.every, total))
    each = f"{count:,}, each of {weights * CHECKPOINT_BYTES / 2**30:.2g} GiB"
    yield "checkpoints", f"{each}; the last {config.checkpoint.keep} are kept"


def multiples(every: int, total: int) -> list[int]:
    """Steps after which something is done that is done every so many steps and after the last."""
    return sorted({*range(every, total + 1, every), total})
