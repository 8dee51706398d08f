"""Tests that need several processes."""

from collections.abc import Callable

import torch

from codistill import distributed


def spawn(function: Callable, *arguments: object, processes: int) -> None:
    """Run function(rank, *arguments) in new processes; an exception in one of them is raised."""
    torch.multiprocessing.spawn(run, (function, arguments), nprocs=processes)


def run(rank: int, function: Callable, arguments: tuple) -> None:
    function(rank, *arguments)
    distributed.leave(0)
