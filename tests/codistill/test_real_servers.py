"""rollout.engine server with vLLM's own servers: samples, weights, one that is gone."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from background import BackgroundRun
from processes import spawn
from test_engine import END, VOCAB, check_engine, logp_gap
from test_run import rows

from codistill import distributed
from codistill.child import Child
from codistill.config.machinery import TrainingConfig
from codistill.engine import EngineSpec
from codistill.engine.own_server import wait_for
from codistill.engine.server import ServerEngine
from codistill.model.loading import load_policy
from codistill.model.shards import Weights

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class RealServer:
    """`python -m codistill serve` of a configuration, on a port of its own."""

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder, self.port = folder, distributed.free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        self.start()

    def start(self) -> None:
        options = ("--config", str(self.folder / "config.yaml"), "--port", str(self.port))
        command = [sys.executable, "-m", "codistill", "serve", *options]
        quiet = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        self.child = Child(command, os.environ | quiet, self.folder / "log")

    def wait(self) -> None:
        wait_for(self.child, self.url, 600, self.folder / "log")


@contextmanager
def real_server(folder: Path, model: Path) -> Iterator[RealServer]:
    """A server of the tiny small model."""
    pytest.importorskip("vllm", reason="vLLM cannot be installed on this machine")
    settings = {
        "name": "served",
        "algorithm": "grpo",
        "small": {"path": str(model)},
        "data": {"train": "none", "eval": "none", "template": "{problem}="},
        "training": {"dtype": "float32"},
        "rollout": {"max_prompt_tokens": 10, "max_completion_tokens": 12, "kv_cache_gib": 0.1},
    }
    server = RealServer(folder, settings)
    try:
        server.wait()
        yield server
    finally:
        server.child.end()


@pytest.fixture(scope="module")
def server(models, tmp_path_factory) -> Iterator[RealServer]:
    with real_server(tmp_path_factory.mktemp("server"), models["small"]) as started:
        yield started


@pytest.fixture(scope="module")
def servers(server, models, tmp_path_factory) -> Iterator[list[RealServer]]:
    with real_server(tmp_path_factory.mktemp("server"), models["small"]) as second:
        yield [server, second]


def check_server_engine(rank: int, path: str, url: str) -> None:
    """As of every engine; then a sync after one that was broken off."""
    check_engine(rank, "server", path, (url,))
    policy = load_policy("small.path", path, TrainingConfig(dtype="float32"), VOCAB, CPU)
    spec = EngineSpec(path, VOCAB, (END,), 20, torch.float32, CPU, 0.1, servers=(url,))
    engine, whole = ServerEngine(spec), policy.full_weights()
    with pytest.raises(ValueError, match="yielded 5 parameters"):
        engine.sync(Weights(whole.shapes, islice(whole, 5)))
    engine.close()
    engine = ServerEngine(spec)
    engine.sync(policy.full_weights())
    assert logp_gap(engine, policy, 1.0) < 1e-4
    check_bfloat16()


def check_bfloat16() -> None:
    """Weights of half the size travel, too: from one thread to another."""
    from codistill.engine.transfer import GlooGroup

    port = distributed.free_port("127.0.0.1")
    sent = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    numbers = [sent, torch.zeros_like(sent)]
    with ThreadPoolExecutor(2) as pool:
        groups = [pool.submit(GlooGroup, "127.0.0.1", port, rank=rank, size=2) for rank in range(2)]
        list(pool.map(lambda group, part: group.result().broadcast(part), groups, numbers))
    assert torch.equal(*numbers)


def test_vllm_samples_what_it_says_and_takes_weights(server, models):
    spawn(check_server_engine, str(models["small"]), server.url, processes=1)


@pytest.fixture
def served(settings, servers) -> dict:
    """A run over both servers."""
    settings["rollout"] |= {"engine": "server", "servers": [server.url for server in servers]}
    settings["evaluation"] |= {"large": "never"}  # tests/codistill/test_run.py has it
    return settings


@pytest.mark.long
def test_a_run_stops_when_a_server_is_gone_and_goes_on_when_it_is_back(
    served, servers, train, tmp_path
):
    served["training"]["steps"] = 500
    run = BackgroundRun(served, tmp_path)
    try:
        run.wait_for("step 3/")
        servers[1].child.end()
        assert run.end() == 1
    finally:
        run.kill()
    (line,) = (line for line in run.text.splitlines() if line.startswith("train.py: "))
    assert line.startswith("train.py: stopped: engine server failed in ") and servers[1].url in line
    done = train(served)
    assert done.returncode == 2
    assert f"rollout.servers = '{servers[1].url}': expected a server that answers" in done.stderr
    servers[1].start()
    servers[1].wait()
    steps = len(rows(served))
    served["training"]["steps"] = steps + 3
    done = train(served, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {steps}" in done.stdout
    assert max(row["rollout/logp_gap_max"] for row in rows(served)) < 1e-4


KEEP = """
from codistill.engine.server import ServerEngine

def sync(self, weights):
    for _ in weights:
        pass

def reward(completions, **columns):
    ServerEngine.sync = sync
    return [0.0 for _ in completions]
"""


@pytest.mark.long
def test_a_server_that_keeps_old_weights_ends_the_run(served, train, tmp_path, monkeypatch):
    (tmp_path / "keep.py").write_text(KEEP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    served["reward"]["functions"] = {"keep.reward": 1.0}
    done = train(served)
    assert done.returncode == 1
    assert "server and the trainer differ by" in done.stderr
    assert len(rows(served)) == 1
