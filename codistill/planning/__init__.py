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
    """Keys and values that make the run fit, the cheapest first; nothing if none of these do."""
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
    changes: dict[str, Any] = {}
    needed = most_bytes(options, shapes)
    for key, value in tries:
        section, _, name = key.partition(".")
        changed = getattr(options, section).model_copy(update={name: value})
        tried = options.model_copy(update={section: changed})
        if most_bytes(tried, shapes) >= needed:
            continue
        options, needed, changes = tried, most_bytes(tried, shapes), changes | {key: value}
        if needed <= capacity(options):
            return changes
    return {}
