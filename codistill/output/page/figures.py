"""The figures of the page: plotly's figure objects, from the numbers of groups of runs.

One group is drawn in a colour per model. Several have a colour per group, and the large model's
curve is dashed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from codistill.output.curves import moving_average
from codistill.output.page.runs import (
    MODELS,
    Group,
    Points,
    Run,
    at_common_steps,
    evaluation_sets,
    points,
)

# Seven colours that differ for colour-blind readers as well, with a contrast of 3 or more both to
# a white and to a nearly black page.
BLUE, VERMILION, GREEN = "#3b82c4", "#e0652b", "#1f9e77"
COLOURS = (BLUE, VERMILION, GREEN, "#9d6cc9", "#b98600", "#d3619f", "#7a8794")
MODEL_COLOURS = {"small": BLUE, "large": VERMILION, "rollouts": GREEN}
PHASES = {
    "rollout": "time/rollout",
    "score": "time/score",
    "update small": "time/update_small",
    "update large": "time/update_large",
    "sync": "time/sync",
}
MOST_POINTS = 2000
"""A curve of more steps is drawn through every k-th; about the pixels of a wide panel."""


class Panel(NamedTuple):
    """One figure: numbers of each step, a curve per model."""

    title: str
    keys: dict[str, str]
    """Model, or "rollouts" for what is of no model, -> key of metrics.jsonl."""
    unit: str = ""
    is_share: bool = False
    from_zero: bool = True
    note: str = ""


def by_model(key: str) -> dict[str, str]:
    """{"small": key of the small model, "large": key of the large one}"""
    return {model: key.format(model) for model in MODELS}


def panel_of_rollouts(title: str, key: str, **options: Any) -> Panel:
    return Panel(title, {"rollouts": key}, **options)


SECTIONS = {
    "Accuracy": [
        panel_of_rollouts(
            "Training accuracy", "reward/accuracy", is_share=True, note="of all rollouts of a step"
        ),
        panel_of_rollouts("Prompts without a right rollout", "reward/zero_fraction", is_share=True),
    ],
    "Importance ratio": [
        Panel("Mean importance ratio", by_model("ratio/{}_mean"), from_zero=False),
        Panel("Clipped tokens", by_model("ratio/{}_clip_fraction"), is_share=True),
        Panel("Effective sample size", by_model("ratio/{}_ess"), is_share=True),
    ],
    "Updates": [
        panel_of_rollouts(
            "KD reward", "reward/kd", unit="nats", from_zero=False, note="alpha included"
        ),
        Panel("Gradient norm", by_model("grad_norm/{}")),
        Panel("Loss", by_model("loss/{}"), from_zero=False),
    ],
    "Rollouts": [
        panel_of_rollouts("Completion length", "rollout/mean_tokens", unit="tokens"),
        panel_of_rollouts("Truncated rollouts", "rollout/truncated_fraction", is_share=True),
        panel_of_rollouts(
            "Gap between engine and trainer",
            "rollout/logp_gap_mean",
            unit="nats",
            note="mean of all tokens",
        ),
    ],
}


@dataclass(frozen=True)
class Drawn:
    """A figure of the page, with the text around it."""

    title: str
    note: str
    figure: go.Figure

    def json(self) -> dict[str, Any]:
        """What plotly.js takes."""
        return json.loads(self.figure.to_json())


def draw(groups: Sequence[Group]) -> dict[str, list[Drawn]]:
    """All figures that there are numbers for, by section."""
    sections = {name: [draw_panel(p, groups) for p in panels] for name, panels in SECTIONS.items()}
    sections["Accuracy"] = [*held_out(groups), *sections["Accuracy"]]
    sections["Time"] = [phases(groups), step_time(groups), rollout_time(groups)]
    drawn = {name: [d for d in figures if d.figure.data] for name, figures in sections.items()}
    return {name: figures for name, figures in drawn.items() if figures}


def legend(groups: Sequence[Group]) -> dict[str, str]:
    """What each colour stands for; the traces of a name have it as their `legendgroup`."""
    if len(groups) == 1:
        return MODEL_COLOURS
    return {g.label: COLOURS[n % len(COLOURS)] for n, g in enumerate(groups)}


def held_out(groups: Sequence[Group]) -> list[Drawn]:
    """Held-out accuracy: the mean over the sets, and each set where there are several."""
    runs = [run for group in groups for run in group.runs]
    names = evaluation_sets(runs)
    titles = {"Held-out accuracy": "{}"}
    titles |= {f"Held-out accuracy, {name}": f"{{}}/{name}" for name in names}
    drawn = []
    for title, key in titles.items():
        figure = empty_figure(is_share=True)
        for model in MODELS:
            for group in groups:
                curves = [points(run.evaluations, key.format(model)) for run in group.runs]
                add_curves(figure, curves, style(groups, group, model), is_smoothed=False)
        note = "mean over the sets" if names and key == "{}" else ""
        drawn.append(Drawn(title, note, figure))
    return drawn


def draw_panel(panel: Panel, groups: Sequence[Group]) -> Drawn:
    """The curves of a panel for each group."""
    figure = empty_figure(is_share=panel.is_share, unit=panel.unit, from_zero=panel.from_zero)
    for model, key in panel.keys.items():
        for group in groups:
            curves = [points(run.metrics, key) for run in group.runs]
            add_curves(figure, curves, style(groups, group, model))
    return Drawn(panel.title, panel.note, figure)


def step_time(groups: Sequence[Group]) -> Drawn:
    return draw_panel(panel_of_rollouts("Time of a step", "time/step", unit="s"), groups)


def rollout_time(groups: Sequence[Group]) -> Drawn:
    """Figure 6: the time that all rollouts so far have taken."""
    curves = {group.label: [cumulative(run) for run in group.runs] for group in groups}
    longest = max((c[1].max(initial=0) for runs in curves.values() for c in runs), default=0)
    unit, seconds = ("h", 3600) if longest > 2 * 3600 else ("min", 60)
    figure = empty_figure(unit=unit)
    for group in groups:
        scaled = [(steps, values / seconds) for steps, values in curves[group.label]]
        add_curves(figure, scaled, style(groups, group, "rollouts"), is_smoothed=False)
    return Drawn("Rollout time, cumulative", "as in Figure 6 of the paper", figure)


def cumulative(run: Run) -> Points:
    steps, values = points(run.metrics, "time/rollout")
    return steps, values.cumsum()


def phases(groups: Sequence[Group]) -> Drawn:
    """Figure 5: mean seconds of each phase of a step, one bar per group."""
    figure = empty_figure(unit="s")
    means = {
        name: [np.mean([mean_of(run, key) for run in group.runs]) for group in groups]
        for name, key in PHASES.items()
    }
    for (name, values), colour in zip(means.items(), COLOURS, strict=False):
        if any(values):
            labels = [group.label for group in groups]
            bar = go.Bar(y=labels, x=values, name=name, orientation="h", marker_color=colour)
            bar.width = 0.3 if len(groups) == 1 else 0.6
            bar.update(hovertemplate="%{x:.3g} s", marker_line_width=0)
            figure.add_trace(bar)
    layout = dict(barmode="stack", showlegend=True, hovermode="closest")
    below = dict(orientation="h", y=-0.3, yanchor="top", x=0, traceorder="normal")
    figure.update_layout(**layout, legend=below, margin_b=96)
    figure.update_xaxes(title_text="s per step", rangemode="tozero")
    from_the_top = [len(groups) - 0.5, -0.5]
    figure.update_yaxes(title_text="", range=from_the_top, showticklabels=len(groups) > 1)
    return Drawn("Time of a step by phase", "mean over all steps", figure)


def mean_of(run: Run, key: str) -> float:
    values = points(run.metrics, key)[1]
    return float(values.mean()) if len(values) else 0.0


class Style(NamedTuple):
    """How a curve is drawn, and what it is called where the mouse points at it."""

    name: str
    legend: str
    colour: str
    dash: str


def style(groups: Sequence[Group], group: Group, model: str) -> Style:
    """The style of a model's curve, of one of these groups."""
    if len(groups) == 1:
        return Style(model, model, MODEL_COLOURS[model], "solid")
    name = group.label if model == "rollouts" else f"{group.label}, {model}"
    dash = "dash" if model == "large" else "solid"
    return Style(name, group.label, legend(groups)[group.label], dash)


