"""Named sets of held-out problems in training: accuracies, curves, summary, what may be wrong."""

import json

import pytest
from matplotlib.figure import Figure
from pydantic import ValidationError
from tiny import FakeGrader, merged

from codistill.config import Config
from codistill.config.changes import changes_between
from codistill.fingerprints import fingerprints
from codistill.inputs import load_inputs
from codistill.output.curves import draw_evaluations, plot
from codistill.output.summary import summarize

FIXED = ("time/", "tokens_per_second")


@pytest.fixture
def sets(settings, tmp_path) -> dict:
    """Settings with two sets of other sizes: problems of the training file, and others."""
    rows = (tmp_path / "problems.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "seen.jsonl").write_text("".join(rows[:2]))
    (tmp_path / "new.jsonl").write_text('{"problem": "9+9", "answer": "18"}\n' * 5)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("seen", "new")}
    return {"data": {"eval": None}, "evaluation": {"sets": files, "every": 2}}


def test_each_set_has_its_accuracy_and_the_model_their_mean(make_trainer, sets):
    trainer = make_trainer(sets, FakeGrader())
    trainer.total_steps = 1
    row = trainer.evaluate(1)
    names = ("small", "large")
    expected = {"step", *names, *(f"{name}/{part}" for name in names for part in ("seen", "new"))}
    assert row.keys() == expected
    for name in names:
        seen, new = row[f"{name}/seen"] * 2, row[f"{name}/new"] * 5
        assert seen == round(seen) and new == round(new)
        assert row[name] == pytest.approx((row[f"{name}/seen"] + row[f"{name}/new"]) / 2)


def test_evaluation_does_not_touch_what_training_draws(make_trainer, sets):
    """A step's numbers are the same bits, whatever was evaluated before it."""

    def numbers(changes: dict, *, evaluations: int) -> list[dict]:
        trainer = make_trainer(changes, FakeGrader())
        trainer.total_steps = 2
        found = []
        for step in (1, 2):
            for _ in range(evaluations):
                trainer.evaluate(0)
            found.append(trainer.step(step)[0])
        return [{k: v for k, v in row.items() if not k.startswith(FIXED)} for row in found]

    changes = {"downsample": {"keep": 4, "method": "random"}, "evaluation": {"temperature": 0.7}}
    without = numbers(changes, evaluations=0)
    changes["evaluation"] |= sets["evaluation"]
    assert numbers(changes | {"data": sets["data"]}, evaluations=2) == without


def test_a_set_may_be_another_and_each_has_a_fingerprint(settings, sets, tmp_path):
    before = Config(**merged(settings, sets))
    prints = fingerprints(before)
    assert {"evaluation.sets.seen", "evaluation.sets.new"} < prints.keys()
    assert "data.eval" not in prints
    settings["data"].pop("eval")
    settings["evaluation"]["sets"] = {"seen": str(tmp_path / "new.jsonl")}
    changes = changes_between(before, Config(**settings))
    assert set(changes) == {"evaluation.sets.seen", "evaluation.sets.new"}


def test_overlap_and_size_are_said_for_each_set(settings, sets, tmp_path, caplog):
    sets["evaluation"]["sets"]["MATH-500"] = str(tmp_path / "new.jsonl")
    inputs = load_inputs(Config(**merged(settings, sets)))
    assert {name: len(found) for name, found in inputs.held_out.items()} == {
        "seen": 2,
        "new": 5,
        "MATH-500": 5,
    }
    text = "evaluation.sets.seen: 2 of 2 problems are in data.train too: they are not held out"
    assert [line for line in caplog.messages if "held out" in line] == [text]
    text = "MATH-500 has 5 problems here, and 500 in the paper: their numbers do not compare"
    assert text in caplog.messages


def test_one_of_file_and_sets_is_given(settings, sets):
    with pytest.raises(ValidationError, match="data.eval = .*: expected no value beside"):
        Config(**merged(settings, {"evaluation": sets["evaluation"]}))
    settings["data"].pop("eval")
    with pytest.raises(ValidationError, match="data.eval is missing: expected held-out problems"):
        Config(**settings)


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "two words", "x" * 61])
def test_names_of_sets_are_names_of_files(settings, sets, name):
    sets["evaluation"]["sets"] = {name: "a.jsonl"}
    with pytest.raises(ValidationError, match="expected a name of at most 60 letters"):
        Config(**merged(settings, sets))


ROWS = [
    {"step": 0, "small": 0.2, "small/A": 0.1, "small/B": 0.3, "large": 0.5, "large/A": 0.5},
    {"step": 2, "small": 0.4, "small/A": 0.3, "small/B": 0.5, "large": 0.6, "large/A": 0.7},
]


def test_curves_and_summary_have_each_set(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/accuracy": 0.5}\n')
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    summary = summarize(tmp_path, steps=2, problems=9)
    assert summary["small"] == {"before": 0.2, "after": 0.4}
    assert summary["small/B"] == {"before": 0.3, "after": 0.5}
    assert summary["large/A"] == {"before": 0.5, "after": 0.7}
    assert plot(tmp_path).is_file()
    axis = Figure().subplots()
    draw_evaluations(axis, ROWS)
    lines = {line.get_label().removeprefix("held-out, "): line for line in axis.lines}
    assert lines.keys() == {"small, mean", "small/A", "small/B", "large, mean", "large/A"}
    assert lines["small, mean"].get_linewidth() > lines["small/A"].get_linewidth()
    assert lines["small/A"].get_color() == lines["small, mean"].get_color()
    assert lines["small/A"].get_marker() != lines["small/B"].get_marker()
    assert lines["small/A"].get_marker() == lines["large/A"].get_marker()
