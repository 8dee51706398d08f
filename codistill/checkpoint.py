"""Checkpoints of a run: checkpoints/step_<k>/, sharded, readable by any number of processes.

Data order and sampling are functions of seed and step, so only weights, optimizer states, positions
in the learning-rate schedule and the number of the step are saved. The last file that is written
into a checkpoint holds the checksums of all others, in the format of the command sha256sum.
"""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from codistill import distributed, files
from codistill.config import ConfigError
from codistill.config.base import first_line
from codistill.failures import first_alone
from codistill.unpickling import PlainPlanner, check_metadata

if TYPE_CHECKING:
    from codistill.learner import Learner

STEP = re.compile(r"step_(\d+)")
METADATA, SUMS = ".metadata", "sha256sums"
WITHOUT_FROZEN = StateDictOptions(strict=False)


class Found(NamedTuple):
    """What `find` has found."""

    step: int | None
    """The step of the last good checkpoint; None if there are no checkpoints at all."""
    passed_over: list[str]
    """One line for each later entry that is no good checkpoint: which and why."""


def latest(folder: Path) -> int | None:
    """The step of the last checkpoint under `folder` that has all its files; None without any.

    Contents are not read: `find` does.

    Raises:
        ConfigError: there are checkpoints, and none has all its files.
    """
    flaws = {step: flaw(folder / f"step_{step}") for step in steps_named(folder)}
    complete = [step for step, reason in flaws.items() if reason is None]
    if flaws and not complete:
        raise none_is_good(folder, [f"step_{step} {reason}" for step, reason in flaws.items()])
    return max(complete, default=None)


def find(folder: Path) -> Found:
    """The last checkpoint under `folder` whose files are as they were written.

    Later entries, which are no good checkpoints, are renamed to damaged_<k>. Collective: each
    process reads its share of the files.

    Raises:
        ConfigError: there are checkpoints, and none is good; nothing was changed.
    """
    step, reasons = last_good(folder)
    if step is not None and distributed.is_first():
        put_aside(folder, list(reasons))
    lines = [
        f"passed over {folder}/step_{bad}, which {why}; it is damaged_{bad} now"
        for bad, why in reasons.items()
    ]
    return Found(step, lines)


def last_good(folder: Path) -> tuple[int | None, dict[int, str]]:
    """The step of the last checkpoint under `folder` whose files are as they were written, and why
    each later one is none; None if there are no checkpoints at all. Collective; changes nothing.

    Raises:
        ConfigError: there are checkpoints, and none is good.
    """
    reasons: dict[int, str] = {}
    for step in agreed(steps_named(folder)):
        reason = damage(folder / f"step_{step}")
        if reason is None:
            return step, reasons
        reasons[step] = reason
    if reasons:
        raise none_is_good(folder, [f"step_{step} {reason}" for step, reason in reasons.items()])
    return None, {}


def none_is_good(folder: Path, reasons: list[str]) -> ConfigError:
    """What is said when nothing of a run can be gone on from, though there are checkpoints."""
    return ConfigError(
        f"{folder}: expected a good checkpoint to go on from: {'; '.join(reasons)}. Nothing was "
        "changed; give another name, or move this folder away, to start anew"
    )


