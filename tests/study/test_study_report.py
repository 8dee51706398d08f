"""The report of records that no run has made, and the command line."""

import re
import shutil
from pathlib import Path

import pytest
from synthetic import write_study

from study import __main__ as command
from study import figures, runs
from study.methods import METHODS
from study.places import Places
from study.report import write
from study.results import load

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "study.md"


@pytest.fixture
def places(tmp_path) -> Places:
    """A copy of the page, and no records."""
    found = Places(
        tmp_path / "results", tmp_path / "runs", tmp_path / "docs/study.md", tmp_path / "docs/study"
    )
    found.page.parent.mkdir()
    (found.results / "words").mkdir(parents=True)
    shutil.copy(PAGE, found.page)
    return found


def test_whole_report(places, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 40)  # fewer pixels, less time
    seeds = {name: range(1 + n % 4) for n, name in enumerate(METHODS)}  # some have too few
    for name in METHODS:
        write_study(places.results / "words", [name], seeds[name], {})
    files = write("words", places)
    text = places.page.read_text()
    assert "| GRPO (n = 1) |" in text and "**not shown**" in text and "too few pairs" in text
    shown = re.findall(r"!\[([^\]]{40,})\]\((study/words/\w+\.png)\)", text)
    assert len(shown) == len(figures.FIGURES)
    for _, picture in shown:
        content = (places.page.parent / picture).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 2**17
    readme = (places.results / "README.md").read_text()
    assert "make study" in readme and "torch 2.13.0" in readme
    assert all(file.exists() for file in files)


def test_nothing_has_run(places):
    old = places.pictures / "words" / "alpha.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of records that are gone")
    assert write("words", places) == [places.page, places.results / "README.md"]
    text = places.page.read_text()
    write("words", places)
    assert places.page.read_text() == text
    assert "No run has finished." in text and "No picture yet" in text and "![" not in text
    assert not old.exists()


def test_page_without_a_marker(places):
    places.page.write_text("nothing")
    with pytest.raises(ValueError, match="<!-- study words verdict: begin -->"):
        write("words", places)


def test_a_folder_of_ones_own_gets_a_page_with_all_tables(places, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 40)
    own = Places.within(tmp_path / "own")
    write_study(own.results / "words", list(METHODS), range(3), {})
    write_study(places.results / "words", list(METHODS), range(3), {})
    assert own.page in write("words", own)
    write("words", places)
    sections = [
        re.findall(r"(?s)<!-- (study words [a-z ]+?): begin -->(.*?)<!-- ", page.read_text())
        for page in (own.page, places.page)
    ]
    texts = [dict(found) for found in sections]
    assert texts[0].keys() == texts[1].keys()
    assert texts[0]["study words verdict"] == texts[1]["study words verdict"]
    for picture in re.findall(r"\]\((.*?\.png)\)", own.page.read_text()):
        assert (tmp_path / "own" / picture).exists()


def test_bands_need_three_seeds(tmp_path):
    from matplotlib.figure import Figure

    write_study(tmp_path, ["grpo_small"], range(2), {})
    write_study(tmp_path, ["kdrl"], range(3), {})
    for name, lines, bands in (("grpo_small", 2, 0), ("kdrl", 1, 1)):
        axis = Figure().subplots()
        curve = figures.held_out(load(tmp_path), name, "small")
        figures.draw_curve(axis, curve, METHODS[name])
        assert (len(axis.lines), len(axis.collections)) == (lines, bands)
        labels = axis.get_legend_handles_labels()[1]
        assert len(labels) == 1 and labels[0].endswith(f"n = {lines + 2 * bands}")


def test_continued_training_goes_on_where_its_run_ended(tmp_path):
    write_study(tmp_path, ["grpo_large", "grpo_large_ct"], range(3), {})
    found, method = load(tmp_path), METHODS["grpo_large_ct"]
    curve = figures.held_out(found, method.name, "large")
    steps, values = figures.continuing(found, method, curve)
    assert steps.tolist() == [16, 20, 24, 28, 32] and values is curve[1]


@pytest.fixture
def started(monkeypatch) -> list:
    """The runs that the command asks for; the first of them fails."""
    found: list = []

    def execute_all(asked, jobs):
        found.extend([*asked, jobs])
        return [asked[0].name]

    monkeypatch.setattr(runs, "execute_all", execute_all)
    return found


def test_run_command(started):
    options = "run --methods kdrl grpo_small --seeds 3 5 --steps 8 --jobs 2".split()
    assert command.main(options) == 1
    *asked, jobs = started
    assert [(run.method.name, run.seed, run.steps) for run in asked] == [
        ("kdrl", 3, 8),
        ("grpo_small", 3, 8),
        ("kdrl", 5, 8),
        ("grpo_small", 5, 8),
    ]
    assert jobs == 2


def test_seeds_that_are_not_named_are_those_of_the_group(started):
    command.main("run --methods hints_masked grpo_small".split())
    asked = [(run.seed, run.method.name) for run in started[:-1]]
    names = ["hints_masked", "grpo_small"]
    assert asked == [(k, name) for k in range(5) for name in names] + [
        (k, "grpo_small") for k in range(5, 10)
    ]


def test_unknown_task(started, capsys):
    assert command.main(["run", "--task", "chess"]) == 2
    assert capsys.readouterr().err == "study: --task: expected one of words\n" and not started


def test_help_names_commands(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "python -m study report" in capsys.readouterr().out
