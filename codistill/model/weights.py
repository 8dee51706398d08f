"""Weights of a model's folder, read straight into the shards of each process.

A model is made without memory (torch's device "meta"), sharded, given memory for its shards alone
and filled from the safetensors files: each process reads its own rows of every weight. No process
ever holds a whole model.
"""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from codistill.config import require
from codistill.downloads import INDEX, SINGLE, source, weight_files
from codistill.model.lora import plain_name
from codistill.model.policy import Policy
from codistill.model.pretrained import meta_model
from codistill.model.shards import local_part, own_part

Files = dict[str, Path]
"""Name of a weight -> the file that holds it."""

PLAIN = {"F64", "F32", "F16", "BF16"}  # dtypes, as safetensors names them, that are numbers alone
FILES_OF_HUB = ["config.json", "generation_config.json", INDEX, SINGLE, "model-*.safetensors"]
OLD_BUFFER = r"rotary_emb\.inv_freq$"  # saved with each layer by early versions of transformers


def empty_model(path: str) -> PreTrainedModel:
    """The model of a folder or Hub name in float32, without memory for its weights."""
    lm = meta_model(path).eval()
    try:
        lm.generation_config = GenerationConfig.from_pretrained(source(path))
    except OSError:  # there is none: what the model's own configuration says stays
        pass
    return lm


def readable_files(lm: PreTrainedModel, key: str, path: str) -> Files | None:
    """Where each weight of the model lies, if all lie in the files as they are in the model.

    None if a weight has another name or shape there, or is quantized: then transformers must
    convert it.

    Raises:
        ConfigError: the files hold all weights of the model and others besides.
    """
    if getattr(lm.config, "quantization_config", None) is not None:
        return None
    folder = Path(source(path))
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=FILES_OF_HUB))
    found: Files = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file_name in weight_files(key, folder):
        with safe_open(folder / file_name, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                if part.get_dtype() in PLAIN:
                    found[name], shapes[name] = folder / file_name, tuple(part.get_shape())
    wanted = lm.state_dict()
    optional = {name for name, _ in tied_names(lm)} - found.keys()
    if any(shapes.get(name) != wanted[name].shape for name in wanted.keys() - optional):
        return None
    ignored = re.compile("|".join([OLD_BUFFER, *(lm._keys_to_ignore_on_load_unexpected or ())]))
    others = sorted(name for name in found.keys() - wanted.keys() if not ignored.search(name))
    names = ", ".join(others[:3])
    expected = f"all weights and no others, {len(others)} are unexpected: {names}"
    require(not others, key, path, expected)
    return found


def tied_names(lm: nn.Module) -> list[tuple[str, str]]:
    """Each second name of a weight that has several, with the first: lm_head, embed_tokens."""
    first: dict[Tensor, str] = {}
    names = lm.named_parameters(remove_duplicate=False)
    pairs = [(name, first.setdefault(weight, name)) for name, weight in names]
    return [(name, original) for name, original in pairs if name != original]


def give_memory(policy: Policy, *, weights: torch.device, buffers: torch.device) -> None:
    """Memory for a model that has none: its buffers are computed, its weights hold anything."""
    lm = policy.lm
    twins = tied_names(lm)
    policy.to_empty(device=weights)
    for name, original in twins:  # each name has got memory of its own
        module, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(module), leaf, lm.get_parameter(original))
    for tensor in lm.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # transformers then computes the other buffers alone
    lm.initialize_weights()
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(buffers))


@torch.no_grad()
def read_weights(lm: PreTrainedModel, files: Files) -> None:
    """Fill the weights, or this process's shards of them, from the files; dtypes may differ.

    A file is opened anew for each weight: pages that were read of it count as this process's memory
    until it is closed.

    Raises:
        ValueError: two weights are one in config.json, and different in the files.
    """
    twins = dict(tied_names(lm))
    for inner_name, weight in lm.state_dict(keep_vars=True).items():
        name = plain_name(inner_name)
        if name not in files:  # the second name of a weight, or an adapter's
            continue
        part = local_part(weight)
        with safe_open(files[name], framework="pt") as file:
            if name not in twins:
                part.copy_(read_part(file, name, weight))
            elif not torch.equal(part, read_part(file, name, weight).to(part)):
                raise ValueError(f"config.json ties {name} and {twins[name]}, the files do not")


def read_part(file: safe_open, name: str, weight: Tensor) -> Tensor:
    """This process's part of a weight, from a safetensors file."""
    return file.get_slice(name)[own_part(weight)]
