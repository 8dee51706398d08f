"""Checkpoints of a run: checkpoints/step_<k>/, sharded, readable by any number of processes.

Data order and sampling are functions of seed and step, so weights, optimizer states and the step
number are all there is to save.
"""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from codistill import distributed

if TYPE_CHECKING:
    from codistill.learner import Learner

STEP = re.compile(r"step_(\d+)")


def latest(folder: Path) -> int | None:
    """Number of the last complete checkpoint under `folder`."""
    found = [STEP.fullmatch(path.name) for path in folder.glob("step_*")]
    return max((int(match[1]) for match in found if match), default=None)


def save(folder: Path, step: int, learners: "list[Learner]") -> None:
    """Every process must call. A folder named step_<k> is complete; older ones are removed."""
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
    """Every process must call, as many of them as like."""
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
        learner.schedule.load_state_dict(loaded["schedule"])


def state(learner: "Learner") -> dict:
    model, optimizer = get_state_dict(learner.policy, learner.optimizer)
    return {"model": model, "optimizer": optimizer, "schedule": learner.schedule.state_dict()}
