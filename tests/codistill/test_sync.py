"""rollout.engine server: how weights come to servers, and what is said to them meanwhile."""

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import spawn
from stand_in import facts_of, stand_in, update_answers
from test_engine import END, VOCAB

from codistill import watching
from codistill.engine import EngineSpec
from codistill.engine.server import ServerEngine, ServerError, Servers
from codistill.model.shards import Weights

CPU = torch.device("cpu")


def spec_of(path: str, **changes: Any) -> EngineSpec:
    spec = EngineSpec(path, VOCAB, (END,), 20, torch.float32, CPU, 0.1, timeout=5)
    return replace(spec, **changes)


@pytest.fixture
def spec(models) -> EngineSpec:
    return spec_of(str(models["small"]))


@pytest.fixture
def facts(spec) -> dict:
    return facts_of(spec)


class Transfer:
    """Stands in for vLLM's end of the transfer, and for the module that makes it."""

    def __init__(self, servers: Servers | None = None, source: Any = None, **terms: Any) -> None:
        self.servers, self.source, self.terms = servers, source, terms
        self.sent: list = []

    @staticmethod
    def Source(dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(dtype=dtype)

    def connect(self, backend: str, servers: Servers, source: Any, **terms: Any) -> "Transfer":
        self.__init__(servers, source, **terms)
        return self

    def send_weights(self) -> None:
        self.sent.append(self.source.weights)
        if self.terms["sends"]:
            self.servers.finish_weight_update()

    def shutdown(self) -> None:
        self.sent.append("the end")


@pytest.fixture
def transfer(monkeypatch) -> Transfer:
    transfer = Transfer()
    monkeypatch.setattr("codistill.engine.transfer", transfer, raising=False)
    return transfer


@pytest.fixture
def limits(monkeypatch) -> list:
    """What is watched, with its limit, and None where that ends."""
    limits: list = []

    @contextmanager
    def watched(what: str, seconds: float) -> Iterator[None]:
        limits.append((what, seconds))
        yield
        limits.append(None)

    monkeypatch.setattr(watching, "watched", watched)
    return limits


def test_what_a_sync_says_to_servers(spec, facts, transfer, limits):
    answers = update_answers(facts | {"workers": 2})
    with stand_in(answers) as (one, first), stand_in(answers) as (two, second):
        engine = ServerEngine(replace(spec, servers=(one, two)))
        first.clear()
        engine.sync("the weights")
        reset = ("/collective_rpc", {"method": "codistill_reset"})
        done = [
            ("/finish_weight_update", {"weight_version": engine.servers.version}),
            ("/reset_prefix_cache", None),
        ]
        assert first == [reset, *done] == second[-3:]
        assert transfer.terms["workers"] == 4 and transfer.terms["timeout"] == 5
        assert limits == [("a sync of the servers", 5), None]
        first.clear()
        engine.sync("others")
        assert [path for path, _ in first] == ["/weight_info", *(path for path, _ in done)]
        answers["/weight_info"] = {"weight_version": "default"}
        with pytest.raises(ServerError, match=f"^{one}: was started again"):
            engine.sync("more")
        engine.close()
    assert transfer.sent == ["the weights", "others", "the end"]


def test_a_process_that_does_not_send_only_gathers(spec, facts, transfer):
    with stand_in(update_answers(facts)) as (url, requests):
        engine = ServerEngine(replace(spec, servers=(url,), sends=False))
        requests.clear()
        engine.sync("the weights")
        engine.sync("others")
        assert transfer.sent == ["the weights", "others"] and requests == []


def test_a_server_that_is_gone_is_the_cause_of_a_failed_sync(spec, facts, transfer, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Transfer, "send_weights", fail)
    fine, broken = update_answers(facts), update_answers(facts)
    with stand_in(fine) as (one, _), stand_in(broken) as (two, _):
        engine = ServerEngine(replace(spec, servers=(one, two)))
        engine.servers.version = "default"  # as both say
        with pytest.raises(RuntimeError, match="^Connection closed by peer"):
            engine.sync("the weights")
        broken["/health"] = (503, {"error": {"message": "no engine"}})
        with pytest.raises(ServerError, match=f"^{two}: HTTP 503: no engine"):
            engine.sync("the weights")


class Worker:
    """A worker of a server, with vLLM's end of the transfer, and the weights that it has got."""

    def __init__(self, transfer: Any, rank: int, size: int) -> None:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=size, rank=rank)
        config = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.engine = transfer.GlooWeightTransferEngine(None, config, CPU, self)
        self.weights: dict[str, torch.Tensor] = {}

    def load_weights(self, pairs: list) -> None:
        self.weights |= {name: weight.clone() for name, weight in pairs}

    def join(self, body: dict) -> None:
        self.engine.init_transfer_engine(self.engine.parse_init_info(body["init_info"]))


