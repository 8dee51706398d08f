"""What an engine is, what it must know, what it is asked for and what it gives."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from codistill.failures import RunError
from codistill.model.shards import Weights
from codistill.texts import StopStrings


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt, up to and with the token that ends it, unless it was cut
    off."""

    token_ids: list[int]
    logps: list[float]
    """Log-probability of each token that the engine sampled (nats): of the last ones, where the
    first are a hint."""
    truncated: bool
    """The length limit stopped it, not an end token or a stop string."""


@dataclass(frozen=True)
class Sampling:
    num_generations: int
    """Completions per prompt; 1 if greedy."""
    temperature: float
    """Divides the logits; 0 is greedy."""
    max_tokens: int


class SyncError(RunError):
    """Engine and trainer disagree on the probability of what the engine wrote."""


class EngineError(RunError):
    """An engine failed, and was not or could not be started again."""


class Sampler(Protocol):
    """What writes completions."""

    name: str

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        """`num_generations` completions of each prompt, prompt after prompt.

        seeds: one per prompt. Same weights, prompts and seeds give the same completions.
        """


class Engine(Sampler, Protocol):
    """A `Sampler` that takes weights."""

    def sync(self, weights: Weights) -> None:
        """Take all weights of the model. Iterates to their end."""

    def sleep(self) -> None:
        """Leave the memory of the GPU, with weights in the host's memory, until `wake_up`."""

    def wake_up(self) -> None:
        """Come back to the GPU as it was, without what it remembers of prompts."""

    def close(self) -> None:
        """Let go of what the engine holds, process groups included. The last call to it."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine must know of the model it runs."""

    path: str
    vocab_size: int
    """Only ids below this are sampled: the tokenizer's, not the padded rows above."""
    end_token_ids: tuple[int, ...]
    max_model_tokens: int
    """Longest prompt plus longest completion."""
    dtype: torch.dtype
    device: torch.device
    kv_cache_gib: float
    stop: StopStrings | None = None
    """Texts that end a completion, besides `end_token_ids`."""
    sleeps: bool = False
    """It may be put to sleep."""
    tensor_parallel: int = 1
    """How many processes, neighbours by rank, share one copy of the weights, or GPUs of a server;
    1 for the engine hf."""
    servers: tuple[str, ...] = ()
    """URLs of the servers that write, where the engine is not in this process."""
    sends: bool = True
    """This process sends the weights to the servers."""
    timeout: float = 600.0
    """Limit of a request to a server, and of a sync (seconds)."""
    path_key: str = "path"
    """Key of `path` in what the user gave, as messages name it."""
    section: str = "rollout."
    """What precedes the names of the engine's keys there."""


def cut_at_end(
    tokens: list[int], end_token_ids: tuple[int, ...], stop: StopStrings | None = None
) -> tuple[list[int], bool]:
    """Tokens up to and with the first end token, or the first to complete a stop string, and
    whether there was neither."""
    places = (place for place, token in enumerate(tokens, start=1) if token in end_token_ids)
    end = next(places, None)
    stopped = None if stop is None else stop.end(tokens[:end])
    length = stopped or end
    return tokens[:length], length is None


def prompt_seeds(seed: int, step: int, draws: Iterable[tuple[int, int]]) -> list[int]:
    """One seed per prompt, fixed by what is drawn alone: not by rank or place in the batch.

    draws: the index of each problem, and how often the step has drawn it before.
    """
    return [int(np.random.default_rng([seed, step, *draw]).integers(2**48)) for draw in draws]
