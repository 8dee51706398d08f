"""What every section of the configuration is made of."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A mistake of the user's: one line that names the key, its value and what was expected."""


def require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
