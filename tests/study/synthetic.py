"""Records that no run has made: curves with noise, in the form in which runs leave theirs."""

import random
from pathlib import Path

from study.methods import METHODS, Method
from study.problems import HELD_OUT
from study.record import Record

STEPS, EVERY = 16, 4
TIMES = {"rollout": 2.0, "score": 0.5, "update_small": 0.6, "update_large": 1.4, "step": 4.6}


def write_study(folder: Path, methods: list[str], seeds: range, reached: dict[str, float]) -> None:
    """A finished run of each method with each seed. reached: held-out accuracy that a method's
    models end with; 0.5 without an entry."""
    for name in methods:
        for seed in seeds:
            record = make_record(METHODS[name], seed, reached.get(name, 0.5))
            record.file = folder / name / f"seed_{seed}.json"
            record.write()


def make_record(method: Method, seed: int, reached: float) -> Record:
    """A finished run."""
    rng = random.Random(f"{method.name} {seed}")
    record = Record(method.name, seed, command="python train.py", versions={"torch": "2.13.0"})
    record.versions["commit"] = "abc1234"
    record.starts = [{"at": "2026-01-02T03:04:05+00:00", "status": "finished", "seconds": 9.0}]
    models = models_of(method)
    for step in range(0, STEPS + 1, EVERY):
        row: dict[str, float] = {"step": step}
        for model in models:
            rows = {
                f"{model}/{name}": 0.2 + (reached - 0.2) * step / STEPS + rng.gauss(0, 0.01)
                for name in HELD_OUT
            }
            row |= {model: sum(rows.values()) / len(rows)} | rows
        record.evaluations.append(row)
    record.metrics = {
        "reward/accuracy": [
            0.2 + (reached - 0.2) * k / STEPS + rng.gauss(0, 0.02) for k in range(STEPS)
        ],
        "reward/zero_fraction": [0.6 - 0.02 * k + rng.gauss(0, 0.02) for k in range(STEPS)],
        "rollout/mean_tokens": [27 + rng.gauss(0, 1) for _ in range(STEPS)],
    }
    record.metrics |= {
        f"time/{phase}": [seconds * rng.uniform(0.9, 1.1)] * STEPS
        for phase, seconds in TIMES.items()
        if phase != "update_large" or "large" in models
    }
    if "kd.alpha" in method.options:
        record.metrics["reward/kd"] = [-0.05 + 0.001 * k for k in range(STEPS)]
    return record


def models_of(method: Method) -> list[str]:
    """The models that a method trains."""
    if method.options.get("algorithm") == "grpo":
        return [method.options["grpo.model"]]
    return ["small"] if method.teacher else ["small", "large"]
