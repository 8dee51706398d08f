"""The processes of a run: one per GPU, or any number on a CPU. Started by torchrun, or alone."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch


def start() -> "torch.device":
    """Join the process group; the device of this process."""
    import torch  # not above: --help and mistakes in the configuration do not wait for it
    import torch.distributed as dist

    alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if "RANK" not in os.environ:  # python train.py, without torchrun
        os.environ.update(alone)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def world_size() -> int:
    """How many processes torchrun started; known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def helpers() -> int:
    """How many helper processes to start beside this one: its share of the machine's cores, and at
    most 8, a number that was chosen and not measured."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def largest(number: float, device: "torch.device") -> float:
    """The largest that any process brings. Collective."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def complain(message: str) -> None:
    """Print one line on stderr, from the first process alone: the command's name and a message."""
    if is_first():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def leave(code: int) -> NoReturn:
    """End this process, which has joined a group, without the interpreter's teardown.

    A thread of gloo may still hold the tensors of the last collective. To drop them it needs
    Python's lock, and a thread that asks for it during the teardown is ended in the middle of a C++
    destructor: the process would abort after all its work was done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
