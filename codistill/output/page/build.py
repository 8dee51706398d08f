"""Fill the template of the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from codistill import files
from codistill.output.page import figures
from codistill.output.page.rollouts import STEPS, colour_limit, read_rollouts
from codistill.output.page.runs import MODELS, Group, Run, differences, group_runs, shown_value

FOLDER = Path(__file__).parent


def write_page(path: Path, runs: Sequence[Run], *, rollouts: int) -> list[str]:
    """Write the page about these runs, with at most so many rollouts of each; one line for each
    file of theirs that could not be read.

    The page is one file: figures, rollouts, style and scripts, plotly.js among them, are in it.
    """
    groups = group_runs(runs)
    embedded, notices = [], [line for run in runs for line in run.notices]
    for run in runs:
        found, lines = read_rollouts(run, rollouts)
        embedded += found
        notices += lines
    sections = figures.draw(groups)
    data = {
        "figures": [drawn.json() for section in sections.values() for drawn in section],
        "rollouts": embedded,
        "limit": colour_limit(embedded),
    }
    text = (
        environment()
        .get_template("page.html.jinja")
        .render(
            title=" / ".join(group.label for group in groups),
            groups=[(group, colour(groups, group), facts(group)) for group in groups],
            models=MODELS,
            sections=sections,
            legend=figures.legend(groups),
            is_comparison=len(groups) > 1,
            has_seeds=any(len(group.runs) > 1 for group in groups),
            differences=list(differences(groups)),
            settings={run.name: shown_settings(run) for run in runs if run.settings},
            notices=notices,
            data=data,
            per_run=rollouts,
            newest=STEPS,
            style=FOLDER.joinpath("page.css").read_text(encoding="utf-8"),
            script=FOLDER.joinpath("page.js").read_text(encoding="utf-8"),
            plotly=get_plotlyjs(),
        )
    )
    files.write_text(path, text)
    return notices


def environment() -> jinja2.Environment:
    """Every value is escaped that a template does not call safe."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def colour(groups: Sequence[Group], group: Group) -> str:
    """The colour of a group where several are compared; nothing for one alone."""
    return figures.legend(groups)[group.label] if len(groups) > 1 else ""


def shown_settings(run: Run) -> dict[str, str]:
    return {key: shown_value(value) for key, value in run.settings.items()}


def facts(group: Group) -> dict[str, Any]:
    """The numbers at the top of the page: means over the seeds of a group."""
    first = group.runs[0]
    steps = [run.steps for run in group.runs]
    done = [run.is_finished for run in group.runs]
    seconds = mean([run.summary["seconds"] for run in group.runs])
    rollouts = mean([figures.cumulative(run)[1][-1:].sum() for run in group.runs])
    return {
        "algorithm": first.settings.get("algorithm", "algorithm unknown"),
        "state": "finished" if all(done) else "not finished",
        "steps": " / ".join(str(step) for step in sorted(set(steps))),
        "models": {name: accuracy(group, name) for name in MODELS if accuracy(group, name)},
        "time": duration(seconds),
        "rollout_share": rollouts / seconds if seconds else 0.0,
        "seeds": ", ".join(str(run.settings.get("seed", "?")) for run in group.runs),
    }


def accuracy(group: Group, model: str) -> dict[str, float]:
    """Held-out accuracy before and after, and the lowest and highest after; nothing if a seed has
    no such numbers."""
    if not all(model in run.summary for run in group.runs):
        return {}
    before = [run.summary[model]["before"] for run in group.runs]
    after = [run.summary[model]["after"] for run in group.runs]
    return {
        "before": mean(before),
        "after": mean(after),
        "change": 100 * (mean(after) - mean(before)),
        "lowest": min(after),
        "highest": max(after),
    }


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def duration(seconds: float) -> str:
    """Seconds as a reader takes them in: 48 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
