"""python -m codistill plan --config FILE [--machine.gpus 8] [--section.key value ...]

Memory and time of each phase of a step on each GPU, by formulas, and what makes it fit.
"""

from typing import Any

from codistill.config import load_config
from codistill.config.plan import PlanOptions


def main(arguments: list[str]) -> None:
    """Print the plan of a configuration."""
    options = load_config(arguments, PlanOptions)
    from rich.console import Console

    from codistill.model.shape import model_shape
    from codistill.planning import check_engines, fitting, phases
    from codistill.planning.memory import capacity, host_bytes

    check_engines(options)
    models = {name: options.model(name) for name in options.loaded}
    shapes = {
        name: model_shape(f"{name}.path", model.path, model.lora) for name, model in models.items()
    }
    found, room = phases(options, shapes), capacity(options)
    console = Console(highlight=False)
    console.print(table(options, found))
    console.print(verdict(options, found, room))
    if options.evaluates_large:
        console.print(evaluation_text(options))
    if on_host := host_bytes(options, shapes):
        console.print(host_text(options, on_host))
    if any(phase.bytes > room for phase in found):
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
        seconds = f"{phase.seconds:.1f}" if phase.seconds else ""
        made.add_row(phase.name, *numbers, f"{phase.bytes / GIB:.1f}", seconds)
    return made


def verdict(options: PlanOptions, found: list, room: float) -> str:
    """Whether all phases fit, which do not, and how long a step takes."""
    from codistill.planning.machines import GIB

    most = max(phase.bytes for phase in found)
    lacking = ", ".join(phase.name for phase in found if phase.bytes > room)
    fits = f"does not fit ({lacking})" if lacking else "fits"
    return (
        f"{fits}: {most / GIB:.1f} of {room / GIB:.0f} GiB; a step takes about "
        f"{sum(phase.seconds for phase in found):.0f} s. Times are for completions of "
        f"{options.mean_completion:g} tokens on average (--machine.mean_completion_tokens) and "
        "have never been compared with a GPU."
    )


def evaluation_text(options: PlanOptions) -> str:
    """When and where the large model is evaluated, and the key that leaves it out."""
    always = options.evaluation.large == "always"
    when = "with each evaluation" if always else "before the first and after the last step"
    sharers = options.rollout.tensor_parallel
    gpus = "GPU" if sharers == 1 else f"{sharers} GPUs"
    where = f"a vLLM server on the first {gpus} of each node"
    if options.rollout.engine == "hf":
        where = "a second engine on each GPU"
    return (
        f"evaluate: the large model, {when}, by {where} beside all else there; "
        "--evaluation.large never leaves it out."
    )


def host_text(options: PlanOptions, on_host: dict[str, float]) -> str:
    """What the host must hold, and for which keys."""
    from codistill.planning.machines import GIB

    each, of = sum(on_host.values()) / GIB, ", ".join(on_host)
    together = each * min(options.machine.gpus, options.machine.gpus_per_node)
    return f"The host's memory: {together:.0f} GiB on each node, {each:.1f} per process ({of})."
