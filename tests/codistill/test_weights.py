"""Weights in a folder or in the cache of the Hub: whole, finite, read without a network."""

import math
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from codistill.config import Config, ConfigError
from codistill.config.machinery import TrainingConfig
from codistill.downloads import source
from codistill.engine import EngineSpec
from codistill.engine.hf import HFEngine
from codistill.inputs import load_inputs
from codistill.model.loading import load_policy


def spoiled(models, tmp_path, name: str, value: float) -> Path:
    """A model with one number that is none, in a row that no token of the tokenizer uses."""
    shutil.copytree(models["large"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[name][-1, -1] = value
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    return tmp_path / "model"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_found(models, tmp_path, process_group, name, value):
    path = spoiled(models, tmp_path, name, value)
    with pytest.raises(ConfigError) as error:
        load_policy("large.path", str(path), TrainingConfig(), 18, torch.device("cpu"))
    assert str(error.value) == (
        f"large.path = {str(path)!r}: expected weights that are finite; {name} has a NaN or an "
        "infinity"
    )


@pytest.fixture
def cached(models, tmp_path, monkeypatch) -> Path:
    """The large model as the Hub's cache has it, under the name org/model; no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    entry = tmp_path / "hub" / "models--org--model"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("1a2b")
    return Path(shutil.copytree(models["large"], entry / "snapshots" / "1a2b"))


def test_a_cached_model_of_the_hub_is_read_without_a_network(cached, settings, process_group):
    assert source("org/model") == str(cached) and source("org/other") == "org/other"
    settings["large"]["path"] = "org/model"
    found = load_inputs(Config(**settings))
    assert found.fingerprints["large.path"] == {"commit": "1a2b"}
    load_policy("large.path", "org/model", TrainingConfig(), 18, torch.device("cpu"))
    HFEngine(EngineSpec("org/model", 18, (1,), 20, torch.float32, torch.device("cpu"), 0.1))


def test_the_weights_of_a_cached_model_are_looked_at(cached, settings):
    content = (cached / "model.safetensors").read_bytes()
    (cached / "model.safetensors").write_bytes(content[:-9])
    settings["large"]["path"] = "org/model"
    with pytest.raises(ConfigError, match="large.path = .*a whole safetensors file model.safetens"):
        load_inputs(Config(**settings))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
def test_a_cache_that_lacks_a_file_is_no_model(cached, name):
    (cached / name).unlink()
    assert source("org/model") == "org/model"


def test_a_file_that_the_hub_does_not_have_is_not_missed(cached):
    (cached / "generation_config.json").unlink()
    absent = cached.parents[1] / ".no_exist" / "1a2b"
    absent.mkdir(parents=True)
    (absent / "generation_config.json").touch()
    assert source("org/model") == str(cached)
