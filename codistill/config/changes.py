"""What differs between two configurations of one run, and what may, when the run goes on."""

from typing import Any

from codistill.config.schema import Config

MAY_CHANGE = (
    *("output_dir", "training.steps", "training.epochs", "evaluation", "checkpoint"),
    *("distributed", "log", "reward.function_timeout", "rollout.servers"),
)
"""Keys and sections that say how long a run is, how long it waits and what it writes, not what a
step computes."""

Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> its value before and its value now; None where there is no such key."""


def changes_between(before: Config, now: Config) -> Changes:
    """All keys whose values differ."""
    old, new = (flatten(config.model_dump(mode="json")) for config in (before, now))
    return {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}


def may_change(key: str) -> bool:
    """Whether a run can go on with another value of this dotted key."""
    return key in MAY_CHANGE or key.partition(".")[0] in MAY_CHANGE


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"kd": {"alpha": 1.0}} -> {"kd.alpha": 1.0}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
