"""The first contact with a GPU, as far as a CPU can test it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import exactness, findings, first_contact
from bench.devices import H100, H200
from bench.findings import FAILED, OK, Finding, Findings
from bench.gold import Inputs, Setting, Sizes
from bench.path_parts import Case
from bench.roofline import QWEN, predict

ROOT = Path(__file__).parents[2]
TINY = Sizes(
    tokens=40, hidden=24, head_rows=1040, vocab=1021, large_hidden=32, large_head_rows=1056
)


@pytest.fixture
def inputs():
    return Inputs(TINY, Setting(torch.bfloat16, torch.device("cpu"), "cpu"))


@pytest.mark.parametrize("check", exactness.CHECKS, ids=lambda check: check.__name__)
def test_what_is_right_passes(inputs, check):
    found = list(check(inputs))
    assert len(found) >= 1 and {finding.verdict for finding in found} == {OK}, found


def test_right_in_every_way_on_triton():
    """Runs in Triton's interpreter, with slabs so small that there are several."""
    script = f"""
import torch
from bench import exactness
from bench.gold import Inputs, Setting, Sizes
from bench.path_parts import Case
from bench.roofline import QWEN, predict
from codistill_kernels._linear import slab_sizes
slab_sizes.SEGMENT, slab_sizes.ROWS, slab_sizes.ROW_PADDING = 512, 64, 32
inputs = Inputs({TINY}, Setting(torch.float32, torch.device("cpu"), "triton"))
for finding in exactness.check_linear_policy_loss(inputs):
    print(finding)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    ways = {line.split(":")[0].removeprefix("linear_policy_loss ") for line in lines}
    assert ways == {"kept", "kept, shared memory", "chunks", "columns"}
    assert len(lines) == 3 * len(ways) and all(line.endswith(OK) for line in lines), lines


def failures(found) -> set[str]:
    return {finding.what for finding in found if finding.verdict == FAILED}


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        ("linear_logps", exactness.check_linear_logps),
        ("linear_policy_loss", exactness.check_linear_policy_loss),
        ("selective_logps", exactness.check_selective_logps),
    ],
)
def test_a_broken_gradient_is_reported(inputs, monkeypatch, operation, check):
    """The gradient of hidden states or logits is 2 % too large; the values are right."""
    right = getattr(exactness.kernels, operation)

    def wrong(x, *arguments, **options):
        return right(x + 0.02 * (x - x.detach()), *arguments, **options)

    monkeypatch.setattr(exactness.kernels, operation, wrong)
    found = list(check(inputs))
    broken = {finding.what for finding in found if finding.what.endswith((": dX", ": dlogits"))}
    assert broken and failures(found) == broken


def test_a_broken_gradient_of_a_divergence_is_reported(inputs, monkeypatch):
    right = exactness.kernels.linear_divergence

    def wrong(student, *arguments, **options):
        x, weight = student
        return right((x + 0.02 * (x - x.detach()), weight), *arguments, **options)

    monkeypatch.setattr(exactness.kernels, "linear_divergence", wrong)
    kinds = ("reverse_kl", "forward_kl", "jsd")
    broken = failures(exactness.check_linear_divergence(inputs))
    assert broken == {f"linear_divergence {kind}: dX" for kind in kinds}


def test_a_gradient_beyond_the_vocabulary_is_reported(inputs, monkeypatch):
    right = exactness.kernels.linear_policy_loss

    def wrong(x, weight, *arguments, **options):
        loss, stats = right(x, weight, *arguments, **options)
        return loss + (weight[-1].sum() - weight[-1].sum().detach()), stats

    monkeypatch.setattr(exactness.kernels, "linear_policy_loss", wrong)
    broken = failures(exactness.check_linear_policy_loss(inputs))
    assert broken == {f"linear_policy_loss {way}: dW" for way in inputs.setting.ways}


def test_other_rows_and_masked_ones_must_not_matter(inputs, monkeypatch):
    right = exactness.kernels.linear_logps

    def wrong(x, *arguments, **options):
        return right(x + x.nan_to_num(0.0, 0.0).mean(), *arguments, **options)

    monkeypatch.setattr(exactness.kernels, "linear_logps", wrong)
    assert "logps: rows alone have the same bits" in failures(exactness.check_bits(inputs))
    masked = failures(exactness.check_masked(inputs))
    ways = ("kept", "columns")
    assert masked == {f"linear_logps {way}: NaN, inf behind the mask" for way in ways}


def test_a_goal_has_the_prediction_of_its_device():
    goal = first_contact.Goal("linear_policy_loss", "both", first_contact.LARGER)
    case = Case("linear_policy_loss", "both", *QWEN)
    for device in (H200, H100):
        assert goal.prediction(device) == predict(device, case)
    assert goal.prediction(None) is None  # an unknown device
    by_columns = first_contact.Goal("linear_logps", "both", first_contact.LARGER, "columns")
    assert by_columns.prediction(H200) is None
    assert str(by_columns) == "linear_logps both by columns 8192x4096x151936"


def test_goals_can_be_predicted():
    for goal in first_contact.GOALS:
        assert (goal.prediction(H200) is None) == (goal.way != "")
    pair = first_contact.GOALS[-1]
    assert str(pair) == "linear_reverse_kl forward 16384x5120x151936"
    assert pair.prediction(H200).case.hidden == (1536, 3584)


def test_a_number_beside_its_prediction():
    beside = first_contact.beside
    assert beside("x", 20.0, "ms", 18.0).verdict == OK
    assert beside("x", 36.0, "ms", 18.0).verdict == "2.00 x the prediction"
    assert (
        beside("x", 9.0, "ms", 18.0).verdict == "0.50 x the prediction"
    )  # faster is a surprise too
    assert beside("x", 9.0, "ms", None).expected == "-"
    in_range = findings.in_range
    assert in_range("x", 2.0, "ms", (1, 3), "why").verdict == OK
    assert in_range("x", 4.0, "ms", (1, 3), "why").verdict == "above: why"
    assert in_range("x", 4.0, "ms", None, "why").expected == "-"


def test_findings_are_written_as_they_come(tmp_path):
    path = tmp_path / "new" / "found.csv"
    first = Findings(path)
    first.add(Finding("a", "1", "ms", "2", OK))
    first.add(Finding("b", "no", "", "yes", FAILED))
    header = "what,measured,unit,expected,verdict\n"
    assert path.read_text() == header + "a,1,ms,2,ok\nb,no,,yes,FAILED\n"
    again = Findings(path)  # another run replaces and adds findings
    again.add(Finding("b", "yes", "", "yes", OK))
    assert path.read_text() == header + "a,1,ms,2,ok\nb,yes,,yes,ok\n"
    assert first.failed == ["b"] and again.failed == []


def test_a_step_that_breaks_is_a_failure_and_the_next_one_runs(tmp_path, capsys):
    def broken():
        yield Finding("before", "1", "", "", OK)
        raise RuntimeError("out of luck")

    steps = [("broken", broken), ("next", lambda: iter([Finding("next", "2", "", "", OK)]))]
    found = Findings(tmp_path / "found.csv")
    assert first_contact.run(iter(steps), found, seconds=60) == 1
    assert [finding.what for finding in found.table.read()] == ["before", "broken", "next"]
    assert found.failed == ["broken"]
    assert first_contact.run(iter(steps[1:]), Findings(tmp_path / "other.csv"), seconds=60) == 0
    assert first_contact.run(iter(steps), Findings(tmp_path / "third.csv"), seconds=-1) == 0
    assert "before broken" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, and would run for minutes")
def test_without_a_gpu(capsys):
    assert first_contact.main([]) == 2
    assert "must run on a GPU, found none" in capsys.readouterr().err
