"""Loggers: what they are told, how they go on, and what becomes of one that fails."""

import importlib.util
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from codistill.config import Config, ConfigError
from codistill.config.changes import may_change
from codistill.output import loggers
from codistill.output.loggers import Loggers, check_loggers


@pytest.fixture
def config(settings, tmp_path, monkeypatch):
    """config("tensorboard"): a configuration with these loggers, and a folder for its run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def make(*kinds: str) -> Config:
        (tmp_path / "runs" / "tiny").mkdir(parents=True, exist_ok=True)
        return Config(**settings, log={"to": list(kinds)})

    return make


def log_and_go_on(config: Config) -> None:
    """Steps 1 to 3; then again from the checkpoint of step 2, with other numbers."""
    with Loggers() as opened:
        opened.open(config, -1)
        opened.log(0, {"evaluation/small": 0.25})
        for step in (1, 2, 3):
            opened.log(step, {"loss/small": float(step)})
    with Loggers() as opened:
        opened.open(config, 2)
        opened.log(3, {"loss/small": 30.0})
        opened.log(3, {"evaluation/small": 0.5})


def test_tensorboard_goes_on_in_the_same_log(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_and_go_on(config("tensorboard"))
    events = EventAccumulator(str(tmp_path / "runs" / "tiny" / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss/small")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 30.0)]
    accuracy = [(event.step, event.value) for event in events.Scalars("evaluation/small")]
    assert accuracy == [(0, 0.25), (3, 0.5)]
    first, second = events.Tensors("config/text_summary")
    (text,) = first.tensor_proto.string_val
    assert b"    kd:\n      alpha: 1.0\n" in text and second.step == 2


def test_wandb_goes_on_with_the_same_id(config, tmp_path, capfd, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setitem(sys.modules, "openai", ModuleType("openai"))  # as vLLM does
    monkeypatch.delenv("WANDB_DISABLE_WEAVE", raising=False)
    folder = tmp_path / "runs" / "tiny"
    log_and_go_on(config("wandb"))
    wandb.teardown()
    assert capfd.readouterr() == ("", "")
    run_id = (folder / loggers.WANDB_ID).read_text().strip()
    first, second = sorted((folder / "wandb").glob("offline-run-*"))
    assert first.name.endswith(run_id) and second.name.endswith(run_id)
    rows = [row for run in (first, second) for row in wandb_rows(run)]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 3]
    assert [row.get("loss/small") for row in rows] == [None, 1, 2, 3, 30, None]
    assert [row.get("evaluation/small") for row in rows] == [0.25, None, None, None, None, 0.5]


def wandb_rows(folder: Path) -> list[dict]:
    """The rows of an offline run, from its file: LevelDB's log format, with records in protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, position, rows = file.read_bytes(), 7, []
    assert len(content) < 2**15, "one block"
    while position < len(content):
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        position += 7 + length
        items = Record.FromString(content[position - length : position]).history.item
        rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return [row for row in rows if row]


def test_trackio_goes_on_in_the_same_run(config, tmp_path):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    log_and_go_on(config("trackio"))
    (run,) = trackio.Api().runs("codistill")
    assert run.name == "tiny"
    values = SQLiteStorage.get_metric_values("codistill", "tiny", "loss/small")
    assert [(row["step"], row["value"]) for row in values] == [(1, 1), (2, 2), (3, 3), (3, 30)]


class Broken:
    """A logger that fails in a step."""

    def __init__(self, start) -> None: ...

    def log(self, step: int, numbers: dict) -> None:
        raise OSError("no space\nleft")

    def close(self, *, failed: bool) -> None:
        raise AssertionError("it is off")


class Kept:
    """A logger that keeps what it is told."""

    def __init__(self, start) -> None:
        self.told = []

    def log(self, step: int, numbers: dict) -> None:
        self.told.append(step)

    def close(self, *, failed: bool) -> None:
        self.told.append(failed)


def cannot_open(start):
    raise RuntimeError("no such host")


def test_one_that_fails_is_off_and_the_others_go_on(config, monkeypatch, caplog):
    kept = Kept(None)
    kinds = {"tensorboard": Broken, "wandb": cannot_open, "trackio": lambda start: kept}
    monkeypatch.setattr(loggers, "KINDS", kinds)
    with pytest.raises(KeyError), Loggers() as opened:
        opened.open(config("tensorboard", "wandb", "trackio"), -1)
        opened.log(1, {"loss/small": 1.0})
        opened.log(2, {"loss/small": 1.0})
        raise KeyError
    assert kept.told == [1, 2, True]
    assert [record.getMessage() for record in caplog.records] == [
        "log.to: wandb is off from now on: RuntimeError: no such host",
        "log.to: tensorboard is off from now on: OSError: no space",
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_one_that_is_not_installed_is_named(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = r"log\.to = 'trackio': expected a logger that is installed: pip install trackio"
    with pytest.raises(ConfigError, match=expected):
        check_loggers(config("trackio"))
    check_loggers(config())


def test_wandb_asks_for_nothing(config, tmp_path):
    """No key: one line, with a terminal or without."""
    pytest.importorskip("wandb")
    code = (
        "from codistill.config import Config, ConfigError\n"
        "from codistill.output.loggers import check_wandb\n"
        "try: check_wandb()\n"
        "except ConfigError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    command = [
        "script",
        "--quiet",
        "--command",
        shlex.join([sys.executable, "-c", code]),
        "/dev/null",
    ]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == (
        "log.to = 'wandb': expected a key: WANDB_API_KEY or wandb login sets it; or "
        "WANDB_MODE=offline"
    )


def test_a_run_may_go_on_with_other_loggers():
    assert may_change("log.to") and may_change("log.project")
