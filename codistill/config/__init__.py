"""Configuration of a run: typed, complete, checked before anything is loaded. Imports no torch."""

from codistill.config.base import ConfigError, require
from codistill.config.load import load_config, load_options
from codistill.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config", "load_options", "require"]
