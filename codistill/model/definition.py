"""Whether a model computes what its own forward pass computes, seen before its weights are read."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from codistill.batch import Ragged, TokenBatch
from codistill.config import ConfigError, require
from codistill.config.base import first_line
from codistill.config.machinery import LoraConfig
from codistill.downloads import check_model_folder, source
from codistill.model.lora import add_adapters
from codistill.model.policy import Policy
from codistill.model.pretrained import meta_model
from codistill_kernels.integrations.transformers import linear_head

GAP_LIMIT = 1e-3  # nats, of `gap_to_definition` in fp32; rounding makes 1e-6
TOKENS = 64  # rows of a stand-in's embedding and head: more than `gap_to_definition` needs
LAYERS = 2  # of a stand-in whose configuration does not say that layers differ


def check_trainable(key: str, path: str, num_tokens: int, lora: LoraConfig | None = None) -> None:
    """Raise ConfigError under configuration key `key` unless the model, as its config.json has it,
    can be trained, has the shapes of its weights, a row for each of the tokens, and the layers that
    adapters are wanted for.

    Nothing is computed and no weight is loaded.
    """
    try:
        lm = meta_model(path)
        Policy(lm, vocab_size=num_tokens)
    except Exception as error:  # transformers computes with what the file says
        expected = f"a model that can be trained; {first_line(error)}"
        raise ConfigError(f"{key} = {path!r}: expected {expected}") from error
    rows = len(linear_head(lm)["lm_head_weight"])
    expected = f"a row for each of the tokenizer's {num_tokens} tokens; there are {rows}"
    require(num_tokens <= rows, key, path, expected)
    if Path(source(path)).is_dir():
        check_shapes(key, path, lm)
    if lora is not None:
        add_adapters(lm, key, path, lora)


def check_shapes(key: str, path: str, lm: PreTrainedModel) -> None:
    """Raise ConfigError unless the weights in the folder have the shapes of the model's."""
    shapes = check_model_folder(key, Path(source(path)))
    for name, weight in lm.state_dict().items():
        shape, found = tuple(weight.shape), shapes.get(name, tuple(weight.shape))
        require(found == shape, key, path, f"{name} of {shape} as in config.json; it is {found}")


def check_definition(key: str, path: str, device: torch.device) -> None:
    """Raise ConfigError under configuration key `key` if packed sequences get other
    log-probabilities than the model's own forward pass gives them.

    What differs is code, not weights, so a few random layers stand in for the model.
    """
    try:
        lm = stand_in(AutoConfig.from_pretrained(source(path), trust_remote_code=False), device)
        gap = gap_to_definition(Policy(lm, vocab_size=lm.get_input_embeddings().num_embeddings))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{key} = {path!r}: {first_line(error)}") from error
    expected = f"a model of known attention and head; log-probabilities are {gap:.1e} nats off"
    require(gap <= GAP_LIMIT, key, path, expected)


def stand_in(config: Any, device: torch.device) -> PreTrainedModel:
    """A model of the first layers, up to one of every type, and the first tokens, in float32.

    Its matrices are random and keep the size of what they multiply, so that every layer matters.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    if types:
        text.layer_types = types[: 1 + max(types.index(kind) for kind in set(types))]
    text.num_hidden_layers = len(text.layer_types) if types else min(LAYERS, text.num_hidden_layers)
    text.vocab_size = min(TOKENS, text.vocab_size)
    text.pad_token_id = None  # may be beyond these tokens
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            for name, weight in lm.named_parameters():
                if weight.ndim > 1 or name.endswith("bias"):
                    weight.normal_(std=weight.shape[-1] ** -0.5)
    return lm.eval()


@torch.no_grad()
def gap_to_definition(policy: Policy) -> float:
    """Largest difference (nats) between log-probabilities of two packed sequences and what the
    model's own forward pass, with its own attention and head, says of each alone."""
    rows, device = [[0, 1, 2], [1, 0]], policy.device
    batch = TokenBatch.build(Ragged.of(rows), Ragged.of(rows), [0, 1], device)
    alone = []
    with short_windows(policy.lm):
        packed = policy(batch, 1.0)
        policy.lm.set_attn_implementation("eager")
        for row in rows:
            ids = torch.tensor([row + row], device=device)
            logits = policy.lm(input_ids=ids).logits[0, len(row) - 1 : -1, : policy.vocab_size]
            logps = logits.float().log_softmax(dim=1)
            alone.append(logps.gather(1, ids[:, len(row) :].T)[:, 0])
        policy.use_attention(policy.attention)
    return (packed - torch.cat(alone)).abs().max().item()


@contextmanager
def short_windows(lm: PreTrainedModel) -> Iterator[None]:
    """Let sliding windows be of 2 tokens, so that a few tokens show a model that has one in its
    mask alone, where packed attention does not see it."""
    holders: list[Any] = [lm.config.get_text_config(), *lm.modules()]
    windows = [(x, x.sliding_window) for x in holders if getattr(x, "sliding_window", None)]
    for holder, _ in windows:
        holder.sliding_window = 2
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window
