"""Checkpoints that are written while training goes on."""

import errno
import os
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from test_checkpoint import make_learner, names

from codistill import checkpoint
from codistill.failures import RunError, first_alone
from codistill.saving import Saver

CONFIG = SimpleNamespace(
    checkpoint=SimpleNamespace(keep=2, asynchronous=True),
    distributed=SimpleNamespace(timeout=60.0),
)


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Until it is set no checkpoint is written."""
    gate, save = threading.Event(), checkpoint.save

    def wait_and_save(*arguments, **terms) -> None:
        assert gate.wait(60)
        save(*arguments, **terms)

    monkeypatch.setattr(checkpoint, "save", wait_and_save)
    return gate


@pytest.fixture
def saver(process_group, tmp_path) -> Saver:
    return Saver(tmp_path / "checkpoints", [make_learner(1)], CONFIG)


def train(learner: SimpleNamespace) -> None:
    """Change all that a checkpoint holds, in place."""
    learner.policy(torch.ones(2, 40)).sum().backward()
    learner.optimizer.step()
    learner.schedule.step()
    learner.skipped_in_a_row += 1


def test_what_a_later_step_changes_is_not_in_a_checkpoint(saver, gate):
    (learner,) = saver.learners
    before = learner.policy.weight.detach().clone()
    moments = learner.optimizer.state[learner.policy.weight]["exp_avg"].clone()
    saver.save(3)
    assert not saver.folder.exists() and not saver.has_failed
    train(learner)
    gate.set()
    saver.finish()
    assert names(saver.folder) == ["step_3"]
    loaded = make_learner(2)
    checkpoint.load(saver.folder, 3, [loaded])
    assert torch.equal(loaded.policy.weight, before)
    assert torch.equal(loaded.optimizer.state[loaded.policy.weight]["exp_avg"], moments)
    assert (loaded.schedule.last_epoch, loaded.skipped_in_a_row) == (1, 0)


def test_a_save_waits_for_the_one_before(saver, gate):
    saver.save(3)
    threading.Timer(0.3, gate.set).start()
    saver.save(6)
    assert "step_3" in names(saver.folder)
    saver.save(6)  # there already, once it is written
    assert names(saver.folder) == ["step_3", "step_6"] and saver.writing is None
    assert checkpoint.find(saver.folder) == (6, [])


def test_a_save_that_fails_is_told_and_leaves_the_one_before(saver, monkeypatch):
    saver.save(3)
    saver.finish()
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_sums", lambda *_: (_ for _ in ()).throw(full))
        saver.save(6)
        while not saver.writing.done():
            pass
        assert saver.has_failed
        with pytest.raises(OSError, match="No space left"):
            saver.finish()
    assert not saver.has_failed
    assert checkpoint.find(saver.folder) == (3, [])
    saver.save(9)
    saver.finish()
    assert names(saver.folder) == ["step_3", "step_9"]


def test_an_error_elsewhere_lets_a_save_finish(saver, gate, monkeypatch):
    with pytest.raises(ZeroDivisionError), saver:
        saver.save(3)
        threading.Timer(0.3, gate.set).start()
        raise ZeroDivisionError
    assert names(saver.folder) == ["step_3"]
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(KeyError), saver:  # it says more than the error of the save
        saver.save(6)
        raise KeyError


@pytest.mark.parametrize("asynchronous", [True, False])
def test_only_the_last_checkpoints_are_kept(process_group, tmp_path, asynchronous):
    options = SimpleNamespace(keep=2, asynchronous=asynchronous)
    config = SimpleNamespace(checkpoint=options, distributed=CONFIG.distributed)
    saver = Saver(tmp_path / "checkpoints", [make_learner(1)], config)
    for step in (3, 6, 9):
        saver.save(step)
    assert asynchronous or "step_9" in names(saver.folder)
    saver.finish()
    assert names(saver.folder) == ["step_6", "step_9"]


def test_the_processes_of_a_save_wait_no_longer_than_others(process_group, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(dist, "new_group", lambda **terms: seen.update(terms))
    Saver(tmp_path, [], CONFIG)
    assert seen == {"backend": "gloo", "timeout": timedelta(seconds=60)}


def two_processes(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    os.environ["RANK"] = str(rank)
    saver = Saver(Path(folder) / "checkpoints", [make_learner(1)], CONFIG)
    for step in (3, 6):
        saver.save(step)
        for _ in range(20):  # as training does meanwhile
            dist.all_reduce(torch.ones(1000))
    saver.finish()
    assert checkpoint.find(saver.folder) == (6, [])

    def fail() -> None:
        raise OSError(errno.ENOSPC, f"rank {rank}")

    expected = pytest.raises(RunError) if rank else pytest.raises(OSError, match="rank 0")
    with expected:
        first_alone(fail, saver.group if saver.thread else None)
    with expected:
        checkpoint.write_sums = lambda *_: fail()
        saver.save(9)
        saver.finish()
    dist.barrier()
    dist.destroy_process_group()


def test_processes_save_together_and_fail_together(tmp_path):
    spawn(two_processes, str(tmp_path), processes=2)
    assert names(tmp_path / "checkpoints") == ["step_3", "step_6", "unfinished_9"]
