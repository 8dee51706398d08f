"""Models and tokenizers as they lie in a folder or on the Hub, before weights are loaded.

No code of a model is run: trust_remote_code is False wherever it can be said, as otherwise
transformers asks on the terminal.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from codistill.config import Config, ConfigError, require
from codistill.config.base import first_line
from codistill.downloads import GENERATION, MODEL, is_here, read_object, source
from codistill_kernels.integrations.transformers import scaling

HUB_SECONDS = 10  # to answer whether it has a model; chosen, untested


def check_models(config: Config) -> None:
    """Raise ConfigError unless every model is there, has whole weights, a head that is understood,
    and positions for prompt and completion."""
    rollout = config.rollout
    for name in config.loaded:
        key, path = f"{name}.path", config.model(name).path
        positions = check_model(key, path)
        require(
            positions is None
            or rollout.max_prompt_tokens + rollout.max_completion_tokens <= positions,
            "rollout.max_completion_tokens",
            rollout.max_completion_tokens,
            f"no more than the {positions} positions of {key} = {path!r} less "
            f"rollout.max_prompt_tokens = {rollout.max_prompt_tokens}",
        )


def check_model(key: str, path: str) -> int | None:
    """Raise ConfigError unless the model is there, has whole weights and a head that is understood;
    how many positions it has, None where it does not say."""
    find_model(key, path)
    text_config = load_model_config(key, path).get_text_config()
    return getattr(text_config, "max_position_embeddings", None)


def find_model(key: str, path: str) -> None:
    """Raise ConfigError unless this is a folder with a whole model, or a name the Hub knows."""
    if is_here(key, path):
        return
    try:
        HfApi().model_info(path, timeout=HUB_SECONDS)
    except Exception as error:  # of the Hub or of the network, and of many classes
        raise ConfigError(f"{key} = {path!r}: expected {MODEL}; {first_line(error)}") from error


def load_model_config(key: str, path: str) -> Any:
    """The model's config.json, whose head must be one that is understood."""
    try:
        config = AutoConfig.from_pretrained(source(path), trust_remote_code=False)
        scaling(config)
    except Exception as error:  # transformers computes with what the file says
        expected = f"a model that is understood; {first_line(error)}"
        raise ConfigError(f"{key} = {path!r}: expected {expected}") from error
    return config


def meta_model(path: str) -> PreTrainedModel:
    """The model that config.json describes, in float32, with the shapes of its weights alone."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source(path), trust_remote_code=False)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )


def load_tokenizer(key: str, path: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError under configuration key `key` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(source(path), trust_remote_code=False)
    except Exception as error:  # tokenizers raises classes of its own
        expected = f"a model with a tokenizer: {first_line(error)}"
        raise ConfigError(f"{key} = {path!r}: expected {expected}") from error


def load_tokenizers(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that all models of the run share.

    Raises:
        ConfigError: one is missing, or they give different ids to the same text: a ratio of the
            models' probabilities means something only token by token.
    """
    first, *rest = config.loaded
    path = config.model(first).path
    tokenizer = load_tokenizer(f"{first}.path", path)
    for name in rest:
        other_path = config.model(name).path
        other = load_tokenizer(f"{name}.path", other_path)
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        different = next((t for t in sorted(ours | theirs) if ours.get(t) != theirs.get(t)), None)
        require(
            different is None,
            f"{name}.path",
            other_path,
            f"the tokenizer of {first}.path = {path!r}; token {different!r} has id "
            f"{theirs.get(different)} here and {ours.get(different)} there",
        )
    return tokenizer


def end_token_ids(key: str, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: the model's generation_config, else the tokenizer's end token.

    Raises ConfigError under configuration key `key` if there is none, or one that is no token.
    """
    folder = Path(source(path))
    if (folder / GENERATION).is_file():  # else transformers takes it as absent
        read_object(key, folder, GENERATION)
    try:
        ids = GenerationConfig.from_pretrained(source(path)).eos_token_id
    except OSError:  # the model has no generation_config.json
        ids = None
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ConfigError(f"{key} = {path!r}: expected a model that names its end token")
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    for token in ids:
        is_token = type(token) is int and 0 <= token < len(tokenizer)
        expected = f"end tokens below {len(tokenizer)}, the number of tokens; found {token!r}"
        require(is_token, key, path, expected)
    return ids
