"""python -m codistill report RUN

Draw the curves and print the summary of a run that has ended.
"""

import json
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from codistill.config import load_options, require
from codistill.config.base import CommandOptions


class ReportOptions(CommandOptions):
    """Draw the curves and print the summary of a run that has ended."""

    model_config = SettingsConfigDict(cli_prog_name="python -m codistill report")

    run: CliPositionalArg[Path] = Field(description="the folder of one run")


def main(arguments: list[str]) -> None:
    """Draw the curves and print the summary of a run again."""
    folder = load_options(ReportOptions, arguments).run
    require((folder / "summary.json").is_file(), "run", str(folder), "a run that has ended")
    from rich.console import Console

    from codistill.output.console import print_summary
    from codistill.output.report import plot

    plot(folder)
    print_summary(Console(), json.loads((folder / "summary.json").read_text()), folder)
