"""Weights come from files into shards: the right ones, and never a whole model in a process."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from families import FAMILIES, SIZES, save_family
from processes import spawn
from safetensors.torch import load_file, save_file

from codistill.batch import Ragged, TokenBatch
from codistill.config import ConfigError
from codistill.config.machinery import TrainingConfig
from codistill.model.loading import load_causal_lm, load_policy
from codistill.model.policy import Policy

CPU = torch.device("cpu")
OPTIONS = TrainingConfig(dtype="float32")


def load(path: Path, options: TrainingConfig = OPTIONS):
    return load_policy("small.path", str(path), options, 20, CPU)


def assert_loaded(path: Path, options: TrainingConfig = OPTIONS) -> Policy:
    """The policy has the weights and buffers that transformers loads from the folder."""
    policy = load(path, options)
    expected = load_causal_lm(str(path), dtype=torch.float32)
    weights = dict(policy.full_weights())
    assert weights.keys() == dict(expected.named_parameters()).keys()
    for name, weight in expected.named_parameters():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weight), name
    buffers = dict(policy.lm.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert policy.lm.config.to_dict() == expected.config.to_dict()
    assert policy.lm.generation_config.to_dict() == expected.generation_config.to_dict()
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, process_group, monkeypatch, family):
    """Read directly, buffers as well as weights."""
    path = save_family(tmp_path, family)
    whole = load_causal_lm
    monkeypatch.setattr("codistill.model.loading.load_causal_lm", None)
    monkeypatch.setitem(globals(), "load_causal_lm", whole)
    assert_loaded(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_several_files_of_another_dtype(tmp_path, process_group, dtype):
    path = save_family(tmp_path, "qwen3", dtype, max_shard_size="10KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_loaded(path)


def edit(path: Path, change) -> None:
    """Change the dictionary of weights in a model's single file."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_weight_may_have_both_names(tmp_path, process_group):
    """But with the same numbers."""
    path = save_family(tmp_path, "qwen2, tied")
    name = "model.embed_tokens.weight"
    edit(path, lambda weights: weights.update({"lm_head.weight": weights[name].clone()}))
    assert_loaded(path)
    edit(path, lambda weights: weights["lm_head.weight"][36].add_(1))
    with pytest.raises(ConfigError, match="small.path = .* ties lm_head.weight and model.embed"):
        load(path)


def test_weights_that_the_model_has_not(tmp_path, process_group):
    """Left out silently, a model whose config.json has too few layers would be trained."""
    path = save_family(tmp_path, "qwen3")
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"small.path = .* are unexpected: model.layers.1.input"):
        load(path)


def test_old_buffers_in_a_file_are_no_weights(tmp_path, process_group):
    path = save_family(tmp_path, "llama 3, scaled rope")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(path, lambda weights: weights.update({name: torch.ones(8)}))
    assert_loaded(path)


def test_names_that_transformers_converts(tmp_path, process_group, caplog):
    """A file of the model without its head has no prefix; that it is read whole is said."""
    path = save_family(tmp_path, "qwen2, tied")

    def without_prefix(weights: dict) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    edit(path, without_prefix)
    with caplog.at_level(logging.INFO):
        assert_loaded(path)
    assert "transformers converts the weights of" in caplog.text


def test_missing_weights(tmp_path, process_group):
    path = save_family(tmp_path, "qwen3")
    edit(path, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match="1 are missing: model.norm.weight"):
        load(path)


def memory(key: str) -> int:
    """Bytes: VmRSS, what this process holds now, or VmHWM, the most it held."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{key}:")[1].split()[0])


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Gradient of the log-probabilities of some tokens in each weight, whole."""
    rows = Ragged.of([[3, 4, 5, 6], [7, 8, 9]])
    policy(TokenBatch.build(rows, rows, [0, 1], CPU), 0.9).sum().backward()
    grads = {name: weight.grad.full_tensor() for name, weight in policy.lm.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    return grads


def check_two_processes(rank: int, folder: str, paths: list[str], big: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for path in paths:
        expected = gradients(assert_loaded(Path(path)))
        for checkpointing in ("selective", "full"):
            choice = {"offload": "all", "gradient_checkpointing": checkpointing}
            found = gradients(assert_loaded(Path(path), OPTIONS.model_copy(update=choice)))
            assert all(torch.equal(found[name], expected[name]) for name in expected), choice
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    policy = load(Path(big))
    grown = torch.tensor(memory("VmHWM") - before)
    dist.all_reduce(grown)
    whole = 4 * sum(weight.numel() for weight in policy.parameters())
    assert 0.9 <= grown / whole <= 1.3, f"{grown / whole:.2f} copies of {whole / 2**20:.0f} MiB"
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_hold_one_copy(tmp_path):
    """At their peaks, together; each weight is whole again when it is gathered."""
    paths = [
        save_family(tmp_path / family, family)
        for family in ("qwen2, tied", "gemma 3, window", "phi, bias")
    ]
    sizes = SIZES | dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    big = transformers.Qwen2Config(**sizes | {"vocab_size": 8192})
    transformers.Qwen2ForCausalLM(big).save_pretrained(tmp_path / "big")
    spawn(
        check_two_processes,
        str(tmp_path),
        list(map(str, paths)),
        str(tmp_path / "big"),
        processes=2,
    )
