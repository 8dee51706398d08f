"""The base class of every section of the configuration, and how a mistake in one is said."""

import os
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

LONGEST_VALUE = 200  # characters of a value that a message shows; chosen, untested


class ConfigError(ValueError):
    """A mistake of the user's: one line that names the key, its value and what was expected."""


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ConfigError(key = value: expected ...) unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} = {shown(value)}: expected {expected}")


def check_temperature(temperature: float) -> None:
    """Raise ConfigError for a temperature of evaluation that no engine samples at."""
    can_sample = temperature == 0 or temperature >= 0.01
    require(can_sample, "temperature", temperature, "0, or at least 0.01")


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def printable(text: str) -> str:
    """A key or a text of a file as a message shows it: on one line, no control characters."""
    return shown(text)[1:-1]


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as its first line goes."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def expanded(path: str) -> str:
    """The path with the home directory for a leading `~`."""
    if not path or "\0" in path:
        raise ValueError("expected a path")
    return os.path.expanduser(path)


UserPath = Annotated[Path, AfterValidator(lambda path: Path(expanded(str(path))))]
"""A path as users write it, `~` included."""
UserPathOrName = Annotated[str, AfterValidator(expanded)]
"""A path as users write it, or a name on the Hugging Face Hub."""


class Section(BaseModel):
    """Keys that belong together; an unknown key is an error, and so is a number that is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise ValueError for a true or false that pydantic would read as 1 or 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_table = isinstance(value, dict) and section_of(annotation) is None
        values = value.values() if is_table else [value]
        if not mentions(annotation, bool) and any(isinstance(item, bool) for item in values):
            raise ValueError("expected no true or false")
        return value


class CommandOptions(Section, BaseSettings):
    """What a command reads: from its command line and nowhere else, the environment included."""

    model_config = SettingsConfigDict(cli_avoid_json=True)

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: Any, **sources: Any
    ) -> tuple:
        return (init_settings,)  # CliApp puts the command line before this


def mentions(annotation: Any, kind: type) -> bool:
    """Whether a value of this type may be, or may hold, one of type `kind`."""
    return annotation is kind or any(mentions(part, kind) for part in get_args(annotation))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds; None if the field holds a plain value."""
    kinds = (annotation, *get_args(annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
