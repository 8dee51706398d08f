"""Checkpoints that are damaged, hostile or cannot be written."""

import os
import pickle
import random
import re
import resource
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import spawn

from codistill import checkpoint, files
from codistill.config import ConfigError


def make_learner(seed: int = 0, outputs: int = 50) -> SimpleNamespace:
    """What a checkpoint needs to know of a learner, after an optimizer step."""
    torch.manual_seed(seed)
    policy = torch.nn.Linear(40, outputs)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    policy(torch.randn(2, 40)).sum().backward()
    optimizer.step()
    schedule.step()
    return SimpleNamespace(
        name="small",
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        release_states=lambda: None,
        skipped_in_a_row=0,
    )


def save(folder: Path, step: int, learner: SimpleNamespace, keep: int = 2) -> None:
    checkpoint.save(folder, step, checkpoint.states_of([learner]), keep=keep)


@pytest.fixture
def folder(process_group, tmp_path) -> Path:
    """Good checkpoints of the steps 3 and 6."""
    folder = tmp_path / "checkpoints"
    for step in (3, 6):
        save(folder, step, make_learner(step))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_sums(path: Path) -> None:
    """As `save` would for what is in the folder now."""
    found = [file.name for file in path.iterdir() if file.name != checkpoint.SUMS]
    checkpoint.write_sums(path, {name: files.sha256(path / name) for name in found})


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_last_are_kept_and_loaded(folder):
    (folder / "unfinished_8").mkdir()
    save(folder, 9, make_learner(9))
    assert names(folder) == ["step_6", "step_9"]
    skipping = make_learner(12)
    skipping.skipped_in_a_row = 2
    save(folder, 12, skipping, keep=3)
    assert names(folder) == ["step_12", "step_6", "step_9"]
    assert checkpoint.find(folder) == (12, [])
    learner, saved = make_learner(0), make_learner(12)
    checkpoint.load(folder, 12, [learner])
    assert torch.equal(learner.policy.weight, saved.policy.weight)
    (state, *_), (expected, *_) = (each.optimizer.state.values() for each in (learner, saved))
    assert torch.equal(state["exp_avg"], expected["exp_avg"])
    assert (learner.schedule.last_epoch, learner.skipped_in_a_row) == (1, 2)


