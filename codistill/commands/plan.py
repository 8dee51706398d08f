"""python -m codistill plan --config FILE [--machine.gpus 8] [--section.key value ...]

Memory and time of each phase of a step on each GPU, by formulas, and what makes it fit.
"""

from typing import Any

from codistill.config import load_config
from codistill.config.plan import PlanOptions


def main(arguments: list[str]) -> None:
    """Print the plan of a configuration."""
    options = load_config(arguments, PlanOptions)
    options.check_processes(options.machine.gpus)
    from rich.console import Console

    from codistill.model.shape import check_split, model_shape
    from codistill.planning import GIB, capacity, fitting, most_bytes, phases

    writer, sharers = options.model(options.writer), options.rollout.tensor_parallel
    check_split("rollout.tensor_parallel", sharers, writer.path)
    shapes = {
        name: model_shape(f"{name}.path", options.model(name).path) for name in options.loaded
    }
    found = phases(options, shapes)
    console = Console()
    console.print(table(options, found))
    most, room = most_bytes(options, shapes), capacity(options)
    verdict = "fits" if most <= room else "does not fit"
    console.print(
        f"{verdict}: {most / GIB:.1f} of {room / GIB:.0f} GiB; a step takes about "
        f"{sum(phase.seconds for phase in found):.0f} s. Times are for completions of "
        f"{options.mean_completion:g} tokens on average (--machine.mean_completion_tokens) and "
        "have never been compared with a GPU.",
        highlight=False,
    )
    if most > room:
        changes = fitting(options, shapes)
        text = " ".join(f"--{key} {value}" for key, value in changes.items())
        console.print(f"fits with: {text}" if changes else "nothing that is known makes it fit")


def table(options: PlanOptions, found: list) -> Any:
    """A row per phase, a column per kind of memory."""
    from rich.table import Table

    from codistill.planning import GIB

    machine = options.machine
    made = Table(title=f"{options.name}: GiB on each of {machine.gpus} {machine.gpu}")
    columns = list(dict.fromkeys(part for phase in found for part in phase.parts))
    for column in ("phase", *columns, "total", "time (s)"):
        made.add_column(column, justify="left" if column == "phase" else "right")
    for phase in found:
        parts = [phase.parts.get(column) for column in columns]
        numbers = ["" if part is None else f"{part / GIB:.1f}" for part in parts]
        made.add_row(phase.name, *numbers, f"{phase.bytes / GIB:.1f}", f"{phase.seconds:.1f}")
    return made