def add_curves(
    figure: go.Figure, curves: Sequence[Points], style: Style, *, is_smoothed: bool = True
) -> None:
    """Add the curve of one run; of several, their mean and a band from the lowest to the highest.

    Curves are smoothed, with the numbers themselves faintly behind the curve of a single run.
    is_smoothed: False for numbers that are few, which get markers, or have no noise.
    """
    steps, values = at_common_steps(curves)
    if not len(steps):
        return
    kept = slice(None, None, 1 + len(steps) // MOST_POINTS)
    line = dict(color=style.colour, width=2, dash=style.dash)
    options = dict(legendgroup=style.legend, hoverinfo="skip", mode="lines")
    raw = values
    if is_smoothed:
        values = np.stack([moving_average(list(numbers)) for numbers in raw])
    if len(curves) > 1:
        low, high = values.min(axis=0)[kept], values.max(axis=0)[kept]
        invisible = dict(line_width=0, **options)
        figure.add_trace(scatter(steps[kept], high, **invisible))
        shade = f"rgba({', '.join(str(int(style.colour[n : n + 2], 16)) for n in (1, 3, 5))}, 0.2)"
        figure.add_trace(scatter(steps[kept], low, fill="tonexty", fillcolor=shade, **invisible))
    elif is_smoothed:
        faint = line | dict(width=1, dash="solid")
        figure.add_trace(scatter(steps[kept], raw[0][kept], line=faint, opacity=0.3, **options))
    mode = "lines+markers" if len(steps) <= 60 and not is_smoothed else "lines"
    shown = dict(legendgroup=style.legend, name=style.name, mode=mode, line=line)
    figure.add_trace(scatter(steps[kept], values.mean(axis=0)[kept], marker_size=5, **shown))


def scatter(steps: np.ndarray, values: np.ndarray, **options: Any) -> go.Scatter:
    """A trace in single precision, which is half the page."""
    return go.Scatter(x=steps.astype(np.int32), y=values.astype(np.float32), **options)


def empty_figure(*, unit: str = "", is_share: bool = False, from_zero: bool = True) -> go.Figure:
    """Axes without a curve. The page's style has the colours that depend on light and dark."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        font_family='system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif',
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar_bgcolor="rgba(0,0,0,0)",
        height=270,
        margin=dict(l=56, r=12, t=8, b=40),
        showlegend=False,
        hovermode="x unified",
        hoverlabel_namelength=-1,
        dragmode="zoom",
    )
    figure.update_xaxes(title=dict(text="step", standoff=6), zeroline=False)
    figure.update_yaxes(
        title_text=unit,
        tickformat=".2~%" if is_share else "",
        exponentformat="power",
        hoverformat=".2%" if is_share else ".4~g",
        rangemode="tozero" if from_zero else "normal",
        zeroline=False,
        automargin=True,
    )
    return figure
