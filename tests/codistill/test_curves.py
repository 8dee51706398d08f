"""What curves.png and the summary make of the numbers of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from codistill.output.curves import (
    PANELS,
    draw_evaluations,
    draw_line,
    finish_panel,
    moving_average,
    plot,
    show_percent,
)
from codistill.output.summary import summarize


def write_run(folder: Path, steps: int) -> None:
    """Noisy numbers under every key of a panel but one, which the algorithm does not have."""
    random = np.random.default_rng(0)
    keys = {line.key for lines in PANELS.values() for line in lines} - {"reward/kd"}
    rows = [
        {"step": step, "time/step": 2.0} | {key: random.random() for key in sorted(keys)}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"step": step, "small": step / steps} for step in range(0, steps + 1, 20)]
    rows[0]["large"] = rows[-1]["large"] = 0.5
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("count", [1, 3, 19, 20, 200])
def test_moving_average(count):
    noise = np.random.default_rng(0).standard_normal(count)
    smooth = moving_average(noise.tolist())
    half = count // 20
    for n in range(count):
        near = np.arange(max(0, n - half), min(count, n + half + 1))
        weights = 1 + np.cos(np.pi * (near - n) / (half + 1))
        assert smooth[n] == pytest.approx((weights * noise[near]).sum() / weights.sum())


def test_a_line_is_drawn_faintly_and_smoothed_in_one_colour():
    axis = Figure().subplots()
    line = PANELS["gradient norm"][0]
    rows = [{"step": n, line.key: n % 2} for n in range(200)]
    draw_line(axis, line, [*rows, {"step": 200}])  # a step may lack a number
    faint, smooth = axis.lines
    assert faint.get_color() == smooth.get_color() and faint.get_alpha() < 0.5
    assert list(faint.get_ydata()) == [n % 2 for n in range(200)]
    assert np.ptp(smooth.get_ydata()[5:-5]) < 0.2
    assert [text.get_text() for text in finish_legend(axis)] == ["small"]


def finish_legend(axis) -> list:
    finish_panel(axis, "a title")
    return axis.get_legend().get_texts()


def test_a_curve_has_room_above_it():
    axis = Figure().subplots()
    line = PANELS["completion length (tokens)"][0]
    draw_line(axis, line, [{"step": n, line.key: 27.0 + 0.1 * (n % 2)} for n in range(9)])
    finish_panel(axis, "completion length (tokens)")
    low, high = axis.get_ylim()
    assert low == 0 and high > 27.5


@pytest.mark.parametrize("title", PANELS)
def test_legends_stand_below_the_panels(title):
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axis = figure.subplots()
    for line in PANELS[title]:
        draw_line(axis, line, [{"step": 1, line.key: 0.1}, {"step": 2, line.key: 0.9}])
    draw_evaluations(axis, [{"step": 0, "small": 0.1, "large": 0.2}])
    finish_panel(axis, title)
    figure.draw_without_rendering()
    legend = axis.get_legend().get_window_extent()
    label = axis.xaxis.label.get_window_extent()
    texts = [text.get_window_extent() for text in axis.get_legend().get_texts()]
    assert max(text.y1 for text in texts) <= label.y0 < axis.get_window_extent().y0
    assert 0 <= legend.x0 and legend.x1 <= figure.bbox.x1


def test_plot_and_summary(tmp_path):
    write_run(tmp_path, 200)
    assert plot(tmp_path).read_bytes().startswith(b"\x89PNG")
    summary = summarize(tmp_path, steps=200, problems=7)
    assert summary == {
        "steps": 200,
        "problems": 7,
        "seconds": 400.0,
        "small": {"before": 0.0, "after": pytest.approx(0.9)},
        "large": {"before": 0.5, "after": 0.5},
    }


def test_numbers_that_are_missing_are_left_out(tmp_path):
    """null stands for what was not finite; the evaluation before the first step may be lost."""
    write_run(tmp_path, 40)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows[3]["grad_norm/small"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    evaluations = (tmp_path / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "evaluations.jsonl").write_text("".join(evaluations[1:]))
    assert plot(tmp_path).is_file()
    assert summarize(tmp_path, steps=40, problems=7) == {
        "steps": 40,
        "problems": 7,
        "seconds": 78.0,
    }


def test_percent_ticks_between_whole_percents():
    axis = Figure().subplots()
    axis.plot([0, 1], [0.35, 0.475])
    show_percent(axis)
    axis.set_yticks([0.35, 0.375, 0.4])
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["35%", "37.5%", "40%"]
