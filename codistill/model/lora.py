"""Adapters of low rank (LoRA) on a model whose own weights stay as they are.

W' = W + alpha / rank * B A,  A [rank, inputs], B [outputs, rank]

for each adapted linear layer with weight W [outputs, inputs]. Source: Hu et al. 2021
(arXiv:2106.09685), as peft computes it. A starts random and B at zero, so that W' starts as W.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from codistill.config import ConfigError, require
from codistill.config.base import first_line
from codistill.config.machinery import LoraConfig
from codistill.failures import first_alone
from codistill.model.shards import local_part, own_part, whole

ADAPTER = "default"  # the name that peft gives to the adapter of a model
PARTS = ("lora_A", "lora_B")
PREFIX = "base_model.model."  # before every name in an adapter's file, as peft has it


def add_adapters(lm: PreTrainedModel, key: str, path: str, lora: LoraConfig) -> None:
    """Freeze a model and adapt the layers that `lora` names, in place.

    key: of the model's path, as small.path. `start_adapters` then gives the adapters their first
    numbers.

    Raises:
        ConfigError: peft is not installed, no layer has such a name, or one that has is not a
            linear layer of a decoder layer.
    """
    key = f"{key.removesuffix('.path')}.lora"
    try:
        import peft
    except ImportError as error:
        hint = "peft, which is not installed: pip install 'codistill-grpo[lora]'"
        raise ConfigError(f"{key} needs {hint}") from error
    targets = lora.target_modules
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        task_type=peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=path,
    )
    try:
        peft.inject_adapter_in_model(settings, lm)
    except ValueError as error:
        expected = f"names of linear layers of the model; {first_line(error)}"
        raise ConfigError(f"{key}.target_modules = {targets!r}: expected {expected}") from error
    # An adapter of the head would need [vocabulary, hidden] more memory in every batch.
    inside = {m for m in lm.base_model.layers.modules() if isinstance(m, nn.Linear)}
    others = [name for name, layer in adapted_layers(lm) if layer.base_layer not in inside]
    expected = f"linear layers of the decoder layers, found {', '.join(others)}"
    require(not others, f"{key}.target_modules", targets, expected)


def adapted_layers(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each adapted layer; none in a model without adapters."""
    return ((name, layer) for name, layer in lm.named_modules() if hasattr(layer, "lora_A"))


def adapter_weights(lm: nn.Module) -> dict[str, Tensor]:
    """All A and B by the names that peft gives them in a file, less `PREFIX`."""
    return {
        f"{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in adapted_layers(lm)
        for part in PARTS
    }


def plain_name(name: str) -> str:
    """The Hugging Face name of one of the model's own weights, which an adapter may wrap."""
    return name.replace(".base_layer.", ".")


def own_weights(lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model without those of its adapters."""
    for name, parameter in lm.named_parameters():
        if not any(f".{part}.{ADAPTER}." in name for part in PARTS):
            yield name, parameter


def merged_weights(lm: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """All weights, whole, by Hugging Face name, with adapters added. Collective."""
    layers = {f"{name}.base_layer.weight": layer for name, layer in adapted_layers(lm)}
    for name, parameter in own_weights(lm):
        weight = whole(parameter, device)
        if name in layers:
            layer = layers[name]
            a, b = (whole(getattr(layer, part)[ADAPTER].weight, device) for part in PARTS)
            weight = weight + layer.scaling[ADAPTER] * (b @ a)
        yield plain_name(name), weight


@torch.no_grad()
def start_adapters(lm: nn.Module) -> None:
    """Fill each A with random numbers in [-1, 1] / sqrt(inputs), as peft does, and B with zeros.

    A depends on the layer's name alone: any number of processes starts alike.
    """
    for name, layer in adapted_layers(lm):
        weight = layer.lora_A[ADAPTER].weight
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        numbers = torch.empty(weight.shape)
        nn.init.kaiming_uniform_(numbers, a=math.sqrt(5), generator=generator)
        local_part(weight).copy_(numbers[own_part(weight)])
        nn.init.zeros_(local_part(layer.lora_B[ADAPTER].weight))


@contextmanager
def without_adapters(lm: nn.Module) -> Iterator[None]:
    """The model as it was before training, while adapters add nothing."""
    layers = [layer for _, layer in adapted_layers(lm)]
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def save_adapter(lm: Any, folder: Path, device: torch.device) -> None:
    """Save what PeftModel.from_pretrained reads; nothing of a model without adapters.

    device: where weights are gathered. Collective: every process must call; the first one writes.
    """
    weights = {
        PREFIX + name: whole(weight, device).cpu() for name, weight in adapter_weights(lm).items()
    }

    def write() -> None:
        lm.peft_config[ADAPTER].save_pretrained(folder)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    if weights:
        first_alone(write)
