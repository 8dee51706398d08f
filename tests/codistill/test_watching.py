"""User code that ends its process, or keeps Python's lock, is told of by another process."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, os, sys, time
from collections import deque
from itertools import repeat
from pathlib import Path
from codistill import watching
sys.argv = ["train.py"]
watching.SLACK = 0.2
log = Path({log!r})
watching.start(1, log)
def leave_a_child():
    if not os.fork():
        os.closerange(1, 3)
        time.sleep(20)
        (log.parent / "late").touch()
    os._exit(7)
with watching.watched("function before", 0.1):
    pass
time.sleep(0.4)
with watching.watched("reward function my.reward", 0.1):
    {inside}
{after}
"""
LINE = "train.py: stopped: rank 1: reward function my.reward"
HANGS = "did not return within its limit, nor could Python interrupt it"
ENDS = "ended the process without a word"
SLOW = """watching.SLACK = 60  # for Python to end it
    with watching.watched("slow", 0.1): time.sleep(0.4)"""


def ended(log: Path, inside: str, after: str = "") -> subprocess.CompletedProcess:
    """What becomes of the script, in a group of its own."""
    script = SCRIPT.format(log=str(log), inside=inside, after=after)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True
    )


@pytest.mark.parametrize(
    ("inside", "after", "code", "said"),
    [
        ("deque(repeat(None), maxlen=0)", "", 1, HANGS),  # with Python's lock
        ("ctypes.CDLL(None).sleep(60)", "", 1, HANGS),  # without
        ("os._exit(7)", "", 7, ENDS),
        ("leave_a_child()", "", 7, ENDS),
        ("os.kill(os.getpid(), 9)", "", -9, ENDS),
        ("os.killpg(0, 9)", "", -9, ENDS),
        ("watching.forget(); os._exit(7)", "", 7, None),
        ("pass", "os._exit(7)", 7, None),
        (SLOW, "", 0, None),
        ("watching.watcher.kill(); watching.watcher.wait()", "", 0, None),
    ],
    ids=[
        *("with the lock", "in C", "_exit", "_exit with a child", "killed", "group killed"),
        *("forgotten", "after", "slow", "unwatched"),
    ],
)
def test_the_end_of_a_process_is_told(tmp_path, inside, after, code, said):
    log = tmp_path / "errors_rank1.log"
    done = ended(log, inside, after)
    assert done.returncode == code, done.stderr
    expected = f"{LINE} {said} ({log})\n" if said else ""
    assert done.stderr == expected
    assert log.exists() == (said is not None)
    assert not (tmp_path / "late").exists()  # its children are not waited for
    if said is not None:
        content = log.read_text()
        assert content.startswith("failed\n")  # to the other processes: nobody else is to blame
        assert ('File "<string>", line 21' in content) == (said == HANGS)


def test_no_folder_is_made_for_the_traceback(tmp_path):
    done = ended(tmp_path / "runs" / "errors_rank1.log", "os._exit(7)")
    assert done.stderr == f"{LINE} {ENDS}\n" and not list(tmp_path.iterdir())