def test_checksums_are_those_of_sha256sum(folder):
    command = ["sha256sum", "--check", "--strict", checkpoint.SUMS]
    subprocess.run(command, cwd=folder / "step_6", check=True, capture_output=True)
    listed = checkpoint.read_sums(folder / "step_6")
    assert set(listed) | {checkpoint.SUMS} == set(names(folder / "step_6"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_line(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


SHARD = "__0_0.distcp"
WRONG = "another checksum than when it was written"
DAMAGES = {
    "a bit of a shard": (lambda step: flip_a_bit(step / SHARD), f"{WRONG}: {SHARD}"),
    "a bit of the metadata": (lambda step: flip_a_bit(step / ".metadata"), f"{WRONG}: .metadata"),
    "a short shard": (lambda step: cut(step / SHARD), f"{WRONG}: {SHARD}"),
    "no shard": (lambda step: (step / SHARD).unlink(), f"lacks {SHARD}"),
    "no metadata": (lambda step: (step / ".metadata").unlink(), "lacks .metadata"),
    "no checksums": (lambda step: (step / checkpoint.SUMS).unlink(), "has no sha256sums"),
    "short checksums": (
        lambda step: drop_a_line(step / checkpoint.SUMS),
        "sha256sums that was cut off",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(folder, name):
    damage, reason = DAMAGES[name]
    damage(folder / "step_6")
    step, (line,) = checkpoint.find(folder)
    assert step == 3
    assert re.search(rf"passed over .*/step_6, which .*{reason}; it is damaged_6 now$", line)
    checkpoint.load(folder, 3, [make_learner()])
    save(folder, 6, make_learner())
    assert names(folder) == ["damaged_6", "step_3", "step_6"]
    assert checkpoint.find(folder) == (6, [])


def as_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def as_a_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


ACCIDENTS = [
    lambda file, at: file.write_bytes(file.read_bytes()[:at]),
    lambda file, at: file.write_bytes(file.read_bytes() + b"\0"),
    lambda file, at: file.write_bytes(file.read_bytes()[:at] + bytes(file.stat().st_size - at)),
    lambda file, at: file.unlink(),
    lambda file, at: as_a_folder(file),
    lambda file, at: as_a_link(file),
    lambda file, at: file.write_bytes(b""),
]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(15))
def test_any_accident_to_any_file_is_noticed(folder, seed):
    chance = random.Random(seed)
    file = chance.choice(sorted((folder / "step_6").iterdir()))
    chance.choice(ACCIDENTS)(file, chance.randrange(file.stat().st_size))
    assert checkpoint.find(folder).step == 3
    checkpoint.load(folder, 3, [make_learner()])


def test_foreign_entries_are_passed_over(folder):
    (folder / "step_7").write_text("no checkpoint")
    (folder / "step_99").mkdir()
    (folder / "step_six").mkdir()
    assert checkpoint.latest(folder) == 6
    step, lines = checkpoint.find(folder)
    assert step == 6 and len(lines) == 2
    assert "step_99, which has no sha256sums" in lines[0] and "step_7, which is no f" in lines[1]


def test_without_a_good_checkpoint_nothing_is_changed(folder):
    flip_a_bit(folder / "step_6" / SHARD)
    (folder / "step_3" / SHARD).unlink()
    with pytest.raises(ConfigError) as error:
        checkpoint.find(folder)
    assert re.search("expected a good checkpoint .*: step_6 has .*; step_3 lacks", str(error.value))
    assert "\n" not in str(error.value)
    (folder / "step_6" / SHARD).unlink()
    with pytest.raises(ConfigError, match="step_6 lacks .*; step_3 lacks"):
        checkpoint.latest(folder)  # found before a model is loaded
    assert names(folder) == ["step_3", "step_6"]
    assert checkpoint.find(folder / "other") == (None, [])


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_hostile_metadata_is_not_unpickled(folder, tmp_path):
    (folder / "step_6" / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "owned")))
    write_sums(folder / "step_6")
    step, (line,) = checkpoint.find(folder)
    assert step == 3 and "that is no metadata: names posix.mkdir" in line
    assert not (tmp_path / "owned").exists()


def test_hostile_values_are_not_unpickled(folder, tmp_path):
    learner = make_learner()
    hostile = learner.schedule.state_dict() | {"last_epoch": Hostile(tmp_path / "owned")}
    learner.schedule.state_dict = lambda: hostile
    save(folder, 9, learner)
    with pytest.raises(ConfigError, match="step_9: expected a checkpoint of these models: "):
        checkpoint.load(folder, 9, [make_learner()])
    assert not (tmp_path / "owned").exists()


def test_weights_of_another_shape_are_refused_in_one_line(folder):
    other = make_learner()
    other.name = "large"
    with pytest.raises(ConfigError) as error:
        checkpoint.load(folder, 6, [other])
    assert "expected a checkpoint of these models" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("outputs", "limit"), [(50, 5000), (5000, 200_000)], ids=["in Python", "in torch"]
)
def test_a_full_disk_leaves_the_checkpoints_before(folder, outputs, limit):
    """A limit of file sizes does to torch what a full disk does."""
    learner = make_learner(outputs=outputs)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(Exception) as error:
            save(folder, 9, learner)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.is_disk_full(error.value)
    assert names(folder) == ["step_3", "step_6"]
    assert checkpoint.find(folder) == (6, [])
    save(folder, 9, learner)
    assert names(folder) == ["step_6", "step_9"]


def two_processes(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    os.environ["RANK"] = str(rank)
    path = Path(folder) / "checkpoints"
    for step in (3, 6):
        save(path, step, make_learner(step))
    if rank == 0:
        flip_a_bit(max(path.glob("step_6/*.distcp"), key=lambda file: file.stat().st_size))
    dist.barrier()
    step, lines = checkpoint.find(path)
    assert step == 3 and len(lines) == 1, (rank, step, lines)
    checkpoint.load(path, 3, [make_learner()])
    dist.barrier()
    dist.destroy_process_group()


def test_processes_agree_on_what_is_damaged(tmp_path):
    spawn(two_processes, str(tmp_path), processes=2)
    assert names(tmp_path / "checkpoints") == ["damaged_6", "step_3"]
