"""Every command of docs/algorithms.md, for a step of the tiny models."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny import FakeGrader

from codistill.config import Config, load_config
from codistill.config.load import field_keys

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "algorithms.md").read_text()
COMMANDS = re.findall(r"^python train\.py --config configs/demo\.yaml (.*)$", TEXT, re.MULTILINE)
NAMES = [command.split()[1] for command in COMMANDS]


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_command(command, settings, models, make_trainer, tmp_path):
    arguments = shlex.split(command)
    assert load_config(["--config", str(ROOT / "configs" / "demo.yaml"), *arguments])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"training": {"dtype": "float32"}}))
    if "--large.path" in arguments:  # what another run has exported
        arguments[arguments.index("--large.path") + 1] = str(models["large"])
    config = load_config(["--config", str(path), *arguments])
    numbers, _, _ = make_trainer(config, FakeGrader()).step(1)
    for name in config.trained:
        assert numbers[f"grad_norm/{name}"] > 0


def test_there_are_commands_and_each_key_in_the_text_is_one():
    assert len(COMMANDS) > 25 and len(set(NAMES)) == len(NAMES)
    sections = set(Config.model_fields)
    named = {key for key in re.findall(r"`(\w+\.\w+)", TEXT) if key.split(".")[0] in sections}
    assert len(named) > 20 and named <= set(field_keys(Config))


def test_every_key_of_the_algorithm_is_explained():
    ours = ("grpo.", "hint.", "kd.", "downsample.", "advantage.", "loss.")
    keys = [key for key in field_keys(Config) if key.startswith(ours)]
    missing = [key for key in keys if key not in TEXT]
    assert not missing
