"""Plots and tables of the measurements in bench/results: `python -m bench report`.

Writes bench/results/README.md with every measurement, the plots beside it, and the tables between
the markers in the README. Nothing in them is written by hand, not even where we lose.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable

from bench import plots, roofline, step
from bench.growth import all_series, slopes_table
from bench.operations import OPERATIONS, OURS
from bench.results import FOLDER, Row, read_all, slug
from bench.sections import with_section

README = FOLDER.parents[1] / "README.md"
HEADLINE = "linear_policy_loss"
TIE = 1.03  # a smaller ratio is no win: medians of equal runs differ by as much


def groups(rows: Iterable[Row], key: Callable[[Row], object]) -> dict[object, list[Row]]:
    """Rows by their key, in the order of the first of each."""
    found: dict[object, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


# --- tables ------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """A Markdown table for one operation in one mode, with a line per implementation and a column
    per case: time, memory, share of a matmul's FLOP/s and, for ours, predicted / measured time."""
    cases = groups(rows, lambda row: row.case)
    names = list(dict.fromkeys(row.implementation for row in rows))
    header = ["", *(case_name(members[0]) for members in cases.values())]
    lines = [header, ["---"] * len(header)]
    for name in names:
        cells = [f"**{name}**" if name == OURS else name]
        for members in cases.values():
            cells.append(cell(next((r for r in members if r.implementation == name), None)))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def case_name(row: Row) -> str:
    """The model and the sizes, for a table's header."""
    sizes = " × ".join(str(size) for size in (row.tokens, row.hidden, row.vocab) if size)
    share = f", {row.inactive:.0%} inactive" if row.inactive else ""
    return f"{row.model}<br>{sizes}{share}"


def cell(row: Row | None) -> str:
    """The figures of a measurement, or why there are none."""
    if row is None:
        return "–"
    if not row.is_ok:
        return row.status.split(":")[0]
    parts = [f"{row.median_ms:.0f} ms" if row.median_ms >= 100 else f"{row.median_ms:.3g} ms"]
    if row.extra_mib is not None:
        parts.append(f"{row.extra_mib:.0f} MiB")
    if row.tflops and row.matmul_tflops:
        parts.append(f"{row.tflops / row.matmul_tflops:.0%}")
    if row.roofline_share is not None:
        parts.append(f"{row.roofline_share:.0%} of roofline")
    return ", ".join(parts)


def errors_line(rows: list[Row]) -> str:
    """The largest error of each implementation over the cases."""
    largest = {
        name: max((r.error for r in members if r.error is not None), default=None)
        for name, members in groups(rows, lambda row: row.implementation).items()
    }
    return ", ".join(f"{name} {e:.1e}" for name, e in largest.items() if e is not None)


def losses(rows: list[Row]) -> list[str]:
    """A sentence for every case in which a peer is faster than we are or takes less memory."""
    sentences = []
    for members in groups((r for r in rows if r.is_ok), lambda r: (r.case, r.mode)).values():
        ours = next((row for row in members if row.implementation == OURS), None)
        others = [row for row in members if not row.is_ours]
        if ours is None or not others:
            continue
        faults = []
        fastest = min(others, key=lambda row: row.median_ms)
        if ours.median_ms > TIE * fastest.median_ms:
            share = ours.median_ms / fastest.median_ms - 1
            faults.append(f"{share:.0%} slower than {fastest.implementation}")
        measured = [row for row in others if row.extra_mib is not None]
        least = min(measured, key=lambda row: row.extra_mib, default=None)
        if least and ours.extra_mib is not None and ours.extra_mib > TIE * least.extra_mib + 1:
            more = ours.extra_mib - least.extra_mib
            faults.append(f"{more:.0f} MiB more than {least.implementation}")
        if faults:
            name = case_name(ours).replace("<br>", " ")
            sentences.append(f"- {ours.operation}, {ours.mode}, {name}: {' and '.join(faults)}.")
    return sentences


def short(rows: list[Row]) -> str:
    """One line per case, ours against the fastest peer, and then the table of the slopes."""
    lines = []
    for members in groups(
        (r for r in rows if r.mode != "backward"), lambda r: (r.case, r.mode)
    ).values():
        ours = next((row for row in members if row.implementation == OURS), None)
        peers = [row for row in members if row.is_ok and not row.is_ours]
        if ours is None:
            continue
        figure = f"{ours.median_ms:.4g} ms" if ours.is_ok else ours.status
        best = min(peers, key=lambda row: row.median_ms, default=None)
        if best and ours.is_ok:
            ratio = ours.median_ms / best.median_ms
            figure += f", {ratio:.2f} of the fastest peer's ({best.implementation})"
        name = case_name(ours).replace("<br>", " ").replace(" × ", "x")
        lines.append(f"{ours.operation} {ours.mode} {name}: {figure}")
    if all_series(rows):
        lines += ["", slopes_table(rows)]
    return "\n".join(lines)


