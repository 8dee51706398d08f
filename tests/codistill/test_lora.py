"""Adapters: what peft computes, in training, for engines, in checkpoints and exports."""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from families import save_family
from peft import PeftModel
from plain_step import CPU, TEMPERATURE, VOCAB, batch_of, objective, plain_loss
from processes import spawn
from tiny import merged
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from codistill import checkpoint
from codistill.commands.export import main as export_again
from codistill.config import Config, ConfigError
from codistill.config.machinery import LoraConfig, OptimizerConfig, TrainingConfig
from codistill.learner import Learner
from codistill.model.loading import load_causal_lm, load_policy
from codistill.model.lora import adapter_weights, save_adapter, without_adapters
from codistill.model.policy import Policy
from codistill.model.shards import whole
from codistill.output.metrics import StepMetrics
from codistill_kernels import PolicyLoss

LORA = LoraConfig(rank=3, alpha=6)
RATE = 1e-2


def make_learner(path: str) -> Learner:
    options = TrainingConfig(dtype="float32", gradient_checkpointing="full")
    policy = load_policy("small.path", path, options, VOCAB, CPU, lora=LORA)
    constant = OptimizerConfig(schedule="constant", warmup_fraction=0)
    return Learner("small", policy, PolicyLoss(), constant, learning_rate=RATE, total_steps=9)


def take_step(learner: Learner) -> None:
    metrics = StepMetrics(CPU)
    batches = [batch_of([0, 1, 2, 3]), batch_of([4, 5, 6, 7])]
    learner.backward(batches, objective(), metrics, temperature=TEMPERATURE)
    learner.step(metrics)
    learner.policy.release()


def adapters(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: whole(w, CPU).clone() for name, w in adapter_weights(policy.lm).items()}


def saved(policy: Policy, folder: Path) -> str:
    save_adapter(policy.lm, folder, CPU)
    return str(folder)


def peft_model(path: str, adapter: str, **options) -> PeftModel:
    """The adapter of a folder as peft reads it, on the model it was trained on, in float64."""
    lm = load_causal_lm(path, dtype=torch.float64)
    return PeftModel.from_pretrained(lm, adapter, **options)


@pytest.fixture
def path(tmp_path) -> str:
    return str(save_family(tmp_path / "model", "qwen2, tied"))


def test_two_steps_are_those_of_peft(path, tmp_path, process_group):
    """The second step is the first in which the gradient of A is not zero."""
    learner = make_learner(path)
    policy = learner.policy
    before = dict(policy.full_weights())
    for name, weight in load_causal_lm(path, dtype=torch.float32).named_parameters():
        assert torch.equal(before[name], weight), name  # B starts at zero
    gold = peft_model(path, saved(policy, tmp_path / "adapter"), is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in gold.parameters() if p.requires_grad], lr=RATE)
    for _ in range(2):
        take_step(learner)
        plain_loss(gold).backward()
        torch.nn.utils.clip_grad_norm_(gold.parameters(), 1.0)
        optimizer.step()
        grads = {name: p.grad.clone() for name, p in gold.named_parameters() if p.requires_grad}
        optimizer.zero_grad()
    ours = adapters(policy)
    assert len(ours) == len(grads) == 2 * 7 * 2
    for name, weight in ours.items():
        peft_name = f"base_model.model.{name.removesuffix('weight')}default.weight"
        # Adam divides by the gradient's size: the sign of one that is all rounding is chance.
        is_sure = grads[peft_name].abs() > 1e-5
        error = (weight - gold.get_parameter(peft_name)).abs()
        assert is_sure.double().mean() > 0.8 and error[is_sure].max() < 0.02 * RATE, name


def test_merged_weights_are_those_of_peft(path, tmp_path, process_group):
    learner = make_learner(path)
    start = dict(learner.policy.full_weights())
    for _ in range(2):
        take_step(learner)
    ours = dict(learner.policy.full_weights())
    adapter = saved(learner.policy, tmp_path / "adapter")
    merged = peft_model(path, adapter).merge_and_unload()
    theirs = dict(merged.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-6, name
        assert torch.equal(weight, start[name]) != ("_proj.weight" in name), name
    stored = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["peft_type"]) == (3, 6, "LORA")


