"""GPUs, the machines around them, and how much of what they promise is reached."""

from dataclasses import dataclass

from codistill.config.plan import MachineConfig

FP32, ADAM, GIB = 4, 8, 2**30  # bytes per number, bytes of Adam's two moments, bytes
# Shares of the highest rates that are reached. Assumed.
TRAINING_SHARE, SCORING_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.4, 0.5, 0.7, 0.8
HOST_BANDWIDTH = 400e9  # rate of a node's memory (bytes/s) that its processes share; assumed


@dataclass(frozen=True)
class GPU:
    """Data sheets of NVIDIA, SXM."""

    memory_gib: float
    flops: float
    """Dense bf16 FLOP/s."""
    bandwidth: float
    """Rate of its memory (bytes/s)."""
    link: float
    """NVLink, one direction (bytes/s)."""
    host_link: float
    """PCIe with 16 lanes, one direction (bytes/s)."""


GPUS = {
    "A100": GPU(80, 312e12, 2.04e12, 300e9, 32e9),
    "H100": GPU(80, 989e12, 3.35e12, 450e9, 64e9),
    "H200": GPU(141, 989e12, 4.8e12, 450e9, 64e9),
    "B200": GPU(180, 2250e12, 8e12, 900e9, 64e9),
}


def link_rate(machine: MachineConfig, gpus: int) -> float:
    """Bytes/s at which a GPU gathers from so many, or sums with them."""
    is_one_node = gpus <= machine.gpus_per_node
    return LINK_SHARE * (GPUS[machine.gpu].link if is_one_node else machine.network * 1e9)


def host_link_rate(machine: MachineConfig) -> float:
    """Bytes/s at which a GPU copies from or to the host's memory."""
    return LINK_SHARE * GPUS[machine.gpu].host_link
