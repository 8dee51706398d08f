"""python -m codistill report RUN [RUN ...] [--output FILE] [--rollouts N]

Write one HTML page about runs, finished or not, laid over each other; draw the curves and print the
summary of each run that has ended.
"""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from codistill.config import ConfigError, load_options, require
from codistill.config.base import CommandOptions, UserPath


class ReportOptions(CommandOptions):
    """Write one HTML page about runs, and print the summary of those that have ended."""

    model_config = SettingsConfigDict(cli_prog_name="python -m codistill report")

    runs: CliPositionalArg[list[UserPath]] = Field(
        min_length=1,
        description="folders of runs; those that differ only in their seed are one curve",
    )
    output: UserPath | None = Field(
        None, description="the page; default: report.html in the run's folder, or here for several"
    )
    rollouts: int = Field(200, ge=0, description="most rollouts per run that the page holds")


def main(arguments: list[str]) -> None:
    """Write the page; print the summary of each run, or how far it has come."""
    options = load_options(ReportOptions, arguments)
    from codistill.output.page.runs import is_run, load_runs

    for folder in options.runs:
        require(is_run(folder), "run", str(folder), "the folder of a run")
    from rich.console import Console

    from codistill.output.console import print_summary
    from codistill.output.curves import plot
    from codistill.output.page.build import write_page

    console = Console()
    output = options.output or page_of(options.runs)
    runs = load_runs(options.runs)
    try:
        for run in runs:
            if run.is_finished:
                plot(run.folder)
                print_summary(console, run.summary, run.folder)
            else:
                console.print(f"{run.folder}: not finished, {run.steps} steps done", soft_wrap=True)
        notices = write_page(output, runs, rollouts=options.rollouts)
    except OSError as error:
        raise ConfigError(
            f"output = {str(output)!r}: expected a file to write to: {error}"
        ) from error
    for line in notices:
        console.print(line, soft_wrap=True, highlight=False)
    size = output.stat().st_size / 1e6
    console.print(f"  {output}  the page, {size:.1f} MB", soft_wrap=True, highlight=False)


def page_of(runs: list[Path]) -> Path:
    """Where the page is written if nobody says: beside the files of the one run, or here."""
    return runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
