"""What the command eval makes of the seeds it has: the numbers, and the tables that show them."""

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from codistill import distributed, files
from codistill.grading import Grader
from codistill.output.evaluation_files import read_seed, seed_file, write_json
from codistill.voting import group, majority_at_k, pass_at_k, sizes

if TYPE_CHECKING:
    from codistill.config.evaluation import EvalOptions
    from codistill.evaluation_run import Model

Cells = list[list[str]]
"""Rows of texts, the first of them the names of the columns."""


def summarize(
    options: "EvalOptions", models: "list[Model]", settings: dict[str, Any], grader: Grader
) -> dict[str, Any]:
    """The content of results.json.

    Returns: settings; seeds; processes; models: for each label path, fingerprints, sets (numbers of
        each set, as `numbers_of_set` has them) and average (`spread` of the mean over sets).
    """
    results: dict[str, Any] = {}
    for model in models:
        sets = {}
        for name in options.sets:
            paths = [
                seed_file(options.output, model.folder, name, seed) for seed in range(options.seeds)
            ]
            sets[name] = numbers_of_set([read_seed(path) for path in paths], grader)
        seeds = zip(*(numbers["accuracy"]["seeds"] for numbers in sets.values()), strict=True)
        results[model.label] = {
            "path": model.path,
            "fingerprints": model.prints,
            "rows": f"rows/{model.folder}",
            "sets": sets,
            "average": spread([statistics.fmean(accuracies) for accuracies in seeds]),
        }
    return {
        "settings": settings,
        "seeds": list(range(options.seeds)),
        "processes": distributed.world_size(),
        "models": results,
    }


def numbers_of_set(seeds: list[pa.Table], grader: Grader) -> dict[str, Any]:
    """The numbers of a model on a set.

    seeds: the rows of each seed, all of the same problems in the same order.

    Returns: problems: their number; accuracy: `spread` over seeds; pass@k and majority@k: a share
        for each k; mean_tokens and truncated (share): over all completions; grading_failures and
        grading_timeouts: how many of all completions.
    """
    columns = {name: [seed[name].to_pylist() for seed in seeds] for name in seeds[0].column_names}
    correct = np.array(columns["correct"]).T  # [P, seeds]
    texts, answers = (list(zip(*columns[name], strict=True)) for name in ("completion", "answer"))
    groups = group(grader, texts, answers)
    ks = sizes(len(seeds))
    metadata = [seed.schema.metadata for seed in seeds]
    return {
        "problems": len(correct),
        "accuracy": spread(correct.mean(axis=0).tolist()),
        "pass@k": {str(k): pass_at_k(correct, k) for k in ks},
        "maj@k": {str(k): majority_at_k(groups, correct, k) for k in ks},
        "mean_tokens": float(np.mean(columns["tokens"])),
        "truncated": float(np.mean(columns["truncated"])),
        "grading_failures": sum(int(counts[b"failures"]) for counts in metadata),
        "grading_timeouts": sum(int(counts[b"timeouts"]) for counts in metadata),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (divided by their number less one) of one value per seed;
    the deviation is None where there is one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "seeds": values}


def accuracy_cells(results: dict[str, Any]) -> Cells:
    """Models by sets as in the paper's Tables 1 and 2: accuracy in percent, mean ± deviation, and
    how far the average is above that of the first model."""
    models = results["models"]
    names = list(next(iter(models.values()))["sets"])
    first = next(iter(models.values()))["average"]["mean"]
    cells = [["Model", *names, "Average"]]
    for label, numbers in models.items():
        average = numbers["average"]
        change = f" ({100 * (average['mean'] - first):+.2f})" if len(cells) > 1 else ""
        row = [percent(numbers["sets"][name]["accuracy"]) for name in names]
        cells.append([label, *row, percent(average) + change])
    return cells


def percent(value: dict[str, Any]) -> str:
    deviation = "" if value["std"] is None else f" ± {100 * value['std']:.2f}"
    return f"{100 * value['mean']:.2f}{deviation}"


