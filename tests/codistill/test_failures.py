"""Processes of a run that fail, end or hang: one line that says which and in what phase."""

import os
import random
import signal
import time

import pytest
from background import BackgroundRun
from test_run import rows, without_times

from codistill.failures import Failure, RunError, log_path, phase, report


def test_the_innermost_phase_is_named():
    with pytest.raises(Failure, match="error in phase sync") as error:
        with phase("training"), phase("sync"):
            raise ValueError("no")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(RunError), phase("sync"):
        raise RunError("said as it is")


def failure(error: Exception) -> Failure:
    with pytest.raises(Failure) as found, phase("rollout"):
        raise error
    return found.value


GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed")


@pytest.mark.parametrize(
    ("rank", "error", "files", "expected"),
    [
        (1, ValueError("no\nmore"), {}, "rank 1 failed in phase rollout: ValueError: no"),
        (0, GLOO, {1: "failed"}, None),  # rank 1 has said it
        (0, GLOO, {1: "lost"}, "stopped in phase rollout: no answer from rank 2, which has ended"),
        (1, GLOO, {0: "lost"}, None),  # rank 0 says it
        (1, GLOO, {2: "lost"}, "stopped in phase rollout: no answer from rank 0, which has ended"),
        (
            0,
            GLOO,
            {1: "lost", 2: "lost"},
            "stopped in phase rollout: rank 0 failed in phase",
        ),
    ],
)
def test_one_process_prints_the_line(tmp_path, monkeypatch, capsys, rank, error, files, expected):
    monkeypatch.setattr("codistill.failures.PATIENCE", 0.0)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for other, kind in files.items():
        log_path(tmp_path, other).write_text(f"{kind}\nTraceback")
    report(failure(error), tmp_path)
    assert "Traceback" in log_path(tmp_path, rank).read_text()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (expected is not None)
    for line in lines:
        assert f": {expected}" in line and f"errors_rank{rank}.log" in line


def test_without_a_place_for_the_file_the_traceback_is_printed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    report(failure(ValueError("no")), tmp_path / "file" / "run")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["SIGSTOP", "SIGKILL"])
def test_a_rank_that_stops_or_dies_is_named(settings, tmp_path, number):
    settings["training"]["steps"] = 500
    settings["distributed"] = {"timeout": 8}
    run = BackgroundRun(settings, tmp_path)
    try:
        run.wait_for("step 1/")
        os.kill(run.ranks[1], number)
        run.wait_for("no answer from rank 1, which has ended or hangs (traceback in ")
        lines = [line for line in run.text.splitlines() if line.startswith("train.py: ")]
        assert len(lines) == 1 and lines[0].startswith("train.py: stopped in phase ")
        assert "gloo" not in run.text
        assert "gloo" in log_path(run.folder, 0).read_text()
    finally:
        run.kill()


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_one_node_can_be_reached_from_this_machine_only(settings, tmp_path, processes):
    settings["training"]["steps"] = 500
    run = BackgroundRun(settings, tmp_path, processes)
    try:
        run.wait_for("step 1/")
        addresses = [address for pid in run.ranks for address in listening(pid)]
        assert addresses and all(address.startswith("0100007F:") for address in addresses)
    finally:
        run.kill()


def listening(pid: int) -> list[str]:
    """Addresses at which a process listens (hexadecimal)."""
    folder = f"/proc/{pid}/fd"
    links = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as rows:
            cells = [row.split() for row in rows][1:]
        found += [cell[1] for cell in cells if cell[3] == "0A" and cell[9] in inodes]
    return found


SABOTAGE = """
import os
from codistill.engine.hf import HFEngine

def reward(completions, **columns):
    if os.environ["RANK"] == "1" and not hasattr(HFEngine, "works"):
        HFEngine.works = HFEngine.sync
        HFEngine.sync = fail
    return [0.0 for _ in completions]

def fail(self, weights):
    HFEngine.sync = HFEngine.works
    next(weights)
    raise RuntimeError("no memory")
"""


@pytest.mark.long
def test_an_engine_that_fails_on_one_rank_starts_again_on_all(
    settings, train, tmp_path, monkeypatch
):
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    settings["reward"]["functions"] = {"sabotage.reward": 1.0}
    done = train(settings, processes=2)
    assert done.returncode == 0, done.stderr
    assert "engine hf failed in sync on rank 1: no memory; starting it again" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("deque(repeat(None), maxlen=0)", "did not return within its limit, nor could Python"),
        ("os._exit(0)", "ended the process without a word"),
    ],
    ids=["hangs", "ends"],
)
def test_a_reward_function_that_takes_its_process_along(
    settings, train, tmp_path, monkeypatch, processes, call, said
):
    """On the last process, when there are several: the others leave the line to it."""
    (tmp_path / "vanish.py").write_text(
        "import os\n"
        "from collections import deque\n"
        "from itertools import repeat\n"
        "def reward(completions, **columns):\n"
        f"    if os.environ['RANK'] == '{processes - 1}':\n"
        f"        {call}\n"
        "    return [0.0 for _ in completions]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    settings["reward"] |= {"functions": {"vanish.reward": 1.0}, "function_timeout": 0.5}
    done = train(settings, processes=processes)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train.py: "))
    assert line.startswith(
        f"train.py: stopped: rank {processes - 1}: reward function vanish.reward"
    )
    assert said in line and f"errors_rank{processes - 1}.log" in line
    if processes == 1:
        assert done.returncode == (0 if "_exit" in call else 1)


FILL = """
import os, resource

def reward(completions, **columns):
    if os.environ["RANK"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    return [0.0 for _ in completions]
"""


@pytest.mark.long
def test_a_full_disk_of_the_first_process_is_said_by_it_alone(
    settings, train, tmp_path, monkeypatch
):
    (tmp_path / "fill.py").write_text(FILL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    settings["reward"]["functions"] = {"fill.reward": 1.0}
    done = train(settings, processes=2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train.py: "))
    assert line.startswith("train.py: stopped: no space is left on the disk of ")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_is_killed_again_and_again_is_that_of_one_go(settings, train, tmp_path, seed):
    """SIGKILL of launcher, ranks and graders at random moments; bit by bit the same metrics."""
    settings["training"]["steps"] = 6
    settings["checkpoint"]["asynchronous"] = seed % 2 == 1
    start = time.monotonic()
    assert train(settings, processes=2).returncode == 0
    seconds, whole = time.monotonic() - start, without_times(rows(settings))
    settings["name"] = "killed"
    chance = random.Random(seed)
    for _ in range(3):
        run = BackgroundRun(settings, tmp_path)
        time.sleep(chance.uniform(0.3, 1.0) * seconds)
        run.kill()
    done = train(settings, processes=2)
    assert done.returncode == 0, done.stderr
    assert without_times(rows(settings)) == whole
