"""Memory and time of a step on GPUs, by formulas. Runs nothing.

machines.py   data sheets, and the shares of them that are reached
memory.py     what each GPU and the host hold in each phase
times.py      how long each phase takes
"""

from dataclasses import dataclass
from typing import Any

from codistill.config.plan import PlanOptions
from codistill.model.shape import ModelShape
from codistill.planning.memory import capacity, phase_bytes
from codistill.planning.times import (
    rollout_seconds,
    score_seconds,
    sync_seconds,
    update_seconds,
)


@dataclass(frozen=True)
class Phase:
    """What a phase of a step takes on each GPU."""

    name: str
    parts: dict[str, float]
    """Bytes, by what they hold."""
    seconds: float

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


def phases(options: PlanOptions, shapes: dict[str, ModelShape]) -> list[Phase]:
    """The phases of a step in their order; shapes: of the models that the algorithm loads."""
    seconds = {
        "rollout": rollout_seconds(options, shapes[options.writer]),
        "score": score_seconds(options, shapes),
        **{name: update_seconds(options, shapes[name]) for name in options.trained},
        "sync": sync_seconds(options, shapes[options.writer]),
    }
    labels = {name: f"update {name}" for name in options.trained}
    return [
        Phase(labels.get(name, name), phase_bytes(options, shapes, name), value)
        for name, value in seconds.items()
    ]


def most_bytes(options: PlanOptions, shapes: dict[str, ModelShape]) -> float:
    """Bytes of the phase that takes most."""
    return max(phase.bytes for phase in phases(options, shapes))


def fitting(options: PlanOptions, shapes: dict[str, ModelShape]) -> dict[str, Any]:
    """Keys and values that make the run fit; nothing if none of these do.

    The cheapest are tried first, and what a dearer one has made superfluous is left out again.
    """
    rollout, gpus = options.rollout, options.machine.gpus
    longest = rollout.max_prompt_tokens + rollout.max_completion_tokens
    tries = [
        ("training.gradient_checkpointing", "selective"),
        ("training.gradient_checkpointing", "full"),
        ("training.tokens_per_micro_batch", longest),
        ("rollout.sleep", True),
        ("training.offload", "optimizer"),
        ("training.offload", "all"),
        *(("machine.gpus", gpus * 2**power) for power in range(1, 8)),
    ]

    def needs(changes: dict[str, Any]) -> float:
        return most_bytes(with_changes(options, changes), shapes)

    changes: dict[str, Any] = {}
    for key, value in tries:
        tried = changes | {key: value}
        if needs(tried) < needs(changes):
            changes = tried
        if needs(changes) <= capacity(options):
            break
    else:
        return {}
    for key in reversed(tuple(changes)):
        others = {other: value for other, value in changes.items() if other != key}
        if needs(others) <= capacity(options):
            changes = others
    return changes


def with_changes(options: PlanOptions, changes: dict[str, Any]) -> PlanOptions:
    """The options with other values of some keys."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        changed = getattr(options, section).model_copy(update={name: value})
        options = options.model_copy(update={section: changed})
    return options
