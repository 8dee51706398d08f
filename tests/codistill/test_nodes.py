"""A run on two nodes: two torchrun agents on this machine, one process each."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from background import BackgroundRun
from tiny import merged

from codistill import distributed
from codistill.failures import log_path

TIMES = ("time/", "tokens_per_second")


@pytest.fixture
def start(settings, tmp_path) -> Iterator[Callable[..., list[BackgroundRun]]]:
    """Start a run on two nodes: start({"training": {"steps": 500}}, node_1={}), with other settings
    on the second node where these are given."""
    agents = []

    def make(changes: dict, node_1: dict | None = None) -> list[BackgroundRun]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        node = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", address)
        for number, own in enumerate([{}, node_1 or {}]):
            folder = tmp_path / f"node_{number}"
            folder.mkdir()
            changed = merged(merged(settings, changes), own)
            agents.append(BackgroundRun(changed, folder, 1, node))
        return agents

    yield make
    for agent in agents:
        agent.kill()


def numbers(folder: Path) -> list[dict]:
    """metrics.jsonl without what is measured in seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def said(agents: list[BackgroundRun]) -> list[str]:
    """What both nodes have printed themselves, without torchrun's own lines."""
    return re.findall(r"^train\.py: .*", "\n".join(agent.text for agent in agents), re.MULTILINE)


def wait_for(agents: list[BackgroundRun], text: str, seconds: float = 120) -> None:
    """Wait until one of the nodes has printed `text`."""
    deadline = time.monotonic() + seconds
    while not any(text in agent.text for agent in agents):
        assert time.monotonic() < deadline, [agent.text for agent in agents]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("processes", "on_this_node", "expected"),
    [(None, None, False), ("8", "8", False), ("16", "8", True), ("2", None, True)],
    ids=["no torchrun", "one node", "two nodes", "another launcher"],
)
def test_whether_there_are_several_nodes(monkeypatch, processes, on_this_node, expected):
    for name, value in (("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", on_this_node)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert distributed.has_several_nodes() == expected


@pytest.mark.parametrize(("processes", "expected"), [("1", 8), ("8", 2), ("64", 1)])
def test_helpers_share_the_cores_of_their_node(monkeypatch, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("WORLD_SIZE", "1024")
    assert distributed.helpers() == expected


@pytest.mark.long
def test_two_nodes_are_two_processes_of_one(settings, start, train):
    """To the last bit, with a replica of the weights on each; and one process goes on."""
    agents = start({"name": "nodes", "distributed": {"replicas": 2}})
    together = train(settings, "--distributed.replicas", "2", processes=2)
    assert [agent.end() for agent in agents] == [0, 0], [agent.text for agent in agents]
    assert together.returncode == 0, together.stderr
    folder = Path(settings["output_dir"]) / settings["name"]
    assert numbers(agents[0].folder) == numbers(folder) != []
    assert sorted("rollout engine" in agent.text for agent in agents) == [False, True]
    alone = train(settings, "--training.steps", "4")
    assert alone.returncode == 0, alone.stderr
    assert "going on after step 3 with other settings: " in alone.stdout
    assert "distributed.replicas 2 -> 1" in alone.stdout


@pytest.mark.long
def test_a_node_that_is_gone_is_named(start):
    agents = start({"training": {"steps": 500}, "distributed": {"timeout": 8}})
    wait_for(agents, "step 1/")
    (rank_0,) = [agent for agent in agents if "step 1/" in agent.text]
    (rank_1,) = [agent for agent in agents if agent is not rank_0]
    for pid in (*rank_1.ranks, rank_1.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert rank_0.end() == 1
    (line,) = said(agents)
    assert line.startswith("train.py: stopped in phase ")
    assert "no answer from rank 1, which has ended or hangs (traceback in " in line
    assert "gloo" in log_path(rank_0.folder, 0).read_text()


@pytest.mark.long
def test_a_launcher_that_is_gone_lets_the_run_save(start):
    agents = start({"training": {"steps": 500}, "checkpoint": {"every": 500}})
    wait_for(agents, "step 1/")
    agents[0].process.kill()
    wait_for(agents, "; the same command goes on")
    assert agents[1].end() == 1
    assert len(list((agents[0].folder / "checkpoints").glob("step_*"))) == 1


@pytest.mark.long
def test_nodes_that_share_no_folder(start, tmp_path):
    agents = start({}, node_1={"output_dir": str(tmp_path / "other")})
    assert [agent.end() for agent in agents] == [1, 1]
    expected = "train.py: output_dir = .* expected a folder that all nodes share: "
    assert len(said(agents)) == 2 and all(re.match(expected, line) for line in said(agents))
    assert not list(tmp_path.glob("*/tiny/metrics.jsonl"))


@pytest.mark.long
def test_a_mistake_of_one_node(start):
    """A file that is on one node alone: the node without it says so, whatever its rank."""
    agents = start({"distributed": {"timeout": 8}}, node_1={"small": {"path": "none/here"}})
    assert agents[1].end() == 1
    assert agents[0].end() == 1
    assert any(line.startswith("train.py: small.path = 'none/here'") for line in said(agents))
