"""The study's tables, in Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

from codistill.output.evaluation_table import (
    accuracy_cells,
    best_rows,
    markdown,
    percent,
    spread,
)
from study.methods import ABLATIONS, CONTINUED, LOW_CONTINUED, MAIN, METHODS, SWEEP, Method
from study.record import KD_STD, Record
from study.results import (
    Measure,
    Results,
    accuracy_fall,
    before,
    early,
    final,
    late,
    median,
    metric_fall,
    total,
    whole,
)

NONE = "–"
REFERENCE = METHODS["codistill_alpha1"]
"""What every ablation and every alpha differs from in one point."""
PHASES = {
    "rollout": "time/rollout",
    "score": "time/score",
    "update small": "time/update_small",
    "update large": "time/update_large",
    "step": "time/step",
}


def small_methods() -> list[Method]:
    """Rows of Table 1."""
    return [method for method in MAIN if method.name != "grpo_large"]


def large_methods() -> list[Method]:
    """Rows of Table 2: each method, and after it its continued training."""
    learning = [method for method in MAIN if method.name not in ("grpo_small", "kdrl")]
    continued = [*CONTINUED, *LOW_CONTINUED]
    return [
        row
        for method in learning
        for row in (method, *(after for after in continued if after.start == method.name))
    ]


def alphas() -> dict[float, Method]:
    """CoDistill-GRPO with nothing changed but alpha, by alpha."""
    found = {
        float(method.options["kd.alpha"]): method
        for method in METHODS.values()
        if method.options.keys() == {"kd.alpha"}
    }
    return dict(sorted(found.items()))


def accuracy(results: Results, model: str, methods: list[Method]) -> str:
    """Table 1 or 2: held-out accuracy after the last step for each set, and the mean over the sets
    with the gain over the model before the first step."""
    rows = {}
    for method in methods:
        found = row_of(results, method, model, final)
        if found:
            rows[f"{method.title} (n = {len(found['average']['seeds'])})"] = found
    starts = [m for m in methods if not m.start and results.values(m.name, before(model))]
    if not rows or not starts:
        return "No run has finished."
    first = max(starts, key=lambda method: len(results.finished(method.name)))
    base = row_of(results, first, model, before)
    content = {"models": {f"{model} model before training": base} | rows}
    return markdown(accuracy_cells(content), best_rows(content))


def row_of(
    results: Results, method: Method, model: str, measure: Callable[[str], Measure]
) -> dict[str, Any]:
    """Accuracies over seeds, as `accuracy_cells` takes a row; empty if there are none."""
    average = results.values(method.name, measure(model))
    if not average:
        return {}
    sets: dict[str, Any] = {}
    for name in results.sets(model):
        values = results.values(method.name, measure(f"{model}/{name}"))
        sets[name] = {"accuracy": spread(list(values.values()))}
    return {"sets": sets, "average": spread(list(average.values()))}


def alpha(results: Results) -> str:
    """Both models over alpha."""
    columns: dict[str, tuple[Measure, str]] = {
        "small": (final("small"), "%"),
        "large": (final("large"), "%"),
        "training accuracy, last quarter": (late("reward/accuracy"), "%"),
        "KD reward, last quarter": (late("reward/kd"), ".4f"),
        "ess of the large model": (whole("ratio/large_ess"), "%"),
    }
    results = results.beside(SWEEP)
    return measures(results, {f"{a:g}": method for a, method in alphas().items()}, "α", columns)


def ablations(results: Results) -> str:
    """What every ablation reaches, and how far it falls on the way."""
    columns: dict[str, tuple[Measure, str]] = {
        "small": (final("small"), "%"),
        "large": (final("large"), "%"),
        "largest fall, large": (accuracy_fall("large"), "%"),
        "training accuracy, last quarter": (late("reward/accuracy"), "%"),
        "largest fall, training": (metric_fall("reward/accuracy"), "%"),
    }
    methods = {method.title: method for method in [REFERENCE, METHODS["codistill_alpha0"]]}
    methods |= {method.title: method for method in ABLATIONS}
    return measures(results.beside(ABLATIONS), methods, "", columns)


def time(results: Results) -> str:
    """Seconds per step by phase, and minutes of a run with all the runs that it needs."""
    columns: dict[str, tuple[Measure, str]] = {
        name: (median(key), ".3f") for name, key in PHASES.items()
    }
    columns["rollouts, min"] = minutes("time/rollout"), ".2f"
    columns["steps, min"] = minutes("time/step"), ".2f"
    named = {titled(method): method for method in METHODS.values()}
    return measures(results, named, "", columns)


def minutes(key: str) -> Measure:
    """`total`, in minutes."""
    seconds = total(key)
    return lambda chain: (seconds(chain) or 0.0) / 60


def kd_reward(results: Results) -> str:
    """The KD reward's mean, and its standard deviation within the rollouts of a prompt."""
    columns: dict[str, tuple[Measure, str]] = {
        "mean, first half": (early("reward/kd"), ".4f"),
        "mean, last quarter": (late("reward/kd"), ".4f"),
        "std within prompts, first half": (early(KD_STD), ".4f"),
        "std within prompts, last quarter": (late(KD_STD), ".4f"),
        "tokens per completion": (whole("rollout/mean_tokens"), ".1f"),
    }
    named = {titled(m): m for m in METHODS.values() if results.values(m.name, whole("reward/kd"))}
    return measures(results, named, "", columns)


