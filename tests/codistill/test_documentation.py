"""Every command of docs/algorithms.md, for a step of the tiny models; commands, keys and metrics of
docs/training_8_gpus.md are those that there are."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny import FakeGrader

from codistill.config import Config, load_config, load_options
from codistill.config.evaluation import EvalOptions
from codistill.config.load import field_keys
from codistill.config.plan import PlanOptions

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "algorithms.md").read_text()
COMMANDS = re.findall(r"^python train\.py --config configs/demo\.yaml (.*)$", TEXT, re.MULTILINE)
NAMES = [command.split()[1] for command in COMMANDS]
RECIPE = (ROOT / "docs" / "training_8_gpus.md").read_text()
SHELL = "".join(re.findall(r"```sh\n(.*?)```", RECIPE, re.DOTALL)).replace("\\\n", " ")
OF_A_GPU = ("memory/", "mfu/")


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


def test_commands_of_the_recipe_are_understood(monkeypatch):
    """Each that has a configuration or evaluates, with all of its options."""
    monkeypatch.chdir(ROOT)
    configured = re.findall(r"(plan|doctor|train\.py) (--config .*)", SHELL)
    for command, arguments in configured:
        words = [word for word in shlex.split(arguments) if word != "--dry-run"]
        load_config(words, PlanOptions if command == "plan" else Config)
    evaluations = re.findall(r"codistill eval (.*)", SHELL)
    for arguments in evaluations:
        load_options(EvalOptions, shlex.split(arguments))
    assert len(configured) == SHELL.count("--config") >= 8
    assert len(evaluations) == SHELL.count("codistill eval") == 3


def test_options_and_keys_of_the_recipe_are_there():
    sections = set(Config.model_fields)
    words = {key for key in re.findall(r"(?:`|--)(\w+\.\w+)", RECIPE)}
    named = {key for key in words if key.split(".")[0] in sections} - {"data.jsonl"}
    assert len(named) > 20 and named <= set(field_keys(Config))
    for option in re.findall(r"`(--(?:kd|hint|rollout|checkpoint|evaluation)\.[^`]+)`", RECIPE):
        preset = ["--config", str(ROOT / "configs" / "qwen2.5_math.yaml")]
        assert load_config([*preset, *shlex.split(option)])


def test_metrics_of_the_recipe_are_those_of_a_step(make_trainer):
    numbers, _, _ = make_trainer({}, FakeGrader()).step(1)
    prefixes = {key.split("/")[0] for key in numbers if "/" in key} | {"memory", "mfu"}
    named = {key for key in re.findall(r"`(\w+/\w+)`", RECIPE) if key.split("/")[0] in prefixes}
    assert len(named) > 15
    assert {key for key in named if not key.startswith(OF_A_GPU)} <= numbers.keys()
