"""The files of a run when something ends it at the worst moment, and its lock."""

import json
import os
from pathlib import Path

import pytest
import yaml

from codistill import files
from codistill.config import Config, ConfigError
from codistill.output.run_directory import RunDirectory, run_lock

NO_CONSTANTS = json.JSONDecoder(parse_constant=lambda name: pytest.fail(name))


@pytest.fixture
def directory(settings) -> RunDirectory:
    """After three steps and the evaluations of steps 0 and 2."""
    directory = RunDirectory(Config(**settings))
    assert directory.start(-1, {}) == []
    for step in (1, 2, 3):
        directory.add_metrics(step, {"loss": step / 2})
    for step in (0, 2):
        directory.add_evaluation({"step": step, "small": 0.5})
    return directory


def steps(directory: RunDirectory, name: str = "metrics.jsonl") -> list[int]:
    lines = (directory.path / name).read_text().splitlines()
    return [NO_CONSTANTS.decode(line)["step"] for line in lines]


def test_a_folder_has_one_run(settings):
    config = Config(**settings)
    folder = config.output_dir / config.name
    with run_lock(config):
        with pytest.raises(ConfigError) as error, run_lock(config):
            pass
        message = str(error.value)
        assert message.startswith(f"{folder}: expected a run that is not running: process ")
        assert f"process {os.getpid()} on " in message and "\n" not in message
        with run_lock(Config(**settings | {"name": "other"})):
            pass
    with run_lock(config):  # free again
        pass


def test_only_the_first_process_locks(settings, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_lock(Config(**settings)), run_lock(Config(**settings)):
        assert not Path(settings["output_dir"]).exists()


def test_a_folder_that_cannot_be_written_to_is_named(settings, tmp_path):
    (tmp_path / "file").touch()
    config = Config(**settings | {"output_dir": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match="^output_dir = '.*file': expected a folder to write to"):
        with run_lock(config):
            pass


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    files.write_text(path, "old")

    def write_half(unfinished: Path) -> None:
        unfinished.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, write_half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.yaml"]
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(path.read_text()))
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert synced == ["old", "new"]  # the content before it has the name, then the name


def test_no_file_is_ever_opened_to_be_written_anew(directory, settings, monkeypatch):
    """A kill between truncation and writing would lose it."""
    before = {path: path.read_bytes() for path in directory.path.glob("*.*")}
    monkeypatch.setattr(os, "replace", lambda *paths: None)  # nothing that is written counts
    directory.start(2, {})
    directory.write_summary({"steps": 3})
    assert {path: path.read_bytes() for path in before} == before and len(before) == 4


def test_rows_after_the_checkpoint_are_dropped(directory, settings):
    assert directory.start(1, {"data.train": {"contents": "1"}}) == []
    assert steps(directory) == [1] and steps(directory, "evaluations.jsonl") == [0]
    assert json.loads((directory.path / "inputs.json").read_text())["data.train"]
    assert yaml.safe_load((directory.path / "config.yaml").read_text())["name"] == "tiny"


@pytest.mark.parametrize(
    "tail", [b'{"step": 4, "lo', b"\0" * 50, b"\0\0\n", b"[1]\n", b"\xff\n", b'{"loss": 1}\n']
)
def test_what_is_no_row_is_cut(directory, tail):
    path = directory.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert [row["step"] for row in files.read_rows(path)] == [1, 2, 3]
    assert directory.start(3, {}) == []
    assert steps(directory) == [1, 2, 3]


def test_rows_that_are_missing_are_said(directory):
    path = directory.path / "metrics.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + third + third)
    (line,) = directory.start(3, {})
    assert line.startswith(f"{path} lacks 1 of the 3 steps that are done, step 2 the first")
    assert steps(directory) == [1, 3]  # each once
    path.unlink()
    (directory.path / "evaluations.jsonl").write_text("")
    metrics, evaluations = directory.start(3, {})
    assert "lacks 3 of the 3 steps" in metrics
    assert "lacks the evaluation before the first step" in evaluations


def test_a_number_that_is_not_finite_is_null(directory):
    directory.add_metrics(4, {"loss": float("nan"), "norm": float("inf"), "ratio": 1.0})
    assert steps(directory) == [1, 2, 3, 4]
    assert files.read_rows(directory.path / "metrics.jsonl")[3] == {
        "step": 4,
        "loss": None,
        "norm": None,
        "ratio": 1.0,
    }
    directory.start(4, {})
    assert steps(directory) == [1, 2, 3, 4]


def test_a_full_disk_is_known():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError) as error:
        files.append_line(Path("/dev/full"), "a line")
    assert files.is_disk_full(error.value)
    assert not files.is_disk_full(FileNotFoundError(2, "No such file"))
    assert not files.is_disk_full(RuntimeError("a shape is wrong"))


@pytest.mark.parametrize("content", ["", "[1]", '{"steps": 3', "\0"])
def test_a_damaged_object_is_empty(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    assert files.read_object(tmp_path / "summary.json") == {}
    assert files.read_object(tmp_path / "none.json") == {}
