"""The engine that the configuration asks for, started again where that can be."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from codistill import distributed
from codistill.config import ConfigError, require
from codistill.config.machinery import EngineKind
from codistill.engine.hf import HFEngine
from codistill.engine.in_process import VLLMEngine
from codistill.engine.interface import Completion, Engine, EngineError, EngineSpec, Sampling
from codistill.engine.own_server import own_server
from codistill.engine.server import ServerEngine
from codistill.model.shards import Weights
from codistill.versions import check_vllm


def engine_kind(kind: EngineKind) -> Literal["vllm", "hf", "server"]:
    """The engine that `kind` stands for: auto is vllm where it is installed."""
    if kind == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "hf"
    return kind


def check_engine(section: str, kind: EngineKind, tensor_parallel: int) -> None:
    """Raise ConfigError unless this engine can run here, shared by so many processes.

    section: what precedes the keys' names in the message, such as "rollout.".
    """
    if engine_kind(kind) in ("vllm", "server"):
        check_vllm(f"{section}engine", kind)
        return
    expected = "1 with engine hf, of which each process has its own"
    require(tensor_parallel == 1, f"{section}tensor_parallel", tensor_parallel, expected)


def make_engine(kind: EngineKind, spec: EngineSpec) -> Engine:
    """The engine of rollout.engine = kind, with the weights on disk; a server has what it last
    got."""
    match engine_kind(kind):
        case "vllm":
            return VLLMEngine(spec)
        case "hf":
            return HFEngine(spec)
        case "server":
            return ServerEngine(spec)


class RestartingEngine:
    """An engine that is started again, once, with the trainer's weights, when it raises an error.

    Only the engine hf is: vLLM in the trainer's process leaves process groups and memory behind
    that a second start stumbles over, and servers are started by others. Their error, or a second
    one, ends the run on all processes.

    weights: gives the trainer's weights. Collective, as are the start, `generate` and `sync`.

    Raises:
        ConfigError: on all processes, if one of them cannot use the engine.
    """

    def __init__(
        self,
        kind: EngineKind,
        spec: EngineSpec,
        weights: Callable[[], Weights],
    ) -> None:
        self.kind, self.spec, self.weights = kind, spec, weights
        mistake: ConfigError | None = None
        try:
            self.engine = make_engine(kind, spec)
        except ConfigError as error:
            mistake = error
        # Nor may one process sync a server while another still asks it what it is.
        if message := distributed.first_error(mistake):
            raise mistake or ConfigError(message)
        self.name = self.engine.name
        self.may_restart = self.name == "hf"

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        """See `Sampler`.

        Raises:
            EngineError: on all processes, if the engine of one of them failed.
        """
        error, completions = None, None
        try:
            completions = self.engine.generate(prompts, seeds, sampling)
        except Exception as failure:  # an engine may raise anything
            error = failure
        if self.restarted(error, "generate"):
            return self.generate(prompts, seeds, sampling)
        assert completions is not None
        return completions

    def sync(self) -> None:
        """Take the trainer's weights.

        Raises:
            EngineError: on all processes, if the engine of one of them failed.
        """
        error, weights = None, self.weights()
        try:
            self.engine.sync(weights)
        except Exception as failure:
            error = failure
            for _ in weights:  # the other processes gather the rest together with this one
                pass
        self.restarted(error, "sync")

    def sleep(self) -> None:
        """See `Engine`; nothing happens with rollout.sleep = false."""
        if self.spec.sleeps:
            self.engine.sleep()

    def wake_up(self) -> None:
        """See `Engine`; nothing happens with rollout.sleep = false."""
        if self.spec.sleeps:
            self.engine.wake_up()

    def restarted(self, error: Exception | None, what: str) -> bool:
        """Whether any process has an error, so that all of them have started their engines again.
        Collective."""
        message = distributed.first_error(error)
        if message is None:
            return False
        text = f"engine {self.name} failed in {what} on {message}"
        if not self.may_restart:
            raise EngineError(text) from error
        logging.getLogger(__name__).warning("%s; starting it again", text)
        self.may_restart = False
        self.engine.close()
        self.engine = make_engine(self.kind, self.spec)
        self.sync()
        return True

    def close(self) -> None:
        self.engine.close()


@contextmanager
def temporary_engine(
    kind: EngineKind, spec: EngineSpec, weights: Callable[[], Weights], log: Path
) -> Iterator[RestartingEngine]:
    """An engine for a while, beside that of the run, with the trainer's weights. Collective.

    The one of the kind hf where the run has that, else a server.

    log: the file for what a server prints.

    Raises:
        EngineError: on all processes, if it does not start or does not take the weights.
    """
    if engine_kind(kind) == "hf":
        engine = RestartingEngine("hf", spec, weights)
        engine.sync()
        yield engine
        return
    with own_server(spec, log) as at_server:
        engine = RestartingEngine("server", at_server, weights)
        engine.sync()
        yield engine
        engine.close()
