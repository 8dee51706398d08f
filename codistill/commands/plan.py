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
    from codistill.planning import capacity, fitting, most_bytes, phases
    from codistill.planning.machines import GIB
    from codistill.planning.memory import host_bytes

    models = {name: options.model(name) for name in options.loaded}
    sharers = options.rollout.tensor_parallel
    check_split("rollout.tensor_parallel", sharers, models[options.writer].path)
    shapes = {
        name: model_shape(f"{name}.path", model.path, model.lora) for name, model in models.items()
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
    if on_host := host_bytes(options, shapes):
        each, of = sum(on_host.values()) / GIB, ", ".join(on_host)
        together = each * min(options.machine.gpus, options.machine.gpus_per_node)
        text = f"The host's memory: {together:.0f} GiB on each node, {each:.1f} per process ({of})."
        console.print(text, highlight=False)
    if most > room:
        changes = fitting(options, shapes)
        text = " ".join(f"--{key} {value}" for key, value in changes.items())
        console.print(f"fits with: {text}" if changes else "nothing that is known makes it fit")


def table(options: PlanOptions, found: list) -> Any:
    """A row per phase, a column per kind of memory."""
    from rich.table import Table

    from codistill.planning.machines import GIB

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
