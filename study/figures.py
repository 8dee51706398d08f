"""The study's figures: those of the paper at toy scale."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codistill import files
from codistill.output.curves import LARGE, SMALL, finish_panel, moving_average, show_percent
from study.methods import ABLATIONS, METHODS, SWEEP, Method
from study.results import Results, final, median
from study.statistics import FEWEST_PAIRS
from study.tables import PHASES, REFERENCE, alphas, large_methods, small_methods, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

# A method has one colour in all figures; continued training has its method's, dashed.
COLOURS = {
    "grpo_small": "C7",
    "grpo_large": "black",
    "kdrl": "C2",
    "codistill_alpha1": "C0",
    "codistill_alpha2": "C1",
    "codistill_hints": "C4",
    "codistill_alpha0": "C5",
    "no_kd_no_downsampling": "C3",
    "no_downsampling": "C8",
    "hints_always": "C4",
    "long_hints_always": "C6",
    "hints_masked": "C3",
    "hints_importance": "C2",
    "kd_k3": "C3",
    "kd_objective": "C2",
}
PHASE_COLOURS = {"rollout": "C2", "score": "C4", "update small": SMALL, "update large": LARGE}
"""The colours that curves.png gives them."""
DPI = 100

Curve = tuple[np.ndarray, np.ndarray]
"""Steps [K], and values [seeds, K]."""


@dataclass(frozen=True)
class Figure:
    """A picture of the report."""

    caption: str
    alt: str
    draw: Callable[[Results], "Drawing"]


def write(results: Results, folder: Path) -> dict[str, Figure]:
    """Draw the pictures that there are numbers for, as folder/NAME.png; these by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        drawing = figure.draw(results)
        path = folder / f"{name}.png"
        if any(axis.has_data() for axis in drawing.axes):
            files.write_whole(path, partial(drawing.savefig, format="png", dpi=DPI))
            written[name] = figure
        else:
            path.unlink(missing_ok=True)
        pyplot.close(drawing)
    return written


# --- curves ------------------------------------------------------------------------------------


def training(results: Results, method: str, key: str) -> Curve | None:
    """A key of metrics.jsonl over the steps that all seeds have, smoothed within each seed."""
    found = [r.metrics[key] for r in results.finished(method).values() if r.metrics.get(key)]
    if not found:
        return None
    steps = min(map(len, found))
    rows = np.array([row[:steps] for row in found], dtype=float)  # None is a gap
    return np.arange(1, steps + 1), np.array([moving_average(row) for row in rows])


def held_out(results: Results, method: str, key: str) -> Curve | None:
    """Held-out accuracy over the evaluations that all seeds have."""
    found = []
    for record in results.finished(method).values():
        rows = {row["step"]: row[key] for row in record.evaluations if key in row}
        if rows:
            found.append(rows)
    if not found:
        return None
    steps = sorted(set.intersection(*(set(rows) for rows in found)))
    return np.array(steps), np.array([[rows[step] for step in steps] for rows in found])


def draw_curve(axis: "Axes", curve: Curve | None, method: Method) -> None:
    """The mean and a band of one standard deviation; with fewer than three seeds a thin line for
    each. Continued training is dashed."""
    if curve is None:
        return
    steps, values = curve
    colour = COLOURS[method.start or method.name]
    linestyle = "--" if method.start else "-"
    label = f"{titled(method)}, n = {len(values)}"
    if len(values) < FEWEST_PAIRS:
        for number, row in enumerate(values):
            shown = label if number == 0 else None
            axis.plot(steps, row, color=colour, linewidth=1, label=shown, linestyle=linestyle)
        return
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
    axis.plot(steps, mean, color=colour, linewidth=1.8, label=label, linestyle=linestyle)
    axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)


def finish(axis: "Axes", title: str, *, share: bool = True, legend: bool = True) -> None:
    """`finish_panel`, but accuracies fill their panel: differences of methods are small."""
    low, high = axis.get_ylim()
    finish_panel(axis, title)
    axis.locator_params(axis="x", integer=True)
    if share:
        axis.set_ylim(low, high)
        show_percent(axis)
    box = axis.get_legend()
    if box and not legend:
        box.remove()


def panels(rows: int, columns: int, height: float = 4.2) -> tuple["Drawing", np.ndarray]:
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(12, height * rows), layout="constrained", squeeze=False
    )


def zero_fraction(results: Results) -> "Drawing":
    figure, axes = panels(1, 2)
    names = {
        "no right rollout: GRPO (Figure 1)": ("grpo_small", "grpo_large"),
        "no right rollout: small model (Figure 4)": ("grpo_small", "kdrl", "codistill_alpha1"),
    }
    for axis, (title, methods) in zip(axes[0], names.items(), strict=True):
        for name in methods:
            curve = training(results, name, "reward/zero_fraction")
            draw_curve(axis, curve, METHODS[name])
        finish(axis, title)
    return figure