def where(row: Row) -> str:
    """The machine and the versions of a measurement."""
    return f"{row.device} ({row.driver}), torch {row.torch}, triton {row.triton}"


def headline(rows: list[Row]) -> str:
    """The README's section on measurements."""
    parts = []
    for members in groups(rows, lambda row: (row.device, row.dtype)).values():
        chosen = [
            r
            for r in members
            if r.operation == HEADLINE and r.mode == "both" and r.is_at_model_size
        ]
        if not chosen:
            continue
        models = [row for row in chosen if has_usual_tokens(row, chosen)]
        parts += [
            f"**{HEADLINE}, forward and backward, {models[0].dtype}, on {where(models[0])}**: "
            "median time, extra memory, share of a matmul's FLOP/s",
            table(models),
            f"Largest error against fp64 (worst row, relative): {errors_line(models)}.",
        ]
        lost = losses(models)
        parts.append("\n".join(["Where we lose:", "", *lost]) if lost else "No peer is faster.")
    return "\n\n".join(parts) if parts else "Nothing has been measured."


def has_usual_tokens(row: Row, rows: list[Row]) -> bool:
    """Whether its number of tokens is the most frequent one; other numbers show growth."""
    return row.tokens in statistics.multimode(r.tokens for r in rows if not r.inactive)


def full(rows: list[Row]) -> str:
    """bench/results/README.md: every measurement at a model's size, by device and operation."""
    made_by = "Written by `python -m bench report` from the tables in this folder."
    parts = ["# Measurements", f"{made_by} The [README](../../README.md#benchmarks) explains them."]
    for device, members in groups(rows, lambda row: row.device).items():
        parts.append(f"## {device}")
        commits = ", ".join(dict.fromkeys(row.commit for row in members))
        versions = {f"{r.implementation} {r.version}" for r in members if r.version}
        parts += [f"{where(members[0])}; commits {commits}; {', '.join(sorted(versions))}."]
        parts += [f"![time]({p.name})" for p in plots.paths(device) if p.exists()]
        for operation in OPERATIONS:
            for dtype, same in groups(members, lambda row: row.dtype).items():
                for mode in ("forward", "backward", "both"):
                    chosen = [r for r in same if (r.operation, r.mode) == (operation, mode)]
                    chosen = [row for row in chosen if row.is_at_model_size]
                    if chosen:
                        parts += [f"### {operation}, {mode}, {dtype}", table(chosen)]
        parts += ["### Growth", slopes_table(members), *step_table(device)]
        lost = losses([row for row in members if row.mode != "backward"])
        parts += ["### Where we lose", "\n".join(lost) if lost else "Nowhere."]
    return "\n\n".join(parts) + "\n"


def step_table(device: str) -> list[str]:
    """Title and Markdown table of the training step with a column per run; empty if it was not
    measured on this device."""
    path = FOLDER / f"{slug(device)}-step.csv"
    if not path.exists():
        return []
    rows = step.table(path).read()
    seconds = {(row.run, row.phase): f"{row.median_s:.4g}" for row in rows}
    runs = list(dict.fromkeys(row.run for row in rows))
    phases = dict.fromkeys(row.phase for row in rows)
    order = sorted(phases, key=lambda phase: phase == "step")
    lines = [["", *runs], ["---"] * (len(runs) + 1)]
    lines += [[phase, *(seconds.get((run, phase), "–") for run in runs)] for phase in order]
    made = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    title = f"### Training step, {rows[0].models} models, {rows[0].rollouts} rollouts"
    return [f"{title}: median seconds", made]


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser("python -m bench report", description=__doc__).parse_args(arguments)
    rows = read_all()
    for members in groups(rows, lambda row: row.device).values():
        for path in plots.draw(members):
            print(path)
    (FOLDER / "README.md").write_text(full(rows))
    text = with_section(README.read_text(), "bench roofline", roofline.summary())
    README.write_text(with_section(text, "bench report", headline(rows)))
    print(f"{FOLDER / 'README.md'}\n{README}")
    return 0
