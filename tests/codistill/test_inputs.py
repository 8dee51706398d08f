"""With which configurations a run goes on that has a checkpoint."""

from pathlib import Path

import pytest
import yaml
from tiny import merged

from codistill.config import Config, ConfigError
from codistill.inputs import changes_of_run


@pytest.fixture
def folder(settings) -> Path:
    """What a run of three steps leaves that matters here."""
    folder = Path(settings["output_dir"]) / settings["name"]
    (folder / "checkpoints" / "step_3").mkdir(parents=True)
    content = Config(**settings).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"training": {"steps": 9}}, {"training.steps": (3, 9)}),
        (
            {"evaluation": {"every": 1, "large": False}},
            {"evaluation.every": (2, 1), "evaluation.large": (True, False)},
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
    (folder / "checkpoints" / "step_3").rmdir()
    assert changes_of_run(Config(**merged(settings, {"seed": 1})), 8) == {}
