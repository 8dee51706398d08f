"""Checkpoints of a run: checkpoints/step_<k>/, sharded, readable by any number of processes.

Data order and sampling are functions of seed and step, so only weights, optimizer states, positions
in the learning-rate schedule and the number of the step are saved.
"""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR

from codistill import distributed

if TYPE_CHECKING:
    from codistill.learner import Learner

STEP = re.compile(r"step_(\d+)")


def latest(folder: Path) -> int | None:
    """Number of the last complete checkpoint under `folder`."""
    found = [STEP.fullmatch(path.name) for path in folder.glob("step_*")]
    return max((int(match[1]) for match in found if match), default=None)


def save(folder: Path, step: int, learners: "list[Learner]") -> None:
    """Write step_<k>, which is complete once it has this name, and remove older checkpoints.

    Collective: every process must call.
    """
    unfinished, finished = folder / f"unfinished_{step}", folder / f"step_{step}"
    if distributed.is_first():
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    dcp.save({learner.name: state(learner) for learner in learners}, checkpoint_id=unfinished)
    dist.barrier()
    if distributed.is_first():
        unfinished.rename(finished)
        for path in folder.glob("step_*"):
            if path != finished:
                shutil.rmtree(path)
    dist.barrier()


def load(folder: Path, step: int, learners: "list[Learner]") -> None:
    """Bring the learners to where they were after `step`.

    Collective: every process must call. Their number may be another than when it was saved.
    """
    states = {learner.name: state(learner) for learner in learners}
    dcp.load(states, checkpoint_id=folder / f"step_{step}")
    for learner in learners:
        loaded = states[learner.name]
        set_state_dict(
            learner.policy,
            learner.optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )
        load_schedule(learner.schedule, loaded["schedule"])


def load_schedule(schedule: LambdaLR, saved: dict[str, Any]) -> None:
    """Set the learning rate of the next optimizer step by this run's schedule.

    The rate that was saved is that of the schedule before, whose run may have been shorter.
    """
    schedule.load_state_dict(saved | {"last_epoch": saved["last_epoch"] - 1})
    schedule.step()


def state(learner: "Learner") -> dict:
    """What a checkpoint holds of a learner."""
    model, optimizer = get_state_dict(learner.policy, learner.optimizer)
    return {"model": model, "optimizer": optimizer, "schedule": learner.schedule.state_dict()}
