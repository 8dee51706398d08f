"""Signals to a run, through torchrun as a user sends them: what is saved, said and left behind."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from background import BackgroundRun, everything_below

FIRST_STEP = "step 1/"


@pytest.fixture
def start(settings, tmp_path) -> Iterator[Callable[..., BackgroundRun]]:
    """Start a run of many steps that saves no checkpoint by itself: start(processes=2)."""
    settings["training"]["steps"] = 500
    settings["checkpoint"]["every"] = settings["evaluation"]["every"] = 500
    settings["evaluation"]["large"] = "never"
    runs = []

    def make(processes: int = 2) -> BackgroundRun:
        runs.append(BackgroundRun(settings, tmp_path, processes))
        return runs[-1]

    yield make
    for run in runs:
        run.kill()


def checkpoints(run: BackgroundRun) -> list[Path]:
    return list((run.folder / "checkpoints").glob("*"))


def check_saved(run: BackgroundRun, code: int) -> None:
    """The run ended with this exit code, after saving the step that it was in."""
    started = everything_below(run.process.pid)
    assert run.end() == code, run.text
    (saved,) = checkpoints(run)
    step = saved.name.removeprefix("step_")
    assert f"stopped after step {step}; the same command goes on" in run.text
    assert "failed in phase" not in run.text
    wait_until_gone(started)


def wait_until_gone(processes: list[int], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)


def test_a_signal_to_every_process_of_a_run_saves(start):
    """SIGTERM as a scheduler sends it, which cancels a job: to launcher, ranks and graders."""
    run = start()
    run.wait_for(FIRST_STEP)
    for pid in (*everything_below(run.process.pid), run.process.pid):
        os.kill(pid, signal.SIGTERM)
    check_saved(run, 1)  # the launcher's own exit code
    assert "a grading process was killed: new ones grade" in run.text


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_launcher_saves(start, name):
    run = start()
    run.wait_for(FIRST_STEP)
    run.process.send_signal(getattr(signal, name))
    check_saved(run, 1)
    assert "a grading process was killed" not in run.text


@pytest.mark.long
def test_a_launcher_that_is_killed_takes_its_ranks_along(start):
    """They save first: nobody could stop them any more."""
    run = start()
    run.wait_for(FIRST_STEP)
    started = everything_below(run.process.pid)
    run.process.kill()
    run.process.wait()
    wait_until_gone(started)
    (saved,) = checkpoints(run)
    assert f"stopped after step {saved.name.removeprefix('step_')}" in run.text


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(start, rank):
    run = start()
    run.wait_for(FIRST_STEP)
    os.kill(run.ranks[rank], signal.SIGUSR1)
    check_saved(run, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_group_of_one_process_saves(start, name):
    run = start(processes=1)
    run.wait_for(FIRST_STEP)
    os.killpg(run.process.pid, getattr(signal, name))
    check_saved(run, 143)
    assert "a grading process was killed" not in run.text


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_models_load_ends_the_run_with_a_line(start, name):
    run = start(processes=1)
    run.wait_for("loading models")
    run.process.send_signal(getattr(signal, name))
    assert run.end() == 143, run.text
    line = f"train.py: stopped by {name} before the first step: nothing to save"
    assert run.text.splitlines()[-1] == line
    assert [path.name for path in run.folder.iterdir()] == ["lock"]


@pytest.mark.long
def test_a_second_signal_ends_the_run_at_once(start, settings, tmp_path, monkeypatch):
    """Even in a reward function that does not return."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def reward(completions, **columns):\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(1000)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    settings["reward"]["functions"] = {"slow.reward": 1.0}
    run = start(processes=1)
    run.wait_for("waiting")
    run.process.send_signal(signal.SIGINT)
    time.sleep(3)
    assert run.process.poll() is None  # it waits for the step
    run.process.send_signal(signal.SIGINT)
    assert run.end(10) == 143
    line = "train.py: stopped by a second signal, SIGINT: the last checkpoint is as it was"
    assert run.text.splitlines()[-1] == line
    assert not checkpoints(run)
