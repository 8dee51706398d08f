"""What a run says of an error: one line on the terminal, the traceback in a file. Imports no torch.

Where a process ends or hangs, the others notice in their next collective operation, with an error
that says nothing of the cause. So each process writes a file, and the files tell who has none.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from codistill import distributed
from codistill.config.base import ConfigError
from codistill.files import is_disk_full

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = 3.0
"""Seconds to wait for the files of other processes; chosen, untested."""


class RunError(RuntimeError):
    """An error that every process has, and whose message says all: no traceback is needed."""


class Failure(Exception):
    """Any other error. Its `__cause__` is the error itself."""

    def __init__(self, phase: str) -> None:
        super().__init__(f"error in phase {phase}")
        self.phase = phase


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the part of a run that the block is.

    Raises:
        Failure: the block raised an error that is not foreseen. The innermost phase is named.
    """
    try:
        yield
    except (ConfigError, RunError, FloatingPointError, Failure):
        raise
    except Exception as error:
        raise Failure(name) from error


def exit_code(work: Callable[[], int], folder: Path) -> int:
    """What `work` returns; 1 if it fails, after one line that says why.

    folder: what the work writes to.

    Raises:
        ConfigError: the work did.
    """
    try:
        return work()
    except (RunError, FloatingPointError) as error:
        distributed.complain(f"stopped: {error}")
    except Failure as failure:
        if failure.__cause__ is not None and is_disk_full(failure.__cause__):
            distributed.complain(
                f"stopped: no space is left on the disk of {folder}, or a quota is used up; what "
                "it has saved is whole: make space and start it again"
            )
        else:
            report(failure, folder)
    return 1


def first_alone(work: Callable[[], object], group: "ProcessGroup | None" = None) -> None:
    """Let the first process alone do something, while the others wait for it. Collective.

    Raises:
        Exception: what `work` raised, on the first process.
        RunError: on the others, who then know that the first is not lost.
    """
    error: Exception | None = None
    if distributed.is_first():
        try:
            work()
        except Exception as failure:  # none may keep the others waiting
            error = failure
    if distributed.totals([error is not None], group) != [0]:
        raise error or RunError("the first process failed")


def log_path(folder: Path, rank: int) -> Path:
    """The file for the traceback of one process, in the folder of the run."""
    return folder / f"errors_rank{rank}.log"


def forget(folder: Path) -> None:
    """Remove the file that an earlier start of the run left, if this process had one."""
    log_path(folder, distributed.rank()).unlink(missing_ok=True)


def report(failure: Failure, folder: Path) -> None:
    """Write the traceback of a failure into the folder of the run, and print one line.

    Where a connection failed, the process that is to blame prints the line; where it cannot, the
    first of the others does, and names it.
    """
    error = failure.__cause__
    assert error is not None
    rank, path = distributed.rank(), log_path(folder, distributed.rank())
    summary = next(iter(str(error).splitlines()), "")
    line = f"rank {rank} failed in phase {failure.phase}: {type(error).__name__}: {summary}"
    lost = is_connection_error(error)
    try:
        write(path, "lost" if lost else "failed", error)
    except OSError:  # no such place, or no space left
        traceback.print_exception(error)
        distributed.complain(line, first_only=False)
        return
    if not lost:
        distributed.complain(f"{line} (traceback in {path})", first_only=False)
        return
    silent, failed = others(folder)
    first = min(set(range(distributed.world_size())) - set(silent))
    if failed or rank != first:
        return
    names = ", ".join(str(other) for other in silent)
    cause = f"no answer from rank {names}, which has ended or hangs" if silent else line
    message = f"stopped in phase {failure.phase}: {cause} (traceback in {path})"
    distributed.complain(message, first_only=False)


def write(path: Path, kind: str, error: BaseException) -> None:
    """Write a file at once, so that no other process reads a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(f"{kind}\n{''.join(traceback.format_exception(error))}")
    unfinished.replace(path)


def others(folder: Path) -> tuple[list[int], list[int]]:
    """The processes that have written no file, and those that have failed by themselves."""
    ranks = [rank for rank in range(distributed.world_size()) if rank != distributed.rank()]
    deadline = time.monotonic() + PATIENCE
    while True:
        found = {rank: log_path(folder, rank) for rank in ranks if log_path(folder, rank).is_file()}
        failed = [rank for rank, path in found.items() if path.read_text().startswith("failed")]
        if failed or len(found) == len(ranks) or time.monotonic() > deadline:
            return [rank for rank in ranks if rank not in found], failed
        time.sleep(0.1)


def is_connection_error(error: BaseException) -> bool:
    """Whether an operation with other processes failed, for a reason that may lie with them."""
    import torch.distributed as dist  # not above: mistakes in the configuration do not wait for it

    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