def with_workers(answers: dict, workers: list[Worker]) -> dict:
    """A server whose workers all do what it is asked for, at the same time."""

    def by_all(call: Any) -> Any:
        def answer(body: dict) -> dict:
            with ThreadPoolExecutor(len(workers)) as pool:
                list(pool.map(lambda worker: call(worker, body), workers))
            return {}

        return answer

    def update(worker: Worker, body: dict) -> None:
        worker.engine.update_weights(body["update_info"])

    return answers | {
        "/init_weight_transfer_engine": by_all(Worker.join),
        "/start_weight_update": {},
        "/update_weights": by_all(update),
    }


def check_transfer(rank: int, path: str) -> None:
    """Three workers of two servers get all weights, in the engine's dtype; so they do once more."""
    from codistill.engine import transfer  # imports vLLM

    spec = spec_of(path, dtype=torch.bfloat16)
    groups = [[Worker(transfer, rank, size) for rank in range(size)] for size in (2, 1)]
    facts = [facts_of(spec) | {"workers": len(workers)} for workers in groups]
    one, two = (with_workers(update_answers(f), w) for f, w in zip(facts, groups, strict=True))
    whole = {"a": torch.arange(6.0).view(3, 2).T / 7, "b": torch.rand(()), "c": torch.zeros(0, 4)}
    with stand_in(one) as (first, _), stand_in(two) as (second, _):
        engine = ServerEngine(replace(spec, servers=(first, second)))
        for factor in (1, -2):
            sent = {name: factor * weight for name, weight in whole.items()}
            engine.sync(Weights({n: tuple(w.shape) for n, w in sent.items()}, iter(sent.items())))
            for worker in (*groups[0], *groups[1]):
                assert worker.weights.keys() == sent.keys()
                for name, weight in worker.weights.items():
                    assert weight.dtype == spec.dtype
                    assert torch.equal(weight, sent[name].bfloat16()), (name, weight, sent[name])
        engine.close()
    check_the_rest(transfer, path)


def check_the_rest(transfer: Any, path: str) -> None:
    """A process that does not send gathers; a server that refuses is named; a CPU's head is packed
    again."""
    weights = Weights({"a": (2,)}, iter({"a": torch.ones(2)}.items()))
    spec = spec_of(path, sends=False)
    refuses = {"/init_weight_transfer_engine": (500, {"error": {"message": "no such port"}})}
    with stand_in(update_answers(facts_of(spec)) | refuses) as (url, _):
        ServerEngine(replace(spec, servers=(url,))).sync(weights)
        assert list(weights) == []
        engine = ServerEngine(replace(spec, servers=(url,), sends=True, timeout=2))
        with pytest.raises(ServerError, match=f"^{url}: HTTP 500: no such port"):
            engine.sync(weights)
    calls: list = []
    transfer.NCCLWeightTransferEngine.finish_weight_update = lambda self: calls.append("loaded")
    transfer.repack_tied_head = lambda model: calls.append(model)
    worker = Worker(transfer, 0, 1)
    worker.engine.finish_weight_update()
    assert calls == ["loaded", worker]


def test_all_workers_of_all_servers_get_the_weights(models):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM cannot be installed on this machine")
    spawn(check_transfer, str(models["small"]), processes=1)
