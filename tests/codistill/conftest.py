"""Fixtures of the trainer's tests: tiny models and a configuration of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from tiny import merged, save_model
from transformers import AutoTokenizer

from codistill.config import Config
from codistill.grading import Grader
from codistill.inputs import load_inputs
from codistill.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "small")


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """A tied small model and an untied large one, with more rows than tokens, not equally many."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "small": save_model(folder / "small", tokenizer, hidden=32, rows=24, seed=1, tied=True),
        "large": save_model(folder / "large", tokenizer, hidden=64, rows=40, seed=2, tied=False),
    }


@pytest.fixture
def settings(models, tmp_path) -> dict:
    """A complete configuration of a run of seconds."""
    rows = "".join(
        f'{{"problem": "{a}+{b}", "answer": "{a + b}"}}\n' for a in range(4, 8) for b in (1, 2)
    )
    (tmp_path / "problems.jsonl").write_text(rows)
    data = str(tmp_path / "problems.jsonl")
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "runs"),
        "small": {"path": str(models["small"]), "learning_rate": 1e-2},
        "large": {"path": str(models["large"]), "learning_rate": 1e-2},
        "data": {"train": data, "eval": data, "template": "{problem}="},
        "reward": {"format": True},
        "rollout": {
            "engine": "hf",
            "prompts_per_step": 4,
            "num_generations": 6,
            "max_prompt_tokens": 8,
            "max_completion_tokens": 8,
        },
        "downsample": {"keep": 4},
        "training": {"steps": 3, "tokens_per_micro_batch": 64, "dtype": "float32"},
        "evaluation": {"every": 2},
        "checkpoint": {"every": 1},
    }


@pytest.fixture(scope="session")
def grader():
    with Grader(timeout=20) as grader:
        yield grader


@pytest.fixture(autouse=True)
def one_thread():
    """For matrices this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def make_trainer(settings, grader, tmp_path):
    """A trainer in this process: make_trainer({"kd": {"alpha": 2}}) on top of `settings`, or of a
    whole configuration."""

    def make(changes: dict | Config | None = None, grader: Any = grader) -> Trainer:
        config = changes
        if not isinstance(config, Config):
            config = Config(**merged(settings, changes or {}))
        config.check_processes(1)
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
            )
        return Trainer(config, load_inputs(config), torch.device("cpu"), grader)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def train(tmp_path):
    """Run train.py as a user does: train(settings, "--key", "value", processes=1)."""

    def run(settings: dict, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        launcher = [sys.executable, "train.py"]
        if processes > 1:
            module = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            launcher = [sys.executable, *module, "train.py"]
        return subprocess.run(
            [*launcher, "--config", str(path), *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
