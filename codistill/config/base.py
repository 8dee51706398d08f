"""The base class of every section of the configuration, and how a mistake in one is said."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A mistake of the user's: one line that names the key, its value and what was expected."""


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ConfigError(key = value: expected ...) unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


class Section(BaseModel):
    """Keys that belong together; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
