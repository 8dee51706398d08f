"""Read a `Config` from a YAML file and the command line, and the options of other commands from
their command lines; a mistake is said in one line."""

import argparse
import difflib
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp, SettingsError

from codistill.config.base import CommandOptions, ConfigError, printable, section_of, shown
from codistill.config.read_yaml import read_yaml
from codistill.config.schema import Config

Options = TypeVar("Options", bound=CommandOptions)


Configuration = TypeVar("Configuration", bound=Config)


@overload
def load_config(arguments: list[str]) -> Config: ...
@overload
def load_config(arguments: list[str], model: type[Configuration]) -> Configuration: ...
def load_config(arguments: list[str], model: type[Config] = Config) -> Config:
    """Read `--config FILE --section.key value ...`.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong.
        SystemExit: `--help` was asked for (code 0).
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        known, overrides = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"--config: {error.message}") from error
    content = read_yaml(known.config) if known.config else {}
    for key, value in content.items():  # some names are arguments of CliApp.run
        if key not in model.model_fields:
            raise ConfigError(unknown_key(model, key, value))
    return load_options(model, overrides, **content)


def load_options(model: type[Options], arguments: list[str], **values: Any) -> Options:
    """Read the options of a command; those of `arguments` win over `values`.

    Raises:
        ConfigError: a key or value is wrong.
        SystemExit: `--help` was asked for (code 0).
    """
    if model.model_config.get("cli_kebab_case"):
        arguments = [with_dashes(word) for word in arguments]
    try:
        return CliApp.run(model, cli_args=arguments, cli_exit_on_error=False, **values)
    except SettingsError as error:
        raise ConfigError(explain_argument(model, str(error))) from error
    except ValidationError as error:
        raise ConfigError(explain_field(model, error)) from error


def with_dashes(word: str) -> str:
    """--max_tokens=9 -> --max-tokens=9: an option may be named as messages name its key."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def field_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of the configuration, dotted."""
    keys = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section:
            keys += field_keys(section, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def explain_argument(model: type[BaseModel], message: str) -> str:
    """One line for an argument that the command line does not know."""
    words = message.split()
    unknown = next((word for word in words if word.startswith("--")), None)
    if unknown is None or "unrecognized" not in message:
        return " ".join(words)
    key, _, value = unknown[2:].partition("=")
    rest = words[words.index(unknown) + 1 :]
    return unknown_key(model, key, value or (rest[0] if rest else ""))


def unknown_key(model: type[BaseModel], key: str, value: object) -> str:
    """One line for an unknown key, with the known key that is most like it."""
    near = most_like(key, field_keys(model))
    hint = f"did you mean {near}?" if near else "see --help for all keys"
    return f"{printable(key)} = {shown(value)}: expected a known key; {hint}"


def most_like(key: str, keys: list[str]) -> str | None:
    """The known key that an unknown one may stand for: one of its section with a name like its own,
    else one of another section with the same name; None without one."""
    section, _, name = key.rpartition(".")
    parts = [known.rpartition(".") for known in keys]
    here = [known for known_section, _, known in parts if known_section == section]
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.7)
    near = near or [known for known in here if known.startswith(name)]
    if near:
        return f"{section}.{near[0]}" if section else near[0]
    same = [known for known, part in zip(keys, parts, strict=True) if part[2] == name]
    if not here:  # the section may be misspelled, too
        same = same or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
    return same[0] if same else None


def explain_field(model: type[BaseModel], error: ValidationError) -> str:
    """One line for the first wrong field."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    original = first.get("ctx", {}).get("error")
    if isinstance(original, ConfigError):
        return f"{key}.{original}" if key else str(original)
    if first["type"] == "extra_forbidden":
        return unknown_key(model, key, first["input"])
    if first["type"] == "missing":
        return f"{key} is missing: expected {describe(model, key)}"
    message = str(original or first["msg"])
    if first["type"] == "model_type":
        message = "expected a section, with keys of its own"
    return f"{printable(key)} = {shown(first['input'])}: {message[0].lower()}{message[1:]}"


def describe(model: type[BaseModel], key: str) -> str:
    """The description of a dotted key."""
    section: Any = model
    for part in key.split("."):
        field = section.model_fields[part]
        section = section_of(field.annotation)
    return field.description