def small_model(results: Results) -> "Drawing":
    return accuracies(results, "small", small_methods())


def large_model(results: Results) -> "Drawing":
    return accuracies(results, "large", [m for m in large_methods() if m.rate == 1])


def accuracies(results: Results, model: str, methods: list[Method]) -> "Drawing":
    """A panel for the mean over the sets and one for each set, the legend in the last place."""
    names = [model, *(f"{model}/{part}" for part in results.sets(model))]
    rows = -(-(len(names) + 1) // 3)
    figure, axes = panels(rows, 3, height=3.4)
    for axis, name in zip(axes.flat, names, strict=False):
        for method in methods:
            curve = held_out(results, method.name, name)
            draw_curve(axis, continuing(results, method, curve), method)
        finish(axis, name.partition("/")[2] or "mean over the sets", legend=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.suptitle(f"held-out accuracy, {model} model", fontsize=13, x=0.01, ha="left")
    lines = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(*lines, loc="center", frameon=False, fontsize=10)
    return figure


def continuing(results: Results, method: Method, curve: Curve | None) -> Curve | None:
    """A curve of continued training, moved to where its first run has ended."""
    if curve is None or method.start is None:
        return curve
    first = held_out(results, method.start, "large")
    return curve if first is None else (curve[0] + first[0][-1], curve[1])


# --- time --------------------------------------------------------------------------------------


def time(results: Results) -> "Drawing":
    figure, axes = panels(1, 2)
    draw_phases(axes[0, 0], results)
    draw_rollout_time(axes[0, 1], results)
    return figure


def draw_phases(axis: "Axes", results: Results) -> None:
    """Stacked bars: seconds per step of each phase, the median over steps, the mean over seeds."""
    methods = [METHODS[name] for name in ("grpo_large", "no_downsampling", REFERENCE.name)]
    methods = [method for method in methods if results.finished(method.name)]
    left = np.zeros(len(methods))
    for phase, colour in PHASE_COLOURS.items():
        values = [results.values(m.name, median(PHASES[phase])).values() for m in methods]
        widths = np.array([np.mean(list(v)) if v else 0.0 for v in values])
        axis.barh(range(len(methods)), widths, left=left, color=colour, label=phase, height=0.6)
        left = left + widths
    for place, (method, seconds) in enumerate(zip(methods, left, strict=True)):
        count = len(results.finished(method.name))
        axis.text(seconds, place, f" {seconds:.2f} s, n = {count}", va="center", fontsize=9)
    axis.set_yticks(range(len(methods)), [titled(m).replace(", ", ",\n") for m in methods])
    axis.invert_yaxis()
    ends = axis.get_ylim()
    finish_panel(axis, "time per step by phase (Figure 5)")
    axis.set_ylim(*ends)
    axis.set_xlim(0, 1.3 * max(left, default=1.0))
    axis.set_xlabel("s")
    if methods:
        axis.legend(
            fontsize=9, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12)
        )


def draw_rollout_time(axis: "Axes", results: Results) -> None:
    """Minutes of rollouts since the first step; continued training goes on where its run ended."""
    for name in ("grpo_large", "codistill_alpha1", "codistill_hints"):
        curve = rollout_minutes(results, name)
        draw_curve(axis, curve, METHODS[name])
        longer = rollout_minutes(results, f"{name}_ct")
        if curve is not None and longer is not None and name != "grpo_large":
            after = longer[0] >= curve[0][-1]
            part = longer[0][after], longer[1][:, after]
            draw_curve(axis, part, METHODS[f"{name}_ct"])
    finish(axis, "rollout time since the first step, min (Figure 6)", share=False)


def rollout_minutes(results: Results, method: str) -> Curve | None:
    """Sums of time/rollout over the steps of a run and of those that it needs."""
    chains = [results.chain(method, seed) for seed in results.finished(method)]
    rows = [sum((r.metrics.get("time/rollout", []) for r in chain), []) for chain in chains]
    rows = [row for row in rows if row]
    if not rows:
        return None
    steps = min(map(len, rows))
    return np.arange(1, steps + 1), np.cumsum([row[:steps] for row in rows], axis=1) / 60


# --- ablations and alpha -----------------------------------------------------------------------


def ablations(results: Results) -> "Drawing":
    results = results.beside(ABLATIONS)
    figure, axes = panels(2, 2)
    reference = REFERENCE.name
    parts = {
        "large model, held-out accuracy (Figure 7)": (
            held_out,
            "large",
            (reference, "codistill_alpha0", "no_downsampling", "no_kd_no_downsampling"),
        ),
        "training accuracy, hints (Figure 8)": (
            training,
            "reward/accuracy",
            (reference, "hints_always", "long_hints_always"),
        ),
        "training accuracy, hints in the loss (Figure 8)": (
            training,
            "reward/accuracy",
            (reference, "hints_always", "hints_masked", "hints_importance"),
        ),
        "training accuracy, Eq. 4 for KD (Figure 9)": (
            training,
            "reward/accuracy",
            (reference, "kd_k3", "kd_objective"),
        ),
    }
    for axis, (title, (curve_of, key, names)) in zip(axes.flat, parts.items(), strict=True):
        for name in names:
            draw_curve(axis, curve_of(results, name, key), METHODS[name])
        finish(axis, title)
    return figure


def alpha(results: Results) -> "Drawing":
    """Accuracy after the last step over alpha, beside GRPO's."""
    results = results.beside(SWEEP)
    figure, axes = panels(1, 2, height=3.8)
    methods = alphas()
    for axis, model, colour in zip(axes[0], ("small", "large"), (SMALL, LARGE), strict=True):
        found = {a: list(results.values(m.name, final(model)).values()) for a, m in methods.items()}
        found = {a: values for a, values in found.items() if values}
        places = range(len(found))
        for place, values in zip(places, found.values(), strict=True):
            axis.plot([place] * len(values), values, "o", color=colour, alpha=0.35, markersize=4)
        if found:
            means = [np.mean(values) for values in found.values()]
            axis.plot(places, means, "-", color=colour, label="mean of the seeds (points)")
        ticks = [f"α = {a:g}\nn = {len(values)}" for a, values in found.items()]
        draw_level(axis, results.values(f"grpo_{model}", final(model)).values())
        finish(axis, f"{model} model, held-out accuracy")
        axis.set_xticks(places, ticks)
        axis.set_xlabel("")
    return figure


def draw_level(axis: "Axes", values: Iterable[float]) -> None:
    """GRPO's mean and its band, over the whole width."""
    values = list(values)
    if not values:
        return
    mean = float(np.mean(values))
    axis.axhline(mean, color="C7", linestyle="--", label=f"GRPO, n = {len(values)}")
    if len(values) >= FEWEST_PAIRS:
        deviation = float(np.std(values, ddof=1))
        axis.axhspan(mean - deviation, mean + deviation, color="C7", alpha=0.15, lw=0)


FIGURES = {
    "zero_fraction": Figure(
        "Prompts of a step none of whose rollouts is right (Figures 1 and 4). GRPO writes 8 "
        "rollouts per prompt, KDRL and CoDistill-GRPO 14, so that their curves begin lower "
        "before anything is learned.",
        "Two panels of curves over training steps: the share of prompts without a right rollout "
        "for GRPO of both models, and for GRPO, KDRL and CoDistill-GRPO of the small model.",
        zero_fraction,
    ),
    "small": Figure(
        "Held-out accuracy of the small model over steps (Figures 3 and 14).",
        "Curves of the small model's held-out accuracy over training steps, one panel for the "
        "mean and one for each held-out set, one curve for each method.",
        small_model,
    ),
    "large": Figure(
        "Held-out accuracy of the large model over steps (Figures 10 to 13); continued training "
        "is dashed.",
        "Curves of the large model's held-out accuracy over training steps, one panel for the "
        "mean and one for each held-out set, one curve for each method; continued training "
        "follows as a dashed curve.",
        large_model,
    ),
    "time": Figure(
        "Time per step by phase (Figure 5), and rollout time summed over the steps (Figure 6); "
        "continued training is dashed. CoDistill-GRPO without down-sampling writes 8 rollouts "
        "per prompt, as GRPO does, and 14 with it.",
        "Left, bars of the seconds per step that rollouts, scoring and updates take for GRPO of "
        "the large model and for CoDistill-GRPO; right, curves of the summed rollout time.",
        time,
    ),
    "ablations": Figure(
        "Changes that the paper found unstable (Figures 7, 8 and 9).",
        "Four panels of curves over steps: the large model's held-out accuracy without KD and "
        "down-sampling, and training accuracy with hints in all epochs, with hints outside the "
        "loss, and with the estimate of Eq. 4.",
        ablations,
    ),
    "alpha": Figure(
        "Held-out accuracy of both models after the last step over α; GRPO of the same model is "
        "dashed, its band one standard deviation.",
        "Two panels, the small and the large model: held-out accuracy over the weight alpha of "
        "the KD reward, points for seeds, a line through the means, GRPO's level dashed.",
        alpha,
    ),
}
