"""A run of train.py in the background, for tests that disturb it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from codistill.stopping import STOPS

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
OPTIONS = ("--shutdown-timeout", "60", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1")


class BackgroundRun:
    """train.py on some processes, started by torchrun if there are several, in a group of its own.

    Its output is in `output`, both streams in one.
    """

    def __init__(
        self, settings: dict, folder: Path, processes: int = 2, node: tuple[str, ...] = ()
    ) -> None:
        """node: options of torchrun by which it is one of several."""
        self.is_alone = processes == 1 and not node
        self.output = folder / "output.txt"
        self.folder = Path(settings["output_dir"]) / settings["name"]
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        launcher = [sys.executable]
        if not self.is_alone:
            launcher = [*TORCHRUN, *OPTIONS, *node, "--nproc-per-node", str(processes)]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, "train.py", "--config", str(folder / "config.yaml")],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the run has printed `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.05)

    @property
    def ranks(self) -> list[int]:
        """Ids of the processes that train, by rank."""
        if self.is_alone:
            return [self.process.pid]
        return sorted(pid for pid in children(self.process.pid) if "train.py" in command(pid))

    def graders(self, rank: int) -> list[int]:
        """Ids of the processes in which the process of a rank grades."""
        return [pid for pid in children(self.ranks[rank]) if "spawn_main" in command(pid)]

    def end(self, seconds: float = 120) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        """End what is left of the run."""
        for pid in (*everything_below(self.process.pid), self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def heed_signals() -> None:
    """Undo what nohup, or a shell for its background jobs, makes processes ignore."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    """Ids of the children of a process that are still there."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def everything_below(pid: int) -> list[int]:
    found = children(pid)
    return found + [one for child in found for one in everything_below(child)]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
