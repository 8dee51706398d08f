"""20 steps of each example, with the kernels and with the framework's own logits."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from codistill_kernels.integrations.trl import patch_trl

pytestmark = pytest.mark.usefixtures("single_thread")  # faster with small models
EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) == 20
    for step, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-4), step
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), step
        assert got.get("reward") == expected.get("reward"), step  # the same completions
    assert max(entry["grad_norm"] for entry in ours) > 0.01


def test_trl_grpo():
    pytest.importorskip("trl", reason="TRL is not installed")
    example = load("trl_grpo")
    theirs = example.train()
    with patch_trl():
        ours = example.train()
    assert_same(ours, theirs)


def test_plain_loop():
    example = load("plain_loop")

    def loss_of_logits(model, batch):
        all_logps = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        logps = all_logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        log_ratio = torch.where(batch["mask"], logps - batch["old_logps"], 0.0)
        ratio, advantages = log_ratio.exp(), batch["advantages"][:, None]
        clipped = ratio.clamp(1 - example.LOSS.epsilon_low, 1 + example.LOSS.epsilon_high)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        return -torch.where(batch["mask"], surrogate, 0.0).sum() / batch["mask"].sum()

    assert_same(example.train(), example.train(loss_of=loss_of_logits))
