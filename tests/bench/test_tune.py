"""Candidates for the constants of slabs: which are tried, written and proposed, without a GPU."""

import pytest
import torch

from bench import tune
from bench.table import Table
from bench.tune import Candidate
from codistill_kernels._linear import slab_sizes, softmax_triton

CPU = torch.device("cpu")


def even(candidate: Candidate) -> float:
    """Milliseconds, as if every step took one picosecond per logit."""
    return candidate.rows * candidate.segment * 1e-9


def test_what_the_present_constants_need_comes_first():
    found = list(tune.candidates())
    assert len(set(found)) == len(found) == 3 * 3 * 2 + 3 * 4 * 2
    now = dict(rows=slab_sizes.ROWS, segment=slab_sizes.SEGMENT)
    warps = softmax_triton.NUM_WARPS
    assert found[:4] == [
        *(Candidate("product", **now, hidden=hidden) for hidden in tune.HIDDEN),
        *(Candidate(step, **now, num_warps=warps) for step in tune.PASSES),
    ]


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path, capsys):
    def time_of(candidate: Candidate) -> float:
        if candidate.num_warps == 32:
            raise RuntimeError("out of registers\nand more of it")
        return even(candidate)

    path = tmp_path / "results" / "tune.csv"
    rows = tune.measure_all(time_of, path, seconds=60)
    table = Table(path, tune.Row, tune.KEY).read()
    assert len(table) == len(rows) == len(list(tune.candidates()))
    failed = [row for row in table if row.num_warps == 32]
    message = "failed: RuntimeError: out of registers"
    assert len(failed) == 6 and all(row.status == message for row in failed)
    assert "failed: RuntimeError: out of registers" in capsys.readouterr().out
    assert all(warps != 32 for _, _, warps in tune.totals(rows))


def test_rows_are_written_as_they_come_until_time_is_up(tmp_path, capsys):
    path = tmp_path / "tune.csv"
    lines = []

    def time_of(candidate: Candidate) -> float:
        lines.append(len(path.read_text().splitlines()))
        if len(lines) == 3:
            raise KeyboardInterrupt
        return even(candidate)

    with pytest.raises(KeyboardInterrupt):
        tune.measure_all(time_of, path, seconds=60)
    assert lines == [1, 2, 3]
    assert tune.measure_all(even, path, seconds=-1) == []
    assert "0 of 42 candidates" in capsys.readouterr().out


def test_figures_of_a_row():
    (product, *_) = tune.candidates()
    row = tune.measure(product, lambda _: 2.0)
    rows, segment, hidden = product.rows, product.segment, product.hidden
    assert row.tflops == pytest.approx(2 * rows * segment * hidden / 2e-3 / 1e12)
    moved = 2 * hidden * (rows + segment) + 4 * rows * segment
    assert row.gb_s == pytest.approx(moved / 2e-3 / 1e9)
    row = tune.measure(Candidate("segment_states", 4096, 8192, num_warps=8), lambda _: 1.0)
    assert row.tflops is None and row.gb_s == pytest.approx(6 * 4096 * 8192 / 1e-3 / 1e9)
    assert row.picoseconds_per_logit == pytest.approx(1e9 / (4096 * 8192))


def test_proposes_the_fastest_constants(tmp_path):
    def time_of(candidate: Candidate) -> float:
        is_best = candidate.segment == 4096 and candidate.rows in (2048, slab_sizes.ROWS)
        is_best &= candidate.num_warps in (None, 16)
        return even(candidate) * (0.5 if is_best else 1.0)

    rows = tune.measure_all(time_of, tmp_path / "tune.csv", seconds=60)
    best, *_ = tune.totals(rows)
    assert best[1:] == (4096, 16)
    _, now, first, *_ = tune.proposal(rows)
    assert now == "now       ROWS = 4096, SEGMENT = 8192, NUM_WARPS = 8: 3.00 (+0.0%)"
    assert "SEGMENT = 4096, NUM_WARPS = 16: 1.50 (-50.0%)" in first
    assert tune.proposal(rows[:3]) == [
        "no constants with all of the product and the passes measured"
    ]


def test_constants_of_a_candidate_reach_the_launch(monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: launched.append((grid, options))

    for step in tune.PASSES:
        monkeypatch.setattr(softmax_triton, f"{step}_kernel", Kernel())
        candidate = Candidate(step, rows=4, segment=64, num_warps=16)
        with tune.constants_of(candidate):
            tune.call_of(candidate, CPU)()
    assert [grid for grid, _ in launched] == [(4, 1), (4, 1)]
    assert all((o["SEGMENT"], o["num_warps"]) == (64, 16) for _, o in launched)
    assert launched[0][1]["KEEP"]
    assert slab_sizes.SEGMENT != 64 and softmax_triton.NUM_WARPS == 8


def test_a_product_runs():
    tune.call_of(Candidate("product", rows=4, segment=64, hidden=8), CPU)()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, and would run for minutes")
def test_mistakes_end_with_2(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "bench tune must run on a GPU, found none\n"
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--seconds", "0"])
    assert stopped.value.code == 2 and "must be positive, got 0" in capsys.readouterr().err
