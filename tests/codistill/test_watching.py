"""User code that ends its process, or keeps Python's lock, is told of by another process."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, sys, time
from collections import deque
from itertools import repeat
from pathlib import Path
from codistill import watching
sys.argv = ["train.py"]
watching.SLACK = 0.2
watching.start(1, Path({log!r}))
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


@pytest.mark.parametrize(
    ("inside", "after", "code", "said"),
    [
        ("deque(repeat(None), maxlen=0)", "", 1, HANGS),  # with Python's lock
        ("ctypes.CDLL(None).sleep(60)", "", 1, HANGS),  # without
        ("os._exit(7)", "", 7, ENDS),
        ("os._exit(7 if os.fork() else time.sleep(3) or 0)", "", 7, ENDS),
        ("os.kill(os.getpid(), 9)", "", -9, ENDS),
        ("watching.forget(); os._exit(7)", "", 7, None),
        ("pass", "os._exit(7)", 7, None),
    ],
    ids=["with the lock", "in C", "_exit", "_exit with a child", "killed", "forgotten", "after"],
)
def test_the_end_of_a_process_is_told(tmp_path, inside, after, code, said):
    log = tmp_path / "errors_rank1.log"
    script = SCRIPT.format(log=str(log), inside=inside, after=after)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    expected = f"{LINE} {said} ({log})\n" if said else ""
    assert done.stderr == expected
    assert log.exists() == (said is not None)
    if said is not None:
        content = log.read_text()
        assert content.startswith("failed\n")  # to the other processes: nobody else is to blame
        assert ('File "<string>", line 14' in content) == (said == HANGS)
