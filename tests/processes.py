"""Tests that need several processes."""

import os
from collections.abc import Callable

import torch


def spawn(function: Callable, *arguments: object, processes: int) -> None:
    """Run function(rank, *arguments) in new processes; an exception in one of them is raised."""
    torch.multiprocessing.spawn(run, (function, arguments), nprocs=processes)


def run(rank: int, function: Callable, arguments: tuple) -> None:
    function(rank, *arguments)
    # Past here there is only the interpreter's end. There a process whose test had passed aborted
    # now and then ("terminate called without an active exception": a thread of some library that
    # nobody joined; which one is not known).
    os._exit(0)
