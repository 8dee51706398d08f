"""A command that ends with the process that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from background import everything_below

from codistill.child import Child
from codistill.engine.own_server import wait_for

ROOT = Path(__file__).parents[2]

SLEEPS = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
)
PARENT = """
import os, sys, time
from pathlib import Path
from codistill.child import Child
child = Child([sys.executable, "-c", sys.argv[1]], dict(os.environ), Path(sys.argv[2]))
time.sleep(99)
"""


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def are_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() and state(pid) != "Z" for pid in pids)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_a_child_and_its_children_end_with_the_parent(tmp_path):
    command = [sys.executable, "-c", PARENT, SLEEPS, str(tmp_path / "log")]
    parent = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: len(everything_below(parent.pid)) == 3)
    below = everything_below(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: are_gone(below))


def test_a_child_is_ended(tmp_path):
    child = Child([sys.executable, "-c", SLEEPS], dict(os.environ), tmp_path / "new" / "log")
    wait_until(lambda: len(everything_below(child.script.pid)) == 2)
    below = everything_below(child.script.pid)
    child.end()
    assert not child.is_running
    wait_until(lambda: are_gone(below))  # a process that is killed ends a moment later


def test_a_server_that_ends_while_it_starts(tmp_path):
    command = [sys.executable, "-c", "print('no such model')"]
    child = Child(command, dict(os.environ), tmp_path / "log")
    with pytest.raises(RuntimeError, match=f"it has ended; its output is in {tmp_path}/log"):
        wait_for(child, "http://127.0.0.1:1", 60, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "no such model\n"
    child.end()
