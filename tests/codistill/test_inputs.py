"""With which configurations a run goes on that has a checkpoint."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import merged

from codistill import checkpoint, inputs
from codistill.config import Config, ConfigError
from codistill.config.changes import Changes
from codistill.data import Problem
from codistill.fingerprints import INPUTS, fingerprints


@pytest.fixture
def folder(settings) -> Path:
    """What a run of three steps leaves that matters here."""
    folder = Path(settings["output_dir"]) / settings["name"]
    step = folder / "checkpoints" / "step_3"
    step.mkdir(parents=True)
    (step / checkpoint.METADATA).touch()
    checkpoint.write_sums(step, {checkpoint.METADATA: ""})
    config = Config(**settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / INPUTS).write_text(json.dumps(fingerprints(config)))
    return folder


def changes_of_run(config: Config, num_problems: int) -> Changes:
    return inputs.changes_of_run(config, num_problems, fingerprints(config))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"training": {"steps": 9}}, {"training.steps": (3, 9)}),
        (
            {"evaluation": {"every": 1, "large": "never"}},
            {"evaluation.every": (2, 1), "evaluation.large": ("ends", "never")},
        ),
        ({"checkpoint": {"every": 7}}, {"checkpoint.every": (1, 7)}),
        (
            {"training": {"steps": None, "epochs": 2}},
            {"training.steps": (3, None), "training.epochs": (1, 2)},
        ),
    ],
    ids=["nothing", "steps", "evaluation", "checkpoint", "epochs"],
)
def test_length_and_output_may_change(settings, folder, changes, expected):
    assert changes_of_run(Config(**merged(settings, changes)), 8) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kd": {"alpha": 3.0}}, "kd.alpha = 3.0: expected 1.0 as in "),
        (
            {"seed": 1, "loss": {"beta": 0.5}},
            "seed = 1: expected 0; loss.beta = 0.5: expected 0.0 as in ",
        ),
        (
            {"reward": {"functions": {"mine.short": 0.5}}},
            "reward.functions.mine.short = 0.5: expected None as in ",
        ),
        ({"training": {"steps": 2}}, "training.steps = 2: expected at least the 3 steps that are"),
        (
            {"training": {"steps": None, "epochs": 1}},
            "training.epochs = 1: expected at least the 3 steps that are",
        ),
    ],
    ids=["one", "two", "in a dictionary", "fewer steps", "fewer epochs"],
)
def test_what_may_not_change_is_named(settings, folder, changes, expected):
    with pytest.raises(ConfigError) as error:
        changes_of_run(Config(**merged(settings, changes)), 8)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_keys_that_an_older_version_had_not_had_their_default(settings, folder):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    del content["loss"], content["kd"]["alpha"], content["seed"]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert changes_of_run(Config(**settings), 8) == {}
    with pytest.raises(ConfigError, match="^kd.alpha = 3.0: expected 1.0 as in"):
        changes_of_run(Config(**merged(settings, {"kd": {"alpha": 3.0}})), 8)


def test_keys_that_this_version_has_not_are_named(settings, folder):
    with (folder / "config.yaml").open("a") as file:
        file.write("speed: 3\n")
    with pytest.raises(ConfigError, match="is of another version: speed = 3: expected a known key"):
        changes_of_run(Config(**settings), 8)


def test_a_run_without_a_checkpoint_starts_anew(settings, folder):
    shutil.rmtree(folder / "checkpoints" / "step_3")
    assert changes_of_run(Config(**merged(settings, {"seed": 1})), 8) == {}


def test_checkpoints_that_are_gone_or_incomplete_are_said(settings, folder):
    (folder / "checkpoints" / "step_3" / checkpoint.METADATA).unlink()
    with pytest.raises(ConfigError, match="expected a good checkpoint .*: step_3 lacks .metadata"):
        changes_of_run(Config(**settings), 8)
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="name = 'tiny': expected the checkpoints of the 2 steps"):
        changes_of_run(Config(**settings), 8)
    settings["checkpoint"]["every"] = 3  # killed before the first was due
    assert changes_of_run(Config(**settings), 8) == {}


def test_files_may_move_and_not_change(settings, folder, models, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(models["large"], moved / "large")
    shutil.copy(tmp_path / "problems.jsonl", moved / "train.jsonl")
    paths = {"train": str(moved / "train.jsonl")}
    config = Config(**merged(settings, {"data": paths, "large": {"path": str(moved / "large")}}))
    assert set(changes_of_run(config, 8)) == {"data.train", "large.path"}

    lines = (moved / "train.jsonl").read_text().splitlines(keepends=True)
    (moved / "train.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(
        ConfigError, match=r"^data.train = \['.*began with, changed since: contents"
    ):
        changes_of_run(config, 8)
    (moved / "train.jsonl").write_text("".join(lines))

    weights = bytearray((moved / "large" / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # same names, same shapes, another number
    (moved / "large" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"^large.path = '.*changed since: model.safetensors; a"):
        changes_of_run(config, 8)


def test_held_out_problems_may_change_and_are_said(settings, folder, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"problem": "4+4", "answer": "8"}\n')
    changes = changes_of_run(Config(**merged(settings, {"data": {"eval": str(other)}})), 8)
    assert set(changes) == {"data.eval", "contents of data.eval"}


def test_without_fingerprints_paths_must_stay(settings, folder, tmp_path, caplog):
    (folder / INPUTS).write_text('{"data.train": ')
    assert changes_of_run(Config(**settings), 8) == {}
    assert "inputs.json: cannot be read" in caplog.text
    shutil.copy(tmp_path / "problems.jsonl", tmp_path / "other.jsonl")
    changes = {"data": {"train": str(tmp_path / "other.jsonl")}}
    with pytest.raises(ConfigError, match="^data.train = .*: expected "):
        changes_of_run(Config(**merged(settings, changes)), 8)


def test_what_may_be_a_mistake_in_problems_is_said(settings, caplog):
    problems = [
        Problem(text, (answer,), text, [3], {"problem": text, "choices": ["a", "b"]})
        for text, answer in (("1+1", "2"), ("1+1", "3"), ("2+2", "4"))
    ]
    sets = {"": [Problem("3+3", ("6",), "3+3", [3])], "amc23": problems[:2]}
    grader = SimpleNamespace(check_golds=lambda key, file, golds: None)
    inputs.check_problems(Config(**settings), problems, sets, grader)
    key = "evaluation.sets.amc23"
    assert caplog.messages == [
        "data.train: no prompt shows the fields choices",
        f"{key}: no prompt shows the fields choices",
        "data.train: 1 problems occur again with another answer",
        f"{key}: 1 problems occur again with another answer",
        "amc23 has 2 problems here, and 40 in the paper: their numbers do not compare",
        f"{key}: 2 of 2 problems are in data.train too: they are not held out",
    ]
