"""The processes of a run: one per GPU, or any number on a CPU. Started by torchrun, or alone."""

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def start(timeout: float, name: str = "") -> "torch.device":
    """Join the process group; the device of this process.

    A process alone has a store in memory. Where torchrun has started it, the group meets at the
    address torchrun gives. Gloo's ports are open on the loopback interface only, unless there are
    several nodes or GLOO_SOCKET_IFNAME names an interface.

    timeout: seconds that an operation waits for the other processes.
    name: of the group; processes that form it once more under the same torchrun give another one.
    """
    import torch  # not above: --help and mistakes in the configuration do not wait for it
    import torch.distributed as dist

    alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    group: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if "RANK" not in os.environ:  # python train.py, without torchrun
        os.environ.update(alone)  # vLLM reads them
        group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif name:
        store, rank, size = next(dist.rendezvous("env://", timeout=group["timeout"]))
        group |= {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": size}
    if not has_several_nodes():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **group)
    return device


def shard_mesh(replicas: int, device: "torch.device") -> "DeviceMesh | None":
    """The processes as a grid, [replicas, processes per replica]: those of a row share the weights
    of a model between them, and each row has all of them. Collective.

    Neighbours by rank are in one row: on as many nodes as replicas, weights are gathered within
    each node. None for one replica: FSDP2 then takes all processes.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return None
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def world_size() -> int:
    """How many processes torchrun started; known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0; known before it has joined."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those of its node, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def has_several_nodes() -> bool:
    """Whether some processes of the group are on other nodes, as far as torchrun says."""
    return world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def address_towards(host: str) -> str:
    """The address of this machine by which it reaches another one, which can reach it there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: the port does not matter
        return probe.getsockname()[0]


def free_port(address: str) -> int:
    """A port at an address of this machine that nobody uses now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as free:
        free.bind((address, 0))
        return free.getsockname()[1]


def helpers() -> int:
    """How many helper processes to start beside this one: its share of the cores that a scheduler
    has left to the processes of this node, and at most 8, a number that was chosen and not
    measured."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def largest(number: float, device: "torch.device") -> float:
    """The largest that any process brings. Collective."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def totals(numbers: list[int], group: "ProcessGroup | None" = None) -> list[int]:
    """The sum of each number over all processes. Collective."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(found, group=group)
    return found.tolist()


def gathered(value: object, group: "ProcessGroup | None" = None) -> list[Any]:
    """What each process of a group, or of the run, brings, by rank. Collective."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def same_everywhere(value: object) -> bool:
    """Whether all processes bring what the first one brings. Collective."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return totals([values[0] != value]) == [0]


def first_error(error: Exception | None) -> str | None:
    """What the first process that has an error says of it, "rank 1: ..."; None if there is none.

    Collective: a process that stops alone leaves the others waiting.
    """
    messages = gathered(None if error is None else str(error) or repr(error))
    found = ((number, text) for number, text in enumerate(messages) if text is not None)
    return next((f"rank {number}: {text}" for number, text in found), None)


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def complain(message: str, *, first_only: bool = True) -> None:
    """Print one line on stderr, the command's name and a message, from the first process alone or
    from this one, whichever it is."""
    if is_first() or not first_only:
        command = Path(sys.argv[0])
        name = command.parent.name if command.name == "__main__.py" else command.name
        # In one piece: other processes write to the same place.
        sys.stderr.write(f"{name}: {message}\n")
        sys.stderr.flush()


def leave(code: int) -> NoReturn:
    """End this process, which has joined a group, without the interpreter's teardown.

    A thread of gloo may still hold the tensors of the last collective. To drop them it needs
    Python's lock, and a thread that asks for it during the teardown is ended in the middle of a C++
    destructor: the process would abort after all its work was done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(code: int) -> int:
    """The exit code of a process whose work has ended early; one that may have joined a group,
    as it has imported torch, leaves at once."""
    if "torch" in sys.modules:
        leave(code)
    return code