def measures(
    results: Results,
    methods: dict[str, Method],
    corner: str,
    columns: dict[str, tuple[Measure, str]],
) -> str:
    """A row for each method with a finished run: mean ± standard deviation over seeds of each
    measure, in percent or as the format says, and the number of seeds."""
    cells = [[corner, *columns, "n"]]
    for title, method in methods.items():
        found = [results.values(method.name, measure) for measure, _ in columns.values()]
        if any(found):
            styles = [style for _, style in columns.values()]
            texts = [cell(values.values(), s) for values, s in zip(found, styles, strict=True)]
            cells.append([title, *texts, str(max(map(len, found)))])
    return markdown(cells) if len(cells) > 1 else "No run has finished."


def cell(values: Iterable[float], style: str) -> str:
    """Mean ± standard deviation. style: "%" for a share, or the format of each number."""
    values = list(values)
    if not values:
        return NONE
    numbers = spread(values)
    if style == "%":
        return percent(numbers)
    deviation = "" if numbers["std"] is None else f" ± {numbers['std']:{style}}"
    return f"{numbers['mean']:{style}}{deviation}"


def titled(method: Method) -> str:
    """The title, with the model where GRPO's would not tell."""
    model = METHODS[method.start or method.name].options.get("grpo.model")
    return f"{method.title} ({model})" if model else method.title


# --- all runs ----------------------------------------------------------------------------------


def runs(results: Results) -> str:
    """Every start of every run, and what became of it."""
    names = ["started", "finished", "failed", "killed or running", "steps", "first", "last"]
    cells = [["", *names, "commits"]]
    for name, records in results.records.items():
        method = METHODS.get(name)
        title = titled(method) if method else f"{name} (no longer a method)"
        cells.append([title, *run_cells(list(records.values()))])
    everything = [record for runs in results.records.values() for record in runs.values()]
    if not everything:
        return "No run was started."
    return markdown([*cells, ["all", *run_cells(everything)]])


def run_cells(records: list[Record]) -> list[str]:
    """Counts, lengths, dates and commits of some runs."""
    starts = [start for record in records for start in record.starts]
    ends = [start.get("status") for start in starts]
    steps = {record.steps for record in records if record.steps}
    dates = sorted(start["at"][:10] for start in starts)
    commits = sorted({record.versions.get("commit", "") for record in records} - {""})
    return [
        str(len(starts)),
        str(ends.count("finished")),
        str(sum(end not in (None, "finished") for end in ends)),
        str(ends.count(None)),
        ", ".join(map(str, sorted(steps))) or NONE,
        dates[0] if dates else NONE,
        dates[-1] if dates else NONE,
        ", ".join(commits) or NONE,
    ]


def versions(results: Results) -> str:
    """Every version that a run was made with, by package."""
    found: dict[str, set[str]] = {}
    for records in results.records.values():
        for record in records.values():
            for package, version in record.versions.items():
                if package != "commit":
                    found.setdefault(package, set()).add(version)
    return ", ".join(f"{package} {' and '.join(sorted(v))}" for package, v in sorted(found.items()))
