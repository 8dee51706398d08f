"""The engine that a configuration asks for: chosen, started again, and lent for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import END, VOCAB

from codistill import distributed
from codistill.config import ConfigError
from codistill.engine import EngineError, EngineSpec, Sampling, choice, engine_kind
from codistill.engine.choice import RestartingEngine, check_engine, temporary_engine
from codistill.model.shards import Weights

SPEC = EngineSpec("none", VOCAB, (END,), 20, torch.float32, torch.device("cpu"), 0.1)
SAMPLING = Sampling(num_generations=1, temperature=1.0, max_tokens=4)


class Engine:
    """An engine that writes down what happens to it; one that `fails` does so after one weight."""

    def __init__(self, name: str, events: list, fails: bool) -> None:
        self.name, self.events, self.fails = name, events, fails
        events.append("start")

    def generate(self, prompts: list, seeds: list, sampling: Sampling) -> list:
        if self.fails:
            raise RuntimeError("no memory")
        return [*prompts, *seeds, sampling]

    def sync(self, weights: Iterator) -> None:
        self.events.append(next(weights))
        if self.fails:
            raise RuntimeError("no memory")
        self.events += weights

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def events(monkeypatch) -> list:
    """What happens to engines; the first one that is started fails if "fails" is put here."""
    events: list = []

    def make(kind: str, spec: EngineSpec) -> Engine:
        fails = "fails" in events
        events.clear() if fails else None
        return Engine(kind, events, fails)

    monkeypatch.setattr(choice, "make_engine", make)
    return events


class Trainer:
    """Gives its weights, two numbers that grow with every sync; keeps what it has given."""

    def __init__(self) -> None:
        self.given: list[Weights] = []

    def __call__(self) -> Weights:
        count = 10 * len(self.given)
        self.given.append(Weights({}, iter([count + 1, count + 2])))
        return self.given[-1]


@pytest.mark.parametrize("found", [None, object()], ids=["without vllm", "with vllm"])
def test_auto_is_vllm_where_it_is_installed(monkeypatch, found):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    kinds = [engine_kind(kind) for kind in ("auto", "vllm", "hf", "server")]
    assert kinds == ["vllm" if found else "hf", "vllm", "hf", "server"]


def test_vllm_is_checked_where_it_is_needed(monkeypatch):
    asked: list = []
    monkeypatch.setattr(choice, "check_vllm", lambda *arguments: asked.append(arguments))
    for kind in ("vllm", "server", "hf"):
        check_engine("rollout.", kind, 1)
    assert asked == [("rollout.engine", "vllm"), ("rollout.engine", "server")]
    with pytest.raises(ConfigError, match="^rollout.tensor_parallel = 2: expected 1 with engine"):
        check_engine("rollout.", "hf", 2)


def test_a_mistake_on_another_process_ends_this_one_too(events, monkeypatch):
    monkeypatch.setattr(distributed, "first_error", lambda error: f"rank 1: {error}")
    with pytest.raises(ConfigError, match="^rank 1: None$"):
        RestartingEngine("hf", SPEC, Trainer())

    def refuse(kind: str, spec: EngineSpec) -> Engine:
        raise ConfigError("no such server")

    monkeypatch.setattr(choice, "make_engine", refuse)
    with pytest.raises(ConfigError, match="^no such server$"):
        RestartingEngine("hf", SPEC, Trainer())


def test_a_second_engine_starts_with_the_weights_of_the_trainer(process_group, events):
    """The first is closed before, as both may not fit into memory."""
    events.append("fails")
    engine = RestartingEngine("hf", SPEC, Trainer())
    assert engine.generate([[1]], [2], SAMPLING) == [[1], 2, SAMPLING]
    assert events == ["start", "close", "start", 1, 2]
    engine.engine.fails = True
    with pytest.raises(EngineError, match="^engine hf failed in generate on rank 0: no memory$"):
        engine.generate([[1]], [2], SAMPLING)


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_a_sync_that_fails_leaves_no_process_waiting(process_group, events, kind):
    """All weights are gathered, whatever the engine takes of them."""
    events.append("fails")
    trainer = Trainer()
    engine = RestartingEngine(kind, SPEC, trainer)
    if kind == "hf":
        engine.sync()
        assert events == ["start", 1, "close", "start", 11, 12]
    else:
        with pytest.raises(EngineError, match="^engine vllm failed in sync on rank 0: no memory$"):
            engine.sync()
        assert events == ["start", 1]
    assert all(list(weights) == [] for weights in trainer.given)


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_an_engine_that_is_lent_has_the_weights_of_the_trainer(
    process_group, events, monkeypatch, kind
):
    @contextmanager
    def own_server(spec: EngineSpec, log: Path) -> Iterator[EngineSpec]:
        events.append(log)
        yield replace(spec, servers=("http://a",))
        events.append("end of the server")

    monkeypatch.setattr(choice, "own_server", own_server)
    log = Path("log")
    with temporary_engine(kind, SPEC, Trainer(), log) as engine:
        events.append(engine.name)
    if kind == "hf":
        assert events == ["start", 1, 2, "hf"] and engine.spec == SPEC
    else:
        assert events == [log, "start", 1, 2, "server", "close", "end of the server"]
        assert engine.spec.servers == ("http://a",)
