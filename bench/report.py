"""Plots and tables from bench/results: `python -m bench report`.

Writes bench/results/README.md (every measurement), PNGs beside it, and the tables of the README
between its markers. Nothing in them is written by hand, the sentences on where we lose neither.
"""

import argparse
import csv
import re
import statistics
from collections.abc import Callable, Iterable

from bench import plots, roofline
from bench.growth import all_series, slopes_table
from bench.operations import OPERATIONS, OURS
from bench.results import FOLDER, Row, read_all, slug

README = FOLDER.parents[1] / "README.md"
MARKERS = "<!-- bench {}: begin -->", "<!-- bench {}: end -->"
HEADLINE = "linear_policy_loss"
TIE = 1.03  # closer than that is no win: medians of one run differ by so much


def groups(rows: Iterable[Row], key: Callable[[Row], object]) -> dict[object, list[Row]]:
    found: dict[object, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


# --- tables ------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Implementations by cases, of one operation in one mode: time, memory, share of a matmul's
    FLOP/s and, of ours, of the rate that `bench.roofline` predicts."""
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
    sizes = " × ".join(str(size) for size in (row.tokens, row.hidden, row.vocab) if size)
    share = f", {row.inactive:.0%} inactive" if row.inactive else ""
    return f"{row.model}<br>{sizes}{share}"


def cell(row: Row | None) -> str:
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
    """A sentence for every case in which somebody is faster than we are, or takes less memory."""
    sentences = []
    for members in groups((r for r in rows if r.is_ok), lambda r: (r.case, r.mode)).values():
        ours = next((row for row in members if row.implementation == OURS), None)
        others = [row for row in members if not row.implementation.startswith("codistill")]
        if ours is None or not others:
            continue
        faults = []
        fastest = min(others, key=lambda row: row.median_ms)
        if ours.median_ms > TIE * fastest.median_ms:
            share = ours.median_ms / fastest.median_ms - 1
            faults.append(f"{share:.0%} slower than {fastest.implementation}")
        sparing = [row for row in others if row.extra_mib is not None]
        least = min(sparing, key=lambda row: row.extra_mib, default=None)
        if least and ours.extra_mib is not None and ours.extra_mib > TIE * least.extra_mib + 1:
            more = ours.extra_mib - least.extra_mib
            faults.append(f"{more:.0f} MiB more than {least.implementation}")
        if faults:
            name = case_name(ours).replace("<br>", " ")
            sentences.append(f"- {ours.operation}, {ours.mode}, {name}: {' and '.join(faults)}.")
    return sentences


def short(rows: list[Row]) -> str:
    """A line a case: ours against the fastest peer; then the slopes."""
    lines = []
    for members in groups(
        (r for r in rows if r.mode != "backward"), lambda r: (r.case, r.mode)
    ).values():
        ours = next((row for row in members if row.implementation == OURS), None)
        peers = [r for r in members if r.is_ok and not r.implementation.startswith("codistill")]
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
    return f"{row.device} ({row.driver}), torch {row.torch}, triton {row.triton}"


def headline(rows: list[Row]) -> str:
    """The README's section."""
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
    """Of the token counts measured, the one that most models have."""
    return row.tokens in statistics.multimode(r.tokens for r in rows if not r.inactive)


def full(rows: list[Row]) -> str:
    parts = ["# Measurements", __doc__.split("\n\n")[0] + "\n\nSee [README](../../README.md)."]
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
    """Of the training step, where it was measured: phases by runs."""
    path = FOLDER / f"{slug(device)}-step.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = {(row["run"], row["phase"]): row["median_s"] for row in rows}
    runs, phases = (list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "phase"))
    order = sorted(phases, key=lambda phase: phase == "step")
    lines = [["", *runs], ["---"] * (len(runs) + 1)]
    lines += [[phase, *(seconds.get((run, phase), "–") for run in runs)] for phase in order]
    made = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    title = f"### Training step, {rows[0]['models']} models, {rows[0]['rollouts']} rollouts"
    return [f"{title}: median seconds", made]


def with_section(text: str, name: str, section: str) -> str:
    """The README with what stands between the markers of this name replaced."""
    begin, end = (marker.format(name) for marker in MARKERS)
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md must have the lines {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{section}\n\n{end}", text)


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser("python -m bench report", description=__doc__).parse_args(arguments)
    rows = read_all()
    for members in groups(rows, lambda row: row.device).values():
        for path in plots.draw(members):
            print(path)
    (FOLDER / "README.md").write_text(full(rows))
    text = with_section(README.read_text(), "roofline", roofline.summary())
    README.write_text(with_section(text, "report", headline(rows)))
    print(f"{FOLDER / 'README.md'}\n{README}")
    return 0
