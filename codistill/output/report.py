"""Curves and summary of a run, from its files."""

from pathlib import Path
from typing import Any

from codistill.output.run_directory import read_rows

EVALUATIONS_AVERAGED = 3


def summarize(folder: Path, *, problems: int) -> dict[str, Any]:
    """Accuracy before and after of each model that learned, and what the run cost.

    After: mean of the last evaluations, up to EVALUATIONS_AVERAGED of them.
    """
    metrics = read_rows(folder / "metrics.jsonl")
    evaluations = read_rows(folder / "evaluations.jsonl")
    summary: dict[str, Any] = {
        "steps": metrics[-1]["step"],
        "problems": problems,
        "seconds": sum(row["time/step"] for row in metrics),
    }
    for name in ("small", "large"):
        accuracy = [row[name] for row in evaluations if name in row]
        if len(accuracy) > 1:
            last = accuracy[1:][-EVALUATIONS_AVERAGED:]
            summary[name] = {"before": accuracy[0], "after": sum(last) / len(last)}
    return summary


def plot(folder: Path) -> Path:
    """Draw curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_rows(folder / "metrics.jsonl")
    evaluations = read_rows(folder / "evaluations.jsonl")
    steps = [row["step"] for row in metrics]
    panels = {
        "accuracy": {
            "training": "reward/accuracy",
            "prompts with none right": "reward/zero_fraction",
        },
        "KD reward (nats, alpha included)": {"small": "reward/kd"},
        "importance ratio": {
            "clipped tokens, small": "ratio/small_clip_fraction",
            "clipped tokens, large": "ratio/large_clip_fraction",
            "effective sample size, large": "ratio/large_ess",
        },
        "gradient norm": {"small": "grad_norm/small", "large": "grad_norm/large"},
        "completion length (tokens)": {"mean": "rollout/mean_tokens"},
        "time of a step (s)": {
            name: f"time/{name}"
            for name in ("rollout", "score", "update_small", "update_large", "sync")
        },
    }
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        for label, key in lines.items():
            if key in metrics[0]:  # not all algorithms have all numbers
                axis.plot(steps, [row[key] for row in metrics], label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    for name in ("small", "large"):
        points = [(row["step"], row[name]) for row in evaluations if name in row]
        if points:
            axes.flat[0].plot(*zip(*points, strict=True), "o-", label=f"held-out, {name}")
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=8)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
