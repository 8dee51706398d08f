"""Signals that ask a run to stop, and what it says of its end. Imports no torch."""

import ctypes
import os
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NoReturn, Self

from codistill import distributed, watching

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals by which terminals, torchrun and schedulers stop a run."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that a signal stopped, whichever it was, and that can go on."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h

ECHO = 2.0
"""Seconds in which more signals are the first one again: a scheduler sends it to every process, and
torchrun passes on the one it gets."""


class StopSignals:
    """Listens for `STOPS` from its creation on.

    Before `wait_for_step` is called a signal ends the process at once: there is nothing to save.
    After it the first signal only sets `received`, and the run stops when its step has ended; a
    second one ends the process at once. The exit code is `STOPPED` in every case.

    A thread does this: Python's own handlers wait until the main thread runs Python code, which a
    process that waits for another one may never do.
    """

    unsaved = "before the first step: nothing to save"
    """What is said of an end at once."""

    def __init__(self) -> None:
        self.received = False
        self.saves = False
        self.first_time = 0.0
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    @classmethod
    def listen(cls) -> Self:
        """Start to listen, in the main thread. A signal that is ignored already, by nohup for
        example, stays so."""
        signals = cls()
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        numbers = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        resource_tracker.ensure_running()  # a helper of the graders, which inherits what is ignored
        for number in numbers:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=signals.watch, args=(read_end,), daemon=True).start()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            follow_launcher()
        return signals

    def wait_for_step(self) -> None:
        """From now on the first signal waits for the end of the step."""
        self.saves = True

    @staticmethod
    def ignore() -> None:
        """From now on no signal matters: the run is over, and its exit code is known."""
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)

    def watch(self, read_end: int) -> None:
        while numbers := os.read(read_end, 64):
            for number in numbers:
                if number in STOPS:
                    self.on_signal(signal.Signals(number))

    def on_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self.leave_terminal()
        if not self.saves:
            end(f"stopped by {number.name} {self.unsaved}")
        if not self.received:
            self.received, self.first_time = True, time.monotonic()
        elif time.monotonic() - self.first_time > ECHO:
            end(f"stopped by a second signal, {number.name}: the last checkpoint is as it was")

    def leave_terminal(self) -> None:
        """Write to nowhere from now on: a terminal that is closed refuses what is written."""
        for stream in self.terminals:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream)


def follow_launcher() -> None:
    """Ask Linux for SIGTERM when torchrun is gone: nobody could stop this process any more."""
    if sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it was gone before it was asked for
            os.kill(os.getpid(), signal.SIGTERM)


def end(message: str) -> NoReturn:
    """Say why, and end this process without another instruction of the main thread."""
    watching.forget()
    distributed.complain(message)
    os._exit(STOPPED)
