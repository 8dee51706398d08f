"""The commands as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bench_kernels, plan, results, step
from bench.cases import cases, in_order
from bench.check import CheckFailed
from bench.operations import OURS
from bench.random_models import PAIRS, write
from codistill.model.pretrained import load_tokenizer
from codistill.templates import encode

ROOT = Path(__file__).parents[2]

OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
"""The environment without the word that this is a worker, in which nothing may be measured."""


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, arguments)),
        cwd=ROOT,
        env=OUTSIDE | environment,
        capture_output=True,
        text=True,
    )


def bench(*arguments: object) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "bench", *arguments)


def test_kernels(tmp_path):
    path = tmp_path / "rows.csv"
    chosen = ("--operation", "selective_logps", "kd_rewards", "--implementation", OURS, "eager")
    done = bench("kernels", "--set", "quick", *chosen, "--dtype", "fp32", "--output", path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.table(path).read()
    modes = {(row.operation, row.implementation, row.mode) for row in rows}
    for name in (OURS, "eager"):
        expected = {("selective_logps", name, mode) for mode in ("forward", "backward", "both")}
        assert expected | {("kd_rewards", name, "forward")} <= modes
    assert len(rows) == len(modes) == 8
    for row in rows:
        assert row.is_ok and row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.rounds >= 5 and 0 <= row.error < 1e-4
        assert (row.extra_mib is None) == (row.mode == "backward")
        assert f"{row.median_ms:.4g} ms" in done.stdout
    assert f"8 measurements in {path}" in done.stdout


def test_no_number_without_a_passed_check(monkeypatch, tmp_path):
    def fail(*_):
        raise CheckFailed("result 0 is 1e+00 off")

    monkeypatch.setattr(plan, "check", fail)
    path = tmp_path / "rows.csv"
    options = ["--set", "quick", "--operation", "kd_rewards", "--output", str(path)]
    made = plan.Plan(plan.parser().parse_args(options))
    (first, *_) = made.measurements()
    row = made.measure(first, benchmark=None)
    assert row.status == "inaccurate: result 0 is 1e+00 off" and row.median_ms is None
    assert results.table(path).read() == [row]
    each = {measured.implementation: measured for measured in made.measurements()}
    with pytest.raises(AssertionError, match="inaccurate"):
        bench_kernels.test_operation(None, made, each[OURS])
    bench_kernels.test_operation(None, made, each["eager"])  # a peer may fail: its row says so


def test_all_of_ours_must_have_figures(monkeypatch, make_row):
    made = plan.Plan(plan.parser().parse_args(["--set", "quick"]))
    row = make_row(implementation="codistill linear_logps", status="out of memory")
    monkeypatch.setattr(made, "measure", lambda measurement, benchmark: row)
    with pytest.raises(AssertionError, match="out of memory"):
        bench_kernels.test_operation(None, made, None)


def test_cases_of_a_gpu():
    """The cases of the goals come first, so that a run that is cut off has them."""
    found = cases(list(plan.DEFAULT_SETS), [], is_cpu=False)
    sizes = [(c.shape.tokens, c.shape.hidden, c.shape.vocab) for c in found]
    assert sizes[0] == (4096, 4096, 128256) and (8192, 4096, 151936) in sizes[:6]
    assert (8192, 1536, 151665) in sizes
    pairs = {(c.shape.hidden, c.shape.large_hidden) for c in found if c.shape.large_hidden}
    assert pairs == {(1536, 3584)}
    assert {tokens for tokens, _, _ in sizes} >= {512, 65536}
    assert {c.shape.inactive for c in found} == {0.0, 0.3, 0.6}
    keys = [(c.operation, c.shape) for c in found]
    assert len(keys) == len(set(keys))
    goals = sum(c.is_goal for c in found)
    assert goals > 6
    first = in_order(found)[: goals + 1]
    assert [(c.is_goal, name == OURS) for c, name in first] == [(True, True)] * goals + [
        (True, False)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "expected one of kernels"),
        (["kernels", "--operation", "nonsense"], "invalid choice: 'nonsense'"),
        (["compare", "missing.csv", "missing.csv"], "missing.csv"),
    ],
)
def test_mistakes_end_with_2(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("name", PAIRS)
def test_prompts_of_a_step_are_as_long_as_they_should_be(tmp_path, name):
    """After transformers has made a Qwen2 tokenizer of what is in the folder."""
    pair = PAIRS[name]
    write(pair, tmp_path, weights=False)
    tokenizer = load_tokenizer("small.path", str(tmp_path / "small"))
    assert len(tokenizer) == pair.tokens and tokenizer.eos_token_id == 1
    for line in (tmp_path / "problems.jsonl").read_text().splitlines():
        assert len(encode(json.loads(line)["problem"], tokenizer)) == pair.prompt_tokens


def test_step(tmp_path):
    path = tmp_path / "step.csv"
    done = bench("step", "--models", "tiny", "--rollouts", "hf", "--steps", "2", "--output", path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = step.table(path).read()
    phases = {name: [row.phase for row in rows if row.run == name] for name in step.RUNS}
    assert {row.run for row in rows} == set(step.RUNS)
    assert phases["GRPO of the large model"] == ["rollout", "score", "update_large", "sync", "step"]
    whole = ["rollout", "score", "update_small", "update_large", "sync", "step"]
    assert phases["CoDistill"] == phases["CoDistill without down-sampling"] == whole
    for run_name, names in phases.items():
        seconds = {row.phase: row.median_s for row in rows if row.run == run_name}
        assert all(seconds[name] > 0 for name in names)
        assert seconds["step"] >= 0.8 * sum(seconds[name] for name in names[:-1])
    assert "step / GRPO's" in done.stdout


def test_step_without_an_engine(tmp_path):
    """As bench/gpu.sh runs it: with random tokens, and weights made on the device."""
    path = tmp_path / "step.csv"
    options = ("--models", "tiny", "--rollouts", "random", "--steps", "1", "--output", path)
    done = bench("step", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row.phase for row in step.table(path).read()} == {
        "score",
        "update_small",
        "update_large",
        "step",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for nine minutes")
def test_gpu_script_refuses_without_a_gpu(tmp_path):
    results = str(tmp_path / "results")
    done = run("bench/gpu.sh", "first", PYTHON=sys.executable, CODISTILL_RESULTS=results)
    assert done.returncode == 2 and "must run on a machine with a GPU" in done.stderr
    assert not Path(results).exists()


# Takes the place of Python on a machine with a GPU: every part says that it ran, `suites` fails.
PYTHON = """#!/bin/sh
case "$*" in
  *is_available*) exit 0 ;;
  -c*pytest_benchmark*) echo pytest_benchmark ;;
  -c* | "- "*) exec "$REAL" "$@" ;;
  *pytest*) echo "a test failed"; exit 1 ;;
  *) echo "ran $*" ;;
esac
"""


def test_gpu_script_runs_its_parts(tmp_path):
    """Each part runs whatever the one before did, and the log has everything."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    settings = dict(PYTHON=str(python), REAL=sys.executable, CODISTILL_RESULTS=str(tmp_path))
    done = run("bench/gpu.sh", **settings)
    assert done.returncode == 1, done.stdout + done.stderr
    for line in (
        "ran -m bench first_contact --seconds 165",
        "ran -m bench first_contact --experiments --seconds 75",
        "ran -m bench tune --seconds 30",
        "== suites: exit code 1 after",
        "== kernels: left out, not installed: pytest_benchmark",
    ):
        assert line in done.stdout and line in (tmp_path / "gpu.log").read_text()
    assert [path.name for path in tmp_path.iterdir() if path != python] == ["gpu.log"]
    done = run("bench/gpu.sh", "first", "nonsense", **settings)
    assert done.returncode == 2 and "expected first, suites" in done.stderr
    assert "ran" not in done.stdout