def best_rows(results: dict[str, Any]) -> list[set[int]]:
    """For each column of `accuracy_cells` the rows with the highest mean, to two decimals; none
    where there is only one model."""
    rows = [
        [*(found["accuracy"] for found in numbers["sets"].values()), numbers["average"]]
        for numbers in results["models"].values()
    ]
    best: list[set[int]] = [set()]
    for column in zip(*rows, strict=True):
        means = [round(100 * value["mean"], 2) for value in column]
        top = max(means) if len(means) > 1 else math.inf
        best.append({number for number, mean in enumerate(means, start=1) if mean == top})
    return best


def detail_cells(results: dict[str, Any], label: str) -> Cells:
    """Sets by what else is known of a model: pass@k and maj@k in percent, lengths, and how many
    completions could not be graded."""
    sets = results["models"][label]["sets"]
    ks = [k for k in map(str, sizes(len(results["seeds"]))) if k != "1"]
    names = ("problems", *(f"{kind}@{k}" for kind in ("pass", "maj") for k in ks))
    rows: dict[str, list[str]] = {name: [] for name in names}
    for found in sets.values():
        rows["problems"].append(str(found["problems"]))
        for kind in ("pass@", "maj@"):
            for k in ks:
                rows[kind + k].append(f"{100 * found[f'{kind}k'][k]:.2f}")
        rows.setdefault("mean tokens", []).append(f"{found['mean_tokens']:.1f}")
        rows.setdefault("truncated", []).append(f"{found['truncated']:.2%}")
        for outcome in ("failures", "timeouts"):
            rows.setdefault(f"grading {outcome}", []).append(str(found[f"grading_{outcome}"]))
    return [[label, *sets], *([name, *texts] for name, texts in rows.items())]


def write_tables(results: dict[str, Any], folder: Path, console: Console) -> None:
    """Write results.json and table.md, and print the tables."""
    write_json(folder / "results.json", results)
    accuracy, best, note = accuracy_cells(results), best_rows(results), footnote(results)
    details = [detail_cells(results, label) for label in results["models"]]
    texts = [markdown(accuracy, best), note, *map(markdown, details)]
    files.write_text(folder / "table.md", "\n".join(texts))
    console.print(terminal(accuracy, best))
    console.print(note, highlight=False)
    for cells in details:
        console.print(terminal(cells))
    for name, content in (
        ("table.md", "these tables"),
        ("results.json", "all numbers, and what they depend on"),
        ("rows", "the completions of each seed (parquet)"),
    ):
        console.print(f"  {folder / name}  {content}", soft_wrap=True, highlight=False)


def footnote(results: dict[str, Any]) -> str:
    """What the numbers of the first table are, in a sentence."""
    settings, seeds = results["settings"], len(results["seeds"])
    what = "mean ± sample standard deviation over" if seeds > 1 else "of"
    return (
        f"Accuracy in percent, {what} {seeds} seed{'s' * (seeds > 1)}; temperature "
        f"{settings['temperature']:g}, at most {settings['max_tokens']} tokens, template "
        f"{settings['template']!r}, engine {settings['engine']} in {settings['dtype']}.\n"
    )


def markdown(cells: Cells, best: list[set[int]] | None = None) -> str:
    """A table in Markdown. best: for each column the rows that are bold."""
    names, *rows = (
        [
            f"**{text}**" if best and number in best[column] else text.replace("|", r"\|")
            for column, text in enumerate(row)
        ]
        for number, row in enumerate(cells)
    )
    rule = ["---", *["---:"] * (len(names) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (names, rule, *rows))


def terminal(cells: Cells, best: list[set[int]] | None = None) -> Table:
    """The same table for a terminal."""
    names, *rows = cells
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column, name in enumerate(names):
        table.add_column(Text(name), justify="left" if column == 0 else "right")
    for number, row in enumerate(rows, start=1):
        texts = (
            Text(text, style="bold" if best and number in best[column] else "")
            for column, text in enumerate(row)
        )
        table.add_row(*texts)
    return table
