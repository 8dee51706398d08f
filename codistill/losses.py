"""The policy loss of each model in training, as the section `loss` of the configuration says it."""

import re
from dataclasses import fields
from typing import Any

from codistill.config import Config, ConfigError
from codistill_kernels import PolicyLoss

OF_THE_LARGE_MODEL = ("dual_clip", "log_ratio_clamp")
"""Settings of PolicyLoss that only the large model takes, under the keys loss.large_*."""
MESSAGE = re.compile(r"(\w+) must be (.*), got (.*)")
"""How codistill_kernels says that an argument is wrong: its name, what was expected, its value."""


def make_policy_loss(config: Config, name: str) -> PolicyLoss:
    """The loss that the model `name` ("small" or "large") learns by.

    Raises:
        ConfigError: a key of `loss` is out of range, or set and not used by loss.kind.
    """
    assert name in config.trained, name
    keys = {field.name: field.name for field in fields(PolicyLoss)}
    if name == "large":
        keys |= {setting: f"large_{setting}" for setting in OF_THE_LARGE_MODEL}
    given: dict[str, Any] = dict(config.loss)
    try:
        return PolicyLoss(**{setting: given[key] for setting, key in keys.items() if key in given})
    except ValueError as error:
        match = MESSAGE.fullmatch(str(error))
        assert match, error
        setting, expected, value = match.groups()
        raise ConfigError(f"loss.{keys[setting]} = {value}: expected {expected}") from error
