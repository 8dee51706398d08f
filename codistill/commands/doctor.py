"""python -m codistill doctor --config FILE [--section.key value ...]

Say what is installed and which kernel backend and engine run, and check the configuration and its
inputs; exit code 2 if they are wrong.
"""

import sys

from codistill import distributed
from codistill.config import load_config
from codistill.downloads import check_files
from codistill.versions import installed


def main(arguments: list[str]) -> None:
    """Check a configuration and its inputs; print what would run."""
    config = load_config(arguments)
    config.check_processes(distributed.world_size())
    check_files(config)
    import torch

    from codistill.engine import engine_kind
    from codistill.inputs import load_inputs
    from codistill_kernels._backends import choose

    inputs = load_inputs(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "python": sys.version.split()[0],
        **installed(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "kernels": choose("auto", device, torch.float32),
        "engine": engine_kind(config.rollout.engine),
        "problems": f"{len(inputs.problems)} to train on, "
        f"{sum(map(len, inputs.held_out.values()))} held out",
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