def steps_named(folder: Path) -> list[int]:
    """Numbers k of the entries step_<k>, whatever they are, from the last to the first."""
    found = [STEP.fullmatch(path.name) for path in folder.glob("step_*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def flaw(path: Path) -> str | None:
    """Why a checkpoint cannot be whole, as far as names of files tell; None if it may be."""
    if not path.is_dir():
        return "is no folder"
    if not (path / SUMS).is_file():
        return f"has no {SUMS}"
    sums = read_sums(path)
    if METADATA not in sums:
        return f"has a {SUMS} that was cut off"
    lost = sorted(name for name in sums if not (path / name).is_file())
    return f"lacks {', '.join(lost)}" if lost else None


def damage(path: Path) -> str | None:
    """Why a checkpoint is not as it was written; None if it is. Collective."""
    reason = agreed(flaw(path))
    if reason is not None:
        return reason
    sums = agreed(read_sums(path))
    found = checksums(path, list(sums))
    wrong = sorted(name for name in sums if found[name] != sums[name])
    if wrong:
        return f"has another checksum than when it was written: {', '.join(wrong)}"
    return agreed(check_metadata(path / METADATA))


def checksums(
    folder: Path, names: list[str], group: dist.ProcessGroup | None = None
) -> dict[str, str]:
    """The sha256 of each file, "unreadable" where reading fails.

    Collective: each process reads its share.
    """
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        try:
            mine[name] = files.sha256(folder / name)
        except OSError:
            mine[name] = "unreadable"
    return {
        name: value for part in distributed.gathered(mine, group) for name, value in part.items()
    }


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> sha256, from the lines "sha256  name"."""
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def agreed(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The first process's value, on all processes. Collective."""
    values = [value]
    dist.broadcast_object_list(values, group=group)
    return values[0]


def put_aside(folder: Path, steps: list[int]) -> None:
    """Rename entries, so that a checkpoint of the same step can be written."""
    for step in steps:
        aside = folder / f"damaged_{step}"
        if aside.is_dir():
            shutil.rmtree(aside)
        (folder / f"step_{step}").replace(aside)


def save(
    folder: Path,
    step: int,
    states: dict[str, dict],
    *,
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write step_<k>, which is whole once it has this name, then remove all but the last `keep`.

    Collective: every process must call. group: of all processes; None is the default one.

    Raises:
        OSError, RuntimeError: it could not be written; `files.is_disk_full` knows one reason. The
            checkpoints before are as they were.
    """
    unfinished = folder / f"unfinished_{step}"
    first_alone(lambda: remove_unfinished(folder), group)
    try:
        dcp.save(states, checkpoint_id=unfinished, process_group=group)
    except CheckpointException as error:  # of all processes, and no Exception
        if distributed.is_first():
            remove_unfinished(folder)
        raise first_failure(error) from error
    names = agreed([path.name for path in unfinished.iterdir()], group)
    sums = checksums(unfinished, names, group)
    first_alone(lambda: finish(folder, step, sums, keep), group)


def finish(folder: Path, step: int, sums: dict[str, str], keep: int) -> None:
    """Give a checkpoint all of whose shards are written its checksums and its name, then remove old
    ones."""
    unfinished = folder / f"unfinished_{step}"
    write_sums(unfinished, sums)
    files.finish_folder(unfinished, folder / f"step_{step}")
    complete = [k for k in steps_named(folder) if flaw(folder / f"step_{k}") is None]
    for old in complete[keep:]:
        shutil.rmtree(folder / f"step_{old}")


def remove_unfinished(folder: Path) -> None:
    """Remove what is left of checkpoints that were never finished."""
    for path in folder.glob("unfinished_*"):
        shutil.rmtree(path, ignore_errors=True)


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Write the checksums; .metadata comes last, so a file that was cut off does not name it."""
    names = sorted(sums, key=lambda name: (name == METADATA, name))
    files.write_text(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in names))


def first_failure(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the processes where something did."""
    return error.failures[min(error.failures)][0]


def load(folder: Path, step: int, learners: "list[Learner]") -> None:
    """Bring the learners to where they were after `step`.

    Collective: every process must call. Their number may be another than when it was saved.

    Raises:
        ConfigError: the checkpoint holds other weights than the models have, or objects that are no
            plain data.
    """
    for learner in learners:  # one by one: the states of all may not fit on the device at once
        states = states_of([learner])
        read(folder / f"step_{step}", states)
        loaded = states[learner.name]
        set_state_dict(
            learner.policy,
            learner.optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
            options=WITHOUT_FROZEN,
        )
        learner.release_states()
        load_schedule(learner.schedule, loaded["schedule"])
        learner.skipped_in_a_row = loaded["skipped_in_a_row"]


def load_weights(folder: Path, step: int, policies: dict[str, nn.Module]) -> None:
    """Give models the weights they had after `step`, and read nothing else. Collective.

    Raises:
        ConfigError: as `load`.
    """
    states = {
        name: {"model": without_frozen(policy, get_model_state_dict(policy))}
        for name, policy in policies.items()
    }
    read(folder / f"step_{step}", states)
    for name, policy in policies.items():
        set_model_state_dict(policy, states[name]["model"], options=WITHOUT_FROZEN)


def read(path: Path, states: dict[str, dict]) -> None:
    """Fill `states`, which has the names and shapes of what is wanted, from a checkpoint."""
    try:
        dcp.load(states, checkpoint_id=path, planner=PlainPlanner())
    except CheckpointException as error:
        reason = first_line(first_failure(error))
        raise ConfigError(f"{path}: expected a checkpoint of these models: {reason}") from error


def load_schedule(schedule: LambdaLR, saved: dict[str, Any]) -> None:
    """Set the learning rate of the next optimizer step by this run's schedule.

    The rate that was saved is that of the schedule before, whose run may have been shorter.
    """
    schedule.load_state_dict(saved | {"last_epoch": saved["last_epoch"] - 1})
    schedule.step()


def states_of(learners: "list[Learner]") -> dict[str, dict]:
    """What a checkpoint holds of the learners, by name. Tensors are those of the learners."""
    states = {}
    for learner in learners:
        model, optimizer = get_state_dict(learner.policy, learner.optimizer)
        states[learner.name] = {
            "model": without_frozen(learner.policy, model),
            "optimizer": optimizer,
            "schedule": learner.schedule.state_dict(),
            "skipped_in_a_row": learner.skipped_in_a_row,
        }
    return states


def without_frozen(policy: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights by name, less those that are not trained: they are in the model's folder."""
    named = policy.named_parameters(remove_duplicate=False)  # a tied weight has two names
    frozen = {name for name, weight in named if not weight.requires_grad}
    return {name: weight for name, weight in weights.items() if name not in frozen}
