"""Memory and time of a step on GPUs, by formulas. Runs nothing.

machines.py   data sheets, and the shares of them that are reached
memory.py     what each GPU and the host hold in each phase
times.py      how long each phase takes
"""

import math
from dataclasses import dataclass
from typing import Any

from codistill.config import ConfigError
from codistill.config.plan import PlanOptions
from codistill.model.shape import ModelShape, check_split
from codistill.planning.memory import capacity, phase_bytes
from codistill.planning.times import (
    rollout_seconds,
    score_seconds,
    sync_seconds,
    update_seconds,
)

Changes = dict[str, Any]
"""Keys of the configuration and other values of them."""


@dataclass(frozen=True)
class Phase:
    """What a phase takes on each GPU."""

    name: str
    parts: dict[str, float]
    """Bytes, by what they hold."""
    seconds: float = 0.0
    """Nothing for an evaluation, which is no part of a step."""

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


def phases(options: PlanOptions, shapes: dict[str, ModelShape]) -> list[Phase]:
    """The phases of a step in their order, and the evaluation of the large model.

    shapes: of the models that the algorithm loads.
    """
    seconds = {
        "rollout": rollout_seconds(options, shapes[options.writer]),
        "score": score_seconds(options, shapes),
        **{name: update_seconds(options, shapes[name]) for name in options.trained},
        "sync": sync_seconds(options, shapes[options.writer]),
    }
    labels = {name: f"update {name}" for name in options.trained}
    found = [
        Phase(labels.get(name, name), phase_bytes(options, shapes, name), value)
        for name, value in seconds.items()
    ]
    if options.evaluates_large:
        found.append(Phase("evaluate", phase_bytes(options, shapes, "evaluate")))
    return found


def check_engines(options: PlanOptions) -> None:
    """Raise ConfigError unless processes divide evenly over prompts, replicas and engines, and
    engines can share the models that they run."""
    options.check_processes(options.machine.gpus)
    sharers = options.rollout.tensor_parallel
    for name in (options.writer, "large") if options.evaluates_large else (options.writer,):
        check_split("rollout.tensor_parallel", sharers, options.model(name).path)


def lacking_bytes(options: PlanOptions, shapes: dict[str, ModelShape]) -> float:
    """Bytes that all phases together take beyond what a GPU has; infinite for options that a run
    would refuse."""
    try:
        check_engines(options)
    except ConfigError:
        return math.inf
    room = capacity(options)
    return sum(max(0.0, phase.bytes - room) for phase in phases(options, shapes))


def ways_to_fit(options: PlanOptions) -> list[tuple[str, Any]]:
    """Keys and values that take less memory, the cheapest first.

    An engine is shared within a node, where NVLink is, and by as many processes as divide those of
    the node.
    """
    rollout, gpus = options.rollout, options.machine.gpus
    longest = rollout.max_prompt_tokens + rollout.max_completion_tokens
    here = min(gpus, options.machine.gpus_per_node)
    is_shared = rollout.engine in ("auto", "vllm")
    more = range(rollout.tensor_parallel + 1, here + 1) if is_shared else ()
    return [
        ("training.gradient_checkpointing", "selective"),
        ("training.gradient_checkpointing", "full"),
        ("training.tokens_per_micro_batch", longest),
        ("rollout.sleep", True),
        *(("rollout.tensor_parallel", sharers) for sharers in more if here % sharers == 0),
        ("training.offload", "optimizer"),
        ("training.offload", "all"),
        ("evaluation.large", "never"),
        *(("machine.gpus", gpus * 2**power) for power in range(1, 8)),
    ]


def fitting(options: PlanOptions, shapes: dict[str, ModelShape]) -> Changes:
    """Keys and values that make the run fit; nothing if none of these do.

    The cheapest are tried first, and what a dearer one has made superfluous is left out again, or
    takes a cheaper value.
    """
    ways = ways_to_fit(options)

    def lacks(changes: Changes) -> float:
        return lacking_bytes(with_changes(options, changes), shapes)

    changes: Changes = {}
    for key, value in ways:
        tried = changes | {key: value}
        if lacks(tried) < lacks(changes):
            changes = tried
        if not lacks(changes):
            break
    else:
        return {}
    for key in reversed(tuple(changes)):
        others = {other: value for other, value in changes.items() if other != key}
        cheaper = [others, *(changes | {key: value} for name, value in ways if name == key)]
        changes = next(tried for tried in cheaper if not lacks(tried))
    return changes


def with_changes(options: PlanOptions, changes: Changes) -> PlanOptions:
    """The options with other values of some keys."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        changed = getattr(options, section).model_copy(update={name: value})
        options = options.model_copy(update={section: changed})
    return options
