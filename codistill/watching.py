"""A process beside each one that trains, which tells what user code has done to that process.

User code may end the process, by os._exit or a crash in C, or may keep Python's lock in C, so that
no limit of Python's own fires. Then the process has no word left: the watching process, which runs
this file as a script, reads from a pipe what was being called, notices the end, and says it in one
line. Imports the standard library alone.
"""

import faulthandler
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLACK = 5.0
"""Seconds beyond its limit that a call has to end by Python's means; chosen, untested."""

PATIENCE = 1.0
"""Seconds after which the watching process asks whether the other is still there: its children may
have inherited the pipe, which then stays open."""

watcher: subprocess.Popen | None = None


def start(rank: int, log: Path) -> None:
    """Start the process that watches this one.

    log: the file for the traceback of a call that did not return; none is written while its folder
    is not there.
    """
    global watcher
    arguments = (Path(sys.argv[0]).name, str(rank), str(log))
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *arguments],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a signal to the group of this process passes it by
    )


@contextmanager
def watched(what: str, seconds: float | None = None) -> Iterator[None]:
    """Have the end of this process in the block told as that of `what`, if `start` was called.

    seconds: the limit of the block. `SLACK` after it the process ends with exit code 1.
    """
    if watcher is None:
        yield
        return
    assert watcher.stdin is not None
    tell(f"{what}\n")
    if seconds is not None:
        # Its thread needs no lock of Python's. What it writes goes through the pipe.
        faulthandler.dump_traceback_later(seconds + SLACK, exit=True, file=watcher.stdin)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        forget()


def forget() -> None:
    """Let nothing be told of the end of this process, should it come now."""
    if watcher is not None:
        tell("")


def tell(text: str) -> None:
    assert watcher is not None and watcher.stdin is not None
    try:
        os.write(watcher.stdin.fileno(), f"\0{text}".encode())
    except BrokenPipeError:  # the watching process was killed, and training needs none
        pass


def watch(command: str, rank: str, log: Path) -> None:
    """Wait for the end of the process that started this one, and tell of it."""
    call = b""
    watched_process = os.getppid()
    while True:
        readable, _, _ = select.select([0], [], [], PATIENCE)
        if readable:
            part = os.read(0, 65536)
            call = (call + part).rpartition(b"\0")[2]
            if not part:
                break
        elif os.getppid() != watched_process:
            break
    what, _, traceback = call.decode(errors="replace").partition("\n")
    if not what:
        return
    if traceback:
        how = "did not return within its limit, nor could Python interrupt it"
    else:
        how = "ended the process without a word"
    line, where = f"rank {rank}: {what} {how}", ""
    if log.parent.is_dir():
        log.write_text(f"failed\n{line}\n{traceback}")
        where = f" ({log})"
    sys.stderr.write(f"{command}: stopped: {line}{where}\n")


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
