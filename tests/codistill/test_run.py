"""train.py as a user runs it: its files, its exit codes, its interruptions."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from math import cos, pi
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codistill.config import Config
from codistill.output.run_directory import run_lock
from codistill.run import is_finished

ROOT = Path(__file__).parents[2]
KEYS = {
    "step",
    *("reward/accuracy", "reward/format", "reward/kd", "reward/zero_fraction"),
    *("loss/small", "loss/large", "grad_norm/small", "grad_norm/large"),
    *("ratio/large_clip_fraction", "ratio/large_ess"),
    *("rollout/mean_tokens", "rollout/truncated_fraction"),
    *("rollout/logp_gap_mean", "rollout/logp_gap_max"),
    *("time/rollout", "time/score", "time/update_small", "time/update_large", "time/sync"),
    *("time/step", "tokens_per_second"),
}


def rows(settings: dict, name: str = "metrics.jsonl") -> list[dict]:
    path = Path(settings["output_dir"]) / settings["name"] / name
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    timed = ("time/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics]


def check_files(settings: dict, models: dict) -> None:
    folder = Path(settings["output_dir"]) / settings["name"]
    metrics = rows(settings)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert KEYS <= row.keys()
        assert row["rollout/logp_gap_max"] <= 1e-4
        assert 0 < row["ratio/large_ess"] <= 1 and row["grad_norm/small"] > 0
    assert metrics[0]["ratio/small_mean"] == pytest.approx(1, abs=1e-5)  # on-policy
    assert metrics[0]["ratio/large_mean"] != pytest.approx(1, abs=1e-2)
    assert yaml.safe_load((folder / "config.yaml").read_text())["loss"]["epsilon_low"] == 0.2
    for name in ("small", "large"):
        exported = load_file(folder / "export" / "step_3" / name / "model.safetensors")
        start = load_file(models[name] / "model.safetensors")
        assert exported.keys() == start.keys()
        assert all((exported[key] != start[key]).any() for key in start), name
    samples = pyarrow.parquet.read_table(folder / "samples" / "step_000002.parquet")
    assert sum(samples["kept"].to_pylist()) * 6 == samples.num_rows * 4
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    evaluations = rows(settings, "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    mean = sum(row["small"] for row in evaluations[1:]) / 2
    assert summary["small"] == {"before": evaluations[0]["small"], "after": mean}


def test_run_with_hugging_face_engine(settings, train, models):
    settings["log"] = {"to": ["tensorboard"]}
    done = train(settings)
    assert done.returncode == 0, done.stderr
    assert "rollout engine: hf, 1 processes on cpu" in done.stdout
    assert "step 3/3" in done.stdout and "held-out accuracy" in done.stdout
    check_files(settings, models)
    folder = Path(settings["output_dir"]) / settings["name"]
    check_events(folder / "tensorboard", settings)
    (folder / "curves.png").unlink()
    report = [sys.executable, "-m", "codistill", "report", str(folder)]
    printed = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "held-out accuracy" in printed and "3 steps" in printed
    again = train(settings)  # nothing left to do
    assert again.returncode == 0 and "going on after step 3" in again.stdout
    check_files(settings, models)
    other = train(settings, "--kd.alpha", "3")
    assert other.returncode == 2
    assert "train.py: kd.alpha = 3.0: expected 1.0 as in" in other.stderr


def check_events(folder: Path, settings: dict) -> None:
    """TensorBoard has the numbers of metrics.jsonl and evaluations.jsonl, in fp32."""
    events = EventAccumulator(str(folder))
    events.Reload()
    for row in rows(settings):
        for key in row.keys() - {"step"}:
            (value,) = (e.value for e in events.Scalars(key) if e.step == row["step"])
            assert value == pytest.approx(row[key], rel=1e-6), key
    found = [(event.step, event.value) for event in events.Scalars("evaluation/small")]
    evaluations = rows(settings, "evaluations.jsonl")
    assert found == [(row["step"], pytest.approx(row["small"])) for row in evaluations]


def test_run_goes_on_with_more_steps(settings, train, tmp_path):
    assert train(settings).returncode == 0
    (tmp_path / "runs").rename(tmp_path / "moved")
    settings["output_dir"] = str(tmp_path / "moved")
    done = train(settings, "--training.steps", "5", "--evaluation.every", "1")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("going on"))
    assert line.startswith("going on after step 3 with other settings: output_dir ")
    assert line.endswith(", training.steps 3 -> 5, evaluation.every 2 -> 1")
    metrics = rows(settings)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(settings, "evaluations.jsonl")] == [0, 2, 3, 4, 5]
    # A cosine from 1e-2 to 0: over the three steps planned at first, then where one over five is.
    expected = [0.005 * (1 + cos(pi * n / total)) for n, total in enumerate((3, 3, 3, 5, 5))]
    assert [row["learning_rate/small"] for row in metrics] == pytest.approx(expected)
    folder = tmp_path / "moved" / "tiny"
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert (stored["training"]["steps"], stored["evaluation"]["every"]) == (5, 1)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 5
    assert (folder / "export" / "step_5" / "large" / "model.safetensors").is_file()


def test_a_full_disk_and_a_second_run_end_in_one_line(settings, train):
    settings["training"]["steps"] = 1
    assert train(settings).returncode == 0
    folder = Path(settings["output_dir"]) / "tiny"
    settings["training"]["steps"] = 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # fits all files but checkpoints
    try:
        full = train(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, line = full.stderr.splitlines()  # after what is said of the problems
    assert full.returncode == 1
    assert line.startswith(f"train.py: stopped: no space is left on the disk of {folder}, or a ")
    assert os.listdir(folder / "checkpoints") == ["step_1"]
    with run_lock(Config(**settings)):
        second = train(settings)
    _, line = second.stderr.splitlines()
    assert second.returncode == 2
    assert line.startswith(f"train.py: {folder}: expected a run that is not running: process ")
    (folder / "checkpoints" / "step_99").mkdir()
    done = train(settings)
    assert done.returncode == 0, done.stderr
    assert "passed over" in done.stdout and "going on after step 1" in done.stdout
    assert [row["step"] for row in rows(settings)] == [1, 2]
    assert sorted(os.listdir(folder / "checkpoints")) == ["damaged_99", "step_1", "step_2"]
    assert sorted(os.listdir(folder / "export")) == ["step_1", "step_2"]


def test_run_with_vllm_on_two_processes(settings, train, models, tmp_path):
    pytest.importorskip("vllm", reason="vLLM cannot be installed on this machine")
    settings["rollout"] |= {"engine": "vllm", "kv_cache_gib": 0.1}
    settings["hint"] = {"tokens": 3}
    done = train(settings, processes=2)
    assert done.returncode == 0, done.stderr
    assert "rollout engine: vllm, 2 processes on cpu" in done.stdout
    check_files(settings, models)
    # 8 problems, 4 a step: the first epoch, which has hints, is two steps
    assert [row["rollout/hint_tokens"] > 0 for row in rows(settings)] == [True, True, False]

    check_export(Path(settings["output_dir"]) / "tiny", tmp_path / "exported")


def check_export(folder: Path, output: Path) -> None:
    """The command makes of the checkpoint of two processes what the run has exported, and vLLM
    writes with it what transformers does."""
    command = [sys.executable, "-m", "codistill", "export", str(folder), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(output / "small"), str(output / "large")]
    for name in ("small", "large"):
        ours, theirs = (path / name for path in (output, folder / "export" / "step_3"))
        assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
        for file in ours.iterdir():
            assert file.read_bytes() == (theirs / file.name).read_bytes(), file
    command = [sys.executable, str(ROOT / "tests" / "vllm_export.py"), *done.stdout.split()]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert written.returncode == 0, written.stderr


def test_a_run_has_ended_when_its_last_step_is_summed_up(tmp_path):
    summary = tmp_path / "summary.json"
    assert not is_finished(summary, 3)
    summary.write_text('{"steps": 3}')
    assert is_finished(summary, 3)
    assert not is_finished(summary, 5)  # it goes on, and exports its models once more


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_interrupted_run_goes_on_bitwise(settings, train, tmp_path, number):
    settings["training"]["steps"] = 6
    # Whatever an algorithm keeps from step to step must be saved or follow from the step's number.
    settings |= {
        "hint": {"tokens": 2, "epochs": 2},
        "kd": {"alpha": 2.0, "alpha_end": 0.5},
        "downsample": {"keep": 4, "method": "random"},
        "loss": {"beta": 0.05},
    }
    settings["rollout"]["sampling_rounds"] = 2
    settings["training"]["inner_epochs"] = 2
    settings["checkpoint"]["asynchronous"] = number == signal.SIGKILL
    settings["name"] = "whole"
    assert train(settings).returncode == 0
    whole = without_times(rows(settings))
    settings["name"] = "interrupted"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    folder = tmp_path / "runs" / "interrupted"
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143), errors
    before = len(rows(settings))
    assert 1 <= before < 6
    done = train(settings)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert without_times(rows(settings)) == whole


def test_continued_training_of_the_large_model(settings, train, models):
    """GRPO with its own rollouts, from what a codistill run has exported; Eq. 2 to 4 in full."""
    settings["training"]["steps"] = 1
    assert train(settings).returncode == 0
    export = Path(settings["output_dir"]) / "tiny" / "export" / "step_1" / "large"
    changes = {
        "algorithm": "grpo",
        "grpo.model": "large",
        "large.path": export,
        "name": "ct",
        "advantage.scale": "std",
        "loss.normalization": "sequence",
        "loss.beta": 0.04,
        "training.steps": 2,
    }
    done = train(settings, *(f"--{key}={value}" for key, value in changes.items()))
    assert done.returncode == 0, done.stderr
    assert "not used by algorithm grpo: small" in done.stdout
    settings["name"] = "ct"
    first, second = rows(settings)
    assert first["ratio/large_mean"] == pytest.approx(1, abs=1e-5)
    assert first["kl/large_reference"] < 1e-6 < second["kl/large_reference"]
    assert not [key for key in first if "small" in key]
    folder = Path(settings["output_dir"]) / "ct"
    exported = load_file(folder / "export" / "step_2" / "large" / "model.safetensors")
    start = load_file(export / "model.safetensors")
    assert all((exported[key] != start[key]).any() for key in start)
    assert not (folder / "export" / "step_2" / "small").exists()
    assert json.loads((folder / "summary.json").read_text()).keys() >= {"large"}
    assert (folder / "curves.png").is_file()


def test_run_stops_when_engine_and_trainer_disagree(settings, train):
    pytest.importorskip("vllm", reason="vLLM cannot be installed on this machine")
    settings["rollout"] |= {"engine": "vllm", "kv_cache_gib": 0.1, "logp_gap_limit": 1e-12}
    done = train(settings)
    assert done.returncode == 1
    assert "differ by" in done.stderr and "than 1e-12 (rollout.logp_gap_limit)" in done.stderr
    assert "Traceback" not in done.stderr
