"""--dry-run: what it checks, what it says, and that it does nothing else."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from tiny import merged

from codistill.batch import pack
from codistill.config import Config, ConfigError
from codistill.dry_run import dry_run, multiples, plan
from codistill.inputs import load_inputs
from codistill.model.loading import load_causal_lm
from codistill.model.shape import model_shape


def test_dry_run_prints_a_configuration_and_a_plan(settings, train, tmp_path):
    done = train(settings, "--kd.alpha", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == Config(
        **merged(settings, {"kd": {"alpha": 2.0}})
    ).model_dump(mode="json")
    lines = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    assert lines[0].split(None, 2) == ["#", "processes:", "1 on cpu, rollout engine hf"]
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "problems.jsonl"]


def test_dry_run_refuses_what_a_start_refuses(settings, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"problem": "1+1", "answer": ""}\n')
    config = Config(**merged(settings, {"data": {"eval": str(wrong)}}))
    with pytest.raises(ConfigError, match="data.eval = "):
        dry_run(config)


def parameters(path: str) -> int:
    return model_shape("small.path", path).parameters


def test_plan_by_hand(settings):
    changes = {"training": {"inner_epochs": 3}, "loss": {"beta": 0.1}}
    config = Config(**merged(settings, changes))
    texts = dict(plan(config, load_inputs(config), 2))
    small, large = (parameters(settings[name]["path"]) for name in ("small", "large"))
    assert texts["small model"] == (
        f"{small:,} parameters, writes the rollouts, learns at 0.01, a frozen copy as reference"
    )
    assert texts["large model"].startswith(f"{large:,} parameters, learns at 0.01")
    assert texts["steps"] == "3 of 8 problems"
    assert texts["optimizer steps"] == "9 for each model that learns"
    assert texts["prompts per step"] == "4, 2 for each process"
    assert texts["rollouts"] == "24, M = 6 per prompt"
    assert texts["trained on"] == "16, G = 4 per prompt"
    # Prompts of 4 tokens and 8 more: 5 of 12 fit into a row of 64.
    assert texts["tokens"] == "at most 288, with 4 of a prompt and 8 of a completion"
    assert texts["micro-batches"] == (
        "at most 3 to score and 2 to train each model, on each process"
    )
    assert texts["evaluations"] == "3, each of 8 problems"
    assert texts["checkpoints"].startswith("3, each of ")
    assert texts["files"] == str(Path(settings["output_dir"]) / "tiny")


def test_frozen_models_and_steps_that_are_done(settings):
    settings = merged(settings, {"algorithm": "kdrl", "rollout": {"sampling_rounds": 2}})
    config = Config(**settings)
    inputs = load_inputs(config)
    folder = Path(settings["output_dir"]) / "tiny" / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "sha256sums").write_text("0  .metadata\n")
    texts = dict(plan(config, inputs, 1))
    assert texts["large model"].endswith("parameters, frozen")
    assert texts["steps"] == "3 of 8 problems, 2 of them done"
    assert texts["rollouts"].endswith("M = 6 per prompt, in each of at most 2 rounds")


def test_parameters_are_those_of_the_loaded_model(models):
    for path in models.values():
        loaded = load_causal_lm(str(path), dtype=torch.float32)
        assert parameters(str(path)) == sum(p.numel() for p in loaded.parameters())


def test_adapters_are_what_a_checkpoint_holds(settings):
    """B and A of rank 2 on q_proj alone, in both layers of each model: 2 * 2 * 2 H numbers."""
    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]}
    models = {name: settings[name] | {"lora": lora} for name in ("small", "large")}
    config = Config(**settings | models | {"loss": {"beta": 0.1}})
    inputs = load_inputs(config)
    texts = dict(plan(config, inputs, 1))
    hidden = [model_shape("", settings[name]["path"]).hidden for name in ("small", "large")]
    for name, width in zip(("small", "large"), hidden, strict=True):
        assert f" and {8 * width:,} of adapters, " in texts[f"{name} model"]
        assert "reference" not in texts[f"{name} model"]
    assert f"each of {12 * 8 * sum(hidden) / 2**30:.2g} GiB" in texts["checkpoints"]


def test_no_lengths_need_more_rows():
    generator = torch.Generator().manual_seed(0)
    for longest in (5, 12, 33, 64):
        fit = 64 // longest
        for _ in range(50):
            lengths = torch.randint(1, longest + 1, (17,), generator=generator)
            assert len(pack(lengths, 64)) <= -(-17 // fit)


def test_multiples():
    assert multiples(2, 5) == [2, 4, 5]
    assert multiples(5, 5) == [5]
    assert multiples(7, 5) == [5]
