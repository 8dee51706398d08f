"""The report: which folders it takes, what it makes of damaged files, what its figures hold."""

import json
from pathlib import Path

import numpy as np
import pytest
from report_runs import HOSTILE, write_rollouts, write_run

from codistill.commands.report import main
from codistill.config import ConfigError
from codistill.output.page import figures
from codistill.output.page.build import facts
from codistill.output.page.rollouts import colour_limit, read_rollouts
from codistill.output.page.runs import differences, group_runs, load_run, load_runs


def test_page_and_summary_of_a_finished_run(tmp_path, capsys):
    folder = write_run(tmp_path / "first")
    main([str(folder)])
    printed = capsys.readouterr().out
    assert "25.0%" in printed and "+25.0 points" in printed and "40 steps" in printed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "25.0 → 50.0 %" in page and "Content-Security-Policy" in page
    assert HOSTILE not in page and "window.hacked" in page
    assert len(page) < 6e6


def test_run_that_goes_on_and_damaged_files(tmp_path, capsys):
    folder = write_run(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 41, "rewa\xff\0\0')
    (folder / "summary.json").write_text('{"steps": 40, "small": 3}')
    (folder / "config.yaml").write_text("[")
    (folder / "samples" / "step_000050.parquet").write_bytes(b"PAR1 and no more")
    (folder / "samples" / "unfinished_step_000060.parquet").write_bytes(b"")
    main([str(folder), "--output", str(tmp_path / "page.html")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: not finished, 40 steps done"
    for name in ("summary.json", "config.yaml", "step_000050.parquet"):
        assert len([line for line in lines if f"{name} is" in line]) == 1
    assert not (folder / "curves.png").exists()
    page = (tmp_path / "page.html").read_text()
    assert "step_000050.parquet is damaged" in page and "What is 3 + 0?" in page


def test_run_without_a_step_or_rollouts(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1")
    main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "metrics.jsonl has no step yet" in page and "No step has ended yet." in page


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_that_is_no_run_is_named(name, tmp_path):
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"{name}'.*: expected the folder of a run"):
        main([str(run), str(tmp_path / name)])
    assert not (run / "curves.png").exists()


def test_mistakes_in_the_options(tmp_path):
    run = str(write_run(tmp_path / "run", finished=False))
    with pytest.raises(ConfigError, match="arguments are required: RUNS"):
        main([])
    with pytest.raises(ConfigError, match="rollouts = '-1'"):
        main([run, "--rollouts", "-1"])
    with pytest.raises(ConfigError, match="output = .*no/page.html': expected a file to write to"):
        main([run, "--output", str(tmp_path / "no" / "page.html")])


def test_several_runs_are_written_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "first", finished=False)
    write_run(tmp_path / "second", finished=False, algorithm="kdrl")
    main(["first", "second"])
    page = (tmp_path / "report.html").read_text()
    assert "first / second" in page and "algorithm" in page.split("What differs")[1]


def runs_of(tmp_path: Path, **folders: dict) -> list:
    return load_runs([write_run(tmp_path / name, **kwargs) for name, kwargs in folders.items()])


def test_seeds_are_grouped_and_other_settings_differ(tmp_path):
    alpha = {"kd": {"alpha": 2.0}}
    runs = runs_of(tmp_path, a_1={"seed": 1}, b=alpha, a_2={"seed": 2})
    groups = group_runs(runs)
    assert [group.label for group in groups] == ["a_*, 2 seeds", "b"]
    assert list(differences(groups)) == [("kd.alpha", ["1.0", "2.0"])]
    (runs[0].folder / "inputs.json").write_text(json.dumps({"data.train": {"contents": "12" * 9}}))
    groups = group_runs(load_runs([run.folder for run in runs]))
    assert [group.label for group in groups] == ["a_1", "b", "a_2"]
    assert ("contents of data.train", ["12121212", "", ""]) in list(differences(groups))


def test_a_run_is_read_once_and_equal_names_are_told_apart(tmp_path):
    one, two = (write_run(tmp_path / name / "run") for name in ("x", "y"))
    runs = load_runs([one, two, tmp_path / "x" / ".." / "x" / "run"])
    assert len(runs) == 2 and len({run.name for run in runs}) == 2


def test_a_step_that_was_written_twice_counts_once(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time/rollout": 7.0}\n')
    rows = load_run(folder, "run").metrics
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[1]["time/rollout"] == 7.0


def traces(groups: list, title: str) -> list:
    drawn = [d for section in figures.draw(groups).values() for d in section if d.title == title]
    return [trace for found in drawn for trace in found.figure.data]


def test_curve_of_one_run_is_smoothed_with_the_numbers_behind(tmp_path):
    groups = group_runs(runs_of(tmp_path, run={}))
    faint, smooth = traces(groups, "Training accuracy")
    expected = [row["reward/accuracy"] for row in groups[0].runs[0].metrics]
    assert faint.opacity < 0.5 and np.allclose(faint.y, expected)
    assert np.std(smooth.y) < np.std(faint.y)
    assert {trace.line.color for trace in (faint, smooth)} == {figures.GREEN}
    models = [trace for trace in traces(groups, "Loss") if trace.opacity is None]
    assert [(trace.name, trace.line.color) for trace in models] == [
        ("small", figures.BLUE),
        ("large", figures.VERMILION),
    ]


def test_seeds_are_a_mean_in_a_band_as_far_as_both_go(tmp_path):
    groups = group_runs(runs_of(tmp_path, s1={"seed": 1, "steps": 40}, s2={"seed": 2, "steps": 30}))
    high, low, middle = traces(groups, "Held-out accuracy")[:3]
    found = [[row["small"] for row in run.evaluations[:4]] for run in groups[0].runs]
    assert list(middle.x) == [0, 10, 20, 30]
    for trace, values in ((high, np.max), (low, np.min), (middle, np.mean)):
        assert np.allclose(trace.y, values(found, axis=0))
    assert facts(groups[0])["models"]["small"]["highest"] == 0.5


def test_each_evaluation_set_has_its_figure(tmp_path):
    groups = group_runs(runs_of(tmp_path, run={}))
    titles = [drawn.title for drawn in figures.draw(groups)["Accuracy"]][:3]
    assert titles == [f"Held-out accuracy{end}" for end in ("", ", math", ", amc")]
    assert [trace.name for trace in traces(groups, titles[1])] == ["small", "large"]
    assert [trace.name for trace in traces(groups, titles[2])] == ["small"]


def test_rollout_time_adds_up_and_phases_are_means(tmp_path):
    groups = group_runs(runs_of(tmp_path, run={}))
    seconds = [row["time/rollout"] for row in groups[0].runs[0].metrics]
    assert np.allclose(traces(groups, "Rollout time, cumulative")[0].y, np.cumsum(seconds) / 60)
    bars = {trace.name: trace.x[0] for trace in traces(groups, "Time of a step by phase")}
    assert bars["rollout"] == pytest.approx(np.mean(seconds)) and len(bars) == 5


def test_a_long_curve_is_thinned(tmp_path):
    groups = group_runs(runs_of(tmp_path, run={"steps": 2 * figures.MOST_POINTS + 1}))
    assert all(len(t.x) <= figures.MOST_POINTS for t in traces(groups, "Loss"))


def test_rollouts_are_of_the_newest_steps_in_equal_parts(tmp_path):
    run = load_run(write_run(tmp_path / "run"), "run")
    for step in (50, 60, 70, 80, 90):
        write_rollouts(run.folder, step, tokens=step > 60)
    rollouts, notices = read_rollouts(run, 10)
    assert not notices and len(rollouts) == 10
    assert [rollouts[n]["step"] for n in (0, 2, 4, 7, 9)] == [90, 80, 70, 60, 60]
    assert [row["prompt"] for row in rollouts[:2]] == ["What is 0 + 0?", "What is 1 + 0?"]
    assert rollouts[0]["texts"] == [HOSTILE, "\n", " 0"] and rollouts[0]["hint"] == 1
    assert rollouts[0]["large"] == [-2.0, -1.0, None]
    assert rollouts[1]["terms"]["advantage of small"] is None
    assert "texts" not in rollouts[-1] and rollouts[-1]["reward"] == 1.0
    assert colour_limit(rollouts) == 2.0  # log-ratios of -1 and 2
    assert read_rollouts(run, 0) == ([], [])
