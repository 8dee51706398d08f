"""Models from their folders: sharded, to be trained, or whole, for the engine `hf`."""

import logging

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from codistill import distributed
from codistill.config import ConfigError, require
from codistill.config.base import first_line
from codistill.config.machinery import LoraConfig, TrainingConfig
from codistill.downloads import source
from codistill.model.definition import check_definition
from codistill.model.lora import add_adapters, start_adapters
from codistill.model.policy import Policy, prepare
from codistill.model.shards import local_part
from codistill.model.weights import empty_model, give_memory, read_weights, readable_files


def load_policy(
    key: str,
    path: str,
    options: TrainingConfig,
    vocab_size: int,
    device: torch.device,
    *,
    lora: LoraConfig | None = None,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """A sharded policy, ready to train. Collective; each process reads its own shards.

    lora: train only adapters. mesh: over which the policy is sharded (`distributed.shard_mesh`);
    None: over all processes.

    Weights that are not in the files as the model has them are read and converted by transformers,
    which takes a whole copy in each process.

    Raises:
        ConfigError: under configuration key `key`, the model is none that can be trained, or its
            files do not hold its weights, all of them and no others, all finite.
    """
    check_definition(key, path, device)
    home = torch.device("cpu") if options.offload == "all" else device
    try:
        lm = empty_model(path)
        files = readable_files(lm, key, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{key} = {path!r}: {first_line(error)}") from error
    if files is None:
        logging.getLogger(__name__).info(
            "%s: transformers converts the weights of %s, whole in every process", key, path
        )
        lm = load_causal_lm(path, dtype=torch.float32, key=key).to(home)
        check_finite(key, path, lm)
    if lora is not None:
        add_adapters(lm, key, path, lora)
    policy = prepare(lm, options, vocab_size, device, mesh)
    if files is None:
        start_adapters(policy.lm)
        return policy
    give_memory(policy, weights=home, buffers=device)
    unread: Exception | None = None
    try:
        read_weights(policy.lm, files)
    except (OSError, ValueError, SafetensorError) as error:
        unread = error
    reason = distributed.first_error(unread)
    if reason is not None:
        raise ConfigError(f"{key} = {path!r}: {reason}") from unread
    start_adapters(policy.lm)
    check_finite(key, path, policy.lm)
    return policy


def check_finite(key: str, path: str, lm: nn.Module) -> None:
    """Raise ConfigError on all processes for a weight with a NaN or an infinity. Collective.

    Rows of tokens that no prompt has count too: a rollout may have them in a later step.
    """
    wrong = [
        n for n, weight in lm.named_parameters() if not local_part(weight.detach()).isfinite().all()
    ]
    found = distributed.first_error(ValueError(wrong[0]) if wrong else None)
    name = "" if found is None else found.partition(": ")[2]
    require(found is None, key, path, f"weights that are finite; {name} has a NaN or an infinity")


def load_causal_lm(path: str, *, dtype: torch.dtype, key: str = "path") -> PreTrainedModel:
    """From safetensors only: other formats are pickles, which may run code.

    key: of the path in what the user gave.

    Raises:
        ConfigError: under `key`, the weights cannot be read, some are missing and would be random
            numbers, or there are others, which would be left out.
    """
    try:
        lm, found = AutoModelForCausalLM.from_pretrained(
            source(path),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key} = {path!r}: {first_line(error)}") from error
    for kind in ("missing", "unexpected"):
        names = sorted(found[f"{kind}_keys"])
        expected = f"all weights and no others, {len(names)} are {kind}: {', '.join(names[:3])}"
        require(not names, key, path, expected)
    return lm
