"""python -m codistill export: what it makes of a checkpoint, its model cards, what it refuses."""

import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from tiny import FakeGrader, merged

from codistill import checkpoint
from codistill.commands.export import main
from codistill.config import Config, ConfigError
from codistill.exports import export_models
from codistill.files import read_rows
from codistill.output.model_card import Cards
from codistill.output.run_directory import RunDirectory


@pytest.fixture
def run(settings, make_trainer) -> Path:
    """A run of two steps, with the checkpoints of both and the export of the second."""
    trainer = make_trainer({"kd": {"alpha": 2.0}}, FakeGrader())
    directory = RunDirectory(trainer.config)
    directory.start(-1, {})
    directory.add_evaluation({"step": 0, "small": 0.25, "large": 0.5})
    learners = list(trainer.learners.values())
    for step in (1, 2):
        trainer.step(step)
        directory.add_evaluation({"step": step, "small": 0.25 + step / 8})
        states = checkpoint.states_of(learners)
        checkpoint.save(directory.path / "checkpoints", step, states, keep=2)
    cards = Cards(trainer.config, 2, read_rows(directory.path / "evaluations.jsonl"))
    policies = {learner.name: learner.policy for learner in learners}
    tokenizer, target = trainer.inputs.tokenizer, directory.path / "export" / "step_2"
    target.parent.mkdir()
    export_models(policies, tokenizer, target, cards)
    dist.destroy_process_group()  # the command makes its own
    with patch.dict(os.environ):
        yield directory.path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_exports_what_the_run_did(run, tmp_path, capsys):
    before = contents(run / "export" / "step_2")
    main([str(run), "--output", str(tmp_path / "mine" / "last")])
    assert contents(tmp_path / "mine" / "last") == before
    paths = [str(tmp_path / "mine" / "last" / name) for name in ("small", "large")]
    assert capsys.readouterr().out.split() == paths
    main([str(run), "--step", "1"])
    first = load_file(run / "export" / "step_1" / "large" / "model.safetensors")
    second = load_file(run / "export" / "step_2" / "large" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert "| all | 1 | 37.5 % |" in (run / "export/step_1/small/README.md").read_text()


def test_a_damaged_checkpoint_is_passed_over_and_left(run, capsys):
    damaged = run / "checkpoints" / "step_2"
    (damaged / ".metadata").write_bytes(b"")
    main([str(run)])
    assert "step_2, which has another checksum" in capsys.readouterr().err
    assert (run / "export" / "step_1" / "small" / "README.md").is_file()
    with pytest.raises(ConfigError, match="step = 2: expected a good checkpoint: step_2 has ano"):
        main([str(run), "--step", "2"])
    assert damaged.is_dir()


def test_what_is_refused(run, tmp_path, monkeypatch):
    def refused(*arguments: str) -> str:
        with pytest.raises(ConfigError) as error:
            main(list(arguments))
        return str(error.value)

    assert "the folder of a run, with config.yaml in it" in refused(str(tmp_path / "nowhere"))
    assert refused(str(run), "--output", str(tmp_path)).endswith("a folder that is not there yet")
    assert refused(str(run), "--step", "7").endswith("the step of a checkpoint of the run: 1, 2")
    (tmp_path / "file").touch()
    assert "expected a folder that can be" in refused(str(run), "--output", f"{tmp_path}/file/x")
    with monkeypatch.context() as moved:
        moved.setattr("codistill.model.pretrained.source", lambda path: f"{path}/gone")
        line = refused(str(run))
    assert line.startswith(f"run = {str(run)!r}: expected a run of this version whose models are ")
    assert f"{run / 'config.yaml'}: small.path = " in line
    (run / "checkpoints").rename(run / "moved")
    assert refused(str(run)).endswith("a run with a checkpoint, there is none")
    (run / "config.yaml").write_text("name: x\nold: 1\n")
    assert "expected a run of this version" in refused(str(run))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused(str(run))


def test_model_card(run, models):
    text = (run / "export" / "step_2" / "small" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["codistill-grpo", "codistill", "reinforcement-learning"],
    }
    assert "# tiny: small model after step 2" in body
    assert "| all | before training | 25.0 % |\n| all | 2 | 50.0 % |\n" in body
    blocks = re.findall(r"^```yaml\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
    changed = yaml.safe_load(blocks[0])
    assert changed["kd.alpha"] == 2.0 and changed["small.path"] == "small"
    assert changed["data.train"] == ["problems.jsonl"] and "name" not in changed
    assert f"torch {torch.__version__}" in body
    assert str(models["small"].parent) not in text and str(run.parents[1]) not in text
    large = (run / "export" / "step_2" / "large" / "README.md").read_text()
    assert "| all | before training | 50.0 % |\n\n" in large


def test_model_cards_of_other_algorithms(settings):
    hub = {"small": {"path": "Qwen/Qwen2.5-Math-1.5B"}, "large": {"path": "Qwen/Qwen2.5-Math-7B"}}
    rows = [{"step": 3, "large/MATH500": 0.5, "large/AMC": 0.25, "large": 0.375, "small": None}]
    config = Config(**merged(settings, hub | {"algorithm": "kdrl"}))
    text = Cards(config, 3, rows).text("small")
    assert "\nbase_model: Qwen/Qwen2.5-Math-1.5B\n" in text and "- kdrl\n" in text
    assert "from the frozen teacher Qwen/Qwen2.5-Math-7B (KDRL)" in text
    assert "Held-out" not in text
    config = Config(**merged(settings, {"small": {"path": "/gone/away/model"}}))
    assert "/gone" not in Cards(config, 3, rows).text("small")
    config = Config(**merged(settings, hub | {"algorithm": "grpo", "grpo": {"model": "large"}}))
    text = Cards(config, 3, rows).text("large")
    assert "Qwen/Qwen2.5-Math-7B, trained by GRPO from its own rollouts" in text
    assert (
        "| mean | 3 | 37.5 % |" in text
        and "| MATH500 | 3 | 50.0 % |" in text
        and "| AMC | 3 | 25.0 % |" in text
    )
