"""examples/slurm.sh, with stand-ins for the commands of Slurm and for torchrun."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> asked; fi',
    "srun": 'while [ "$1" != torchrun ]; do shift; done; exec "$@"',
}
UNTIL_A_SIGNAL = 'trap "exit {code}" USR1; echo "$@" > arguments; while :; do sleep 0.02; done'
JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "64",
}


def start(folder: Path, torchrun: str, **variables: str) -> subprocess.Popen:
    for name, body in (COMMANDS | {"torchrun": torchrun}).items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | JOB | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", SCRIPT, "--name", "a b"], cwd=folder, env=environment)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "asked"), [(1, "requeue 41\n"), (0, None)])
def test_a_signal_ends_the_run_and_puts_the_job_back_if_steps_are_left(tmp_path, code, asked):
    job = start(tmp_path, UNTIL_A_SIGNAL.format(code=code), SLURM_RESTART_COUNT="3")
    try:
        wait_for(tmp_path / "arguments")
        time.sleep(0.1)  # until the script waits
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=20) == code
    finally:
        job.kill()
    arguments = (tmp_path / "arguments").read_text()
    assert "--nnodes 2 --nproc-per-node 8" in arguments
    assert "--rdzv-endpoint node7:29500 --rdzv-id 41-3" in arguments
    assert arguments.endswith("train.py --name a b\n")
    found = tmp_path / "asked"
    assert (found.read_text() if found.exists() else None) == asked


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_ends_by_itself_is_not_started_again(tmp_path, code):
    assert start(tmp_path, f"exit {code}").wait(timeout=20) == code
    assert not (tmp_path / "asked").exists()
