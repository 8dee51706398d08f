"""A command that ends when the process that started it ends, however that comes about.

This file runs as a script between the two: it starts the command in a session of its own, and ends
all processes of that session once its own standard input is closed, which the end of the process
that holds the other side does. Imports the standard library alone.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 1.0
"""Seconds after which the script asks whether the command has ended, and its parent."""
GRACE = 5.0
"""Seconds that the command has to end by itself after SIGTERM; chosen, untested."""


class Child:
    """A command in the background. Its output, of both streams, goes to the file `log`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.script = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *command],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal to the group of this process passes it by
            )

    @property
    def is_running(self) -> bool:
        return self.script.poll() is None

    def end(self) -> None:
        """End the command and wait until all of it is gone."""
        assert self.script.stdin is not None
        self.script.stdin.close()
        self.script.wait()


def keep(command: list[str]) -> None:
    """Run a command until it ends, this process's input is closed or its parent is gone."""
    parent = os.getppid()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and os.getppid() == parent:
        if select.select([0], [], [], PATIENCE)[0]:
            break
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what is left of its session
    except ProcessLookupError:
        pass
    process.wait()


if __name__ == "__main__":
    keep(sys.argv[1:])
