"""What a run has reached and what it cost, from its files."""

from pathlib import Path
from typing import Any

from codistill.files import read_object, read_rows

EVALUATIONS_AVERAGED = 3


def summarize(folder: Path, *, steps: int, problems: int) -> dict[str, Any]:
    """Accuracy before and after training of each model that learned, and of its sets if they have
    names, and what the run cost.

    After: the mean over the last EVALUATIONS_AVERAGED evaluations that measured the model; the
    evaluation before the first step is never one of them, and without it there is no accuracy.
    steps, problems: how many steps were trained, how many problems are held out.
    """
    evaluations = read_rows(folder / "evaluations.jsonl")
    first: dict[str, Any] = next((row for row in evaluations if row["step"] == 0), {})
    later = [row for row in evaluations if row["step"] > 0]
    summary: dict[str, Any] = {
        "steps": steps,
        "problems": problems,
        "seconds": sum(row.get("time/step") or 0 for row in read_rows(folder / "metrics.jsonl")),
    }
    for name in measured(evaluations):
        last = [row[name] for row in later[-EVALUATIONS_AVERAGED:] if name in row]
        if name in first and last:
            summary[name] = {"before": first[name], "after": sum(last) / len(last)}
    return summary


def measured(evaluations: list[dict[str, Any]]) -> list[str]:
    """The keys of evaluations.jsonl that are accuracies: MODEL, and MODEL/SET of named sets."""
    return list(dict.fromkeys(name for row in evaluations for name in row if name != "step"))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a run, as `summarize` has made it; None where it is missing or damaged."""
    summary = read_object(folder / "summary.json")
    numbers = [summary.get(key) for key in ("steps", "problems", "seconds")]
    for name in summary.keys() - {"steps", "problems", "seconds"}:
        accuracy = summary[name]
        is_pair = isinstance(accuracy, dict)
        numbers += [accuracy.get(key) if is_pair else None for key in ("before", "after")]
    return summary if all(type(number) in (int, float) for number in numbers) else None