def sharded_step(rank: int, folder: str, path: str) -> None:
    """Two processes share the rollouts of one; dimensions divide by neither."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    learner = make_learner(path)
    start = adapters(learner.policy)
    batches = [batch_of([0, 2, 4]) if rank else batch_of([1, 3]), batch_of([[5, 7], [6]][rank])]
    for _ in range(2):
        metrics = StepMetrics(CPU)
        learner.backward(batches, objective(), metrics, temperature=TEMPERATURE)
        learner.step(metrics)
    weights = dict(learner.policy.full_weights())
    if rank == 0:
        torch.save((start, weights), f"{folder}/two.pt")
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


def test_two_processes_train_as_one(path, tmp_path, process_group):
    learner = make_learner(path)
    start = adapters(learner.policy)
    for _ in range(2):
        take_step(learner)
    weights = dict(learner.policy.full_weights())
    spawn(sharded_step, str(tmp_path), path, processes=2)
    other_start, others = torch.load(tmp_path / "two.pt")
    assert all(torch.equal(start[name], other_start[name]) for name in start)
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() < 2e-4, name


def test_a_checkpoint_holds_adapters_alone_and_goes_on_bitwise(path, tmp_path, process_group):
    learner = make_learner(path)
    take_step(learner)
    checkpoint.save(tmp_path / "checkpoints", 1, checkpoint.states_of([learner]), keep=2)
    take_step(learner)
    stored = FileSystemReader(tmp_path / "checkpoints" / "step_1").read_metadata()
    weights = [key for key in stored.state_dict_metadata if key.startswith("small.model.")]
    assert len(weights) == 28 and all("lora_" in key for key in weights)
    again = make_learner(path)
    checkpoint.load(tmp_path / "checkpoints", 1, [again])
    take_step(again)
    ours, theirs = adapters(again.policy), adapters(learner.policy)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_reference_is_the_model_with_its_adapters_off(path, process_group):
    learner = make_learner(path)
    policy, batch = learner.policy, batch_of(list(range(8)))
    with torch.no_grad():
        before = policy(batch, 1.0)
    policy.release()
    take_step(learner)
    with torch.no_grad():
        with without_adapters(policy.lm):
            assert torch.equal(policy(batch, 1.0), before)
        assert (policy(batch, 1.0) - before).abs().max() > 1e-3


def test_a_run(settings, train):
    """Both models with adapters and a KL penalty; exported merged and as adapters."""
    settings |= {
        "small": settings["small"] | {"lora": {"rank": 2, "alpha": 4}},
        "large": settings["large"]
        | {"lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}},
        "loss": {"beta": 0.1},
    }
    done = train(settings)
    assert done.returncode == 0, done.stderr
    folder = Path(settings["output_dir"]) / settings["name"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl/small_reference"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl/small_reference"] > 1e-6
    assert all(row["rollout/logp_gap_max"] < 1e-4 for row in rows)
    export = folder / "export" / "step_3"
    for name, layers in (("small", 14), ("large", 4)):
        merged = AutoModelForCausalLM.from_pretrained(export / name, dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(settings[name]["path"], dtype=torch.float32)
        start = dict(base.named_parameters())
        changed = [n for n, w in merged.named_parameters() if not torch.equal(w, start[n])]
        assert len(changed) == layers
        adapted = PeftModel.from_pretrained(base, str(export / f"{name}_adapter"))
        for key, weight in adapted.merge_and_unload().named_parameters():
            assert (weight - merged.get_parameter(key)).abs().max() < 1e-6, key
    with patch.dict(os.environ):
        export_again([str(folder), "--output", str(folder / "again")])
    for file in export.glob("*/*.safetensors"):
        assert file.read_bytes() == (folder / "again" / file.relative_to(export)).read_bytes()


def refused(path: str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        lora = LoraConfig(rank=2, alpha=4, **options)
        load_policy("small.path", path, TrainingConfig(), VOCAB, CPU, lora=lora)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_is_refused(path, monkeypatch):
    key = "small.lora.target_modules = ['"
    assert refused(path, target_modules=["k_prj"]).startswith(f"{key}k_prj']: expected names of li")
    for layer in ("lm_head", "embed_tokens"):
        line = refused(path, target_modules=["q_proj", layer])
        assert line.startswith(f"{key}q_proj', '{layer}']: expected linear layers of the decoder")
    line = refused(path, target_modules=["input_layernorm"])
    assert line.startswith(f"{key}input_layernorm']: expected names of linear layers")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refused(path) == (
        "small.lora needs peft, which is not installed: pip install 'codistill-grpo[lora]'"
    )


def test_a_teacher_has_no_adapters(settings):
    changes = {"algorithm": "kdrl", "large": {"lora": {"rank": 2, "alpha": 4}}}
    with pytest.raises(ValueError, match="large.lora.rank = 2: expected no value: algorithm k"):
        Config(**merged(settings, changes))
