"""Writes what a study has found: its page between its markers, pictures, and a README."""

import os
from pathlib import Path

from bench.sections import MARKERS, with_section
from study import claims, figures, tables
from study.methods import ADDED_SEEDS
from study.places import Places
from study.results import Results, load


def write(task: str, places: Places) -> list[Path]:
    """Write the report of a task from the records that there are; the files. A page that is not
    there is begun with nothing but the tables and pictures.

    Raises:
        ValueError: the page lacks a marker.
    """
    results = load(places.results / task)
    folder = places.pictures / task
    drawn = figures.write(results, folder)
    text = places.page.read_text() if places.page.exists() else bare_page(task)
    for name, section in sections(results).items():
        text = with_section(text, f"study {task} {name}", section)
    for name in figures.FIGURES:
        picture = show(name, drawn, folder.relative_to(places.page.parent))
        text = with_section(text, f"study {task} figure {name}", picture)
    places.page.write_text(text)
    readme = places.results / "README.md"
    readme.parent.mkdir(parents=True, exist_ok=True)
    readme.write_text(overview(places))
    return [places.page, readme, *(folder / f"{name}.png" for name in drawn)]


def bare_page(task: str) -> str:
    """A page with a place for each table and picture, and nothing said of them."""
    parts = [f"# Study of the task {task}"]
    figure_names = [f"figure {name}" for name in figures.FIGURES]
    for name in [*sections(Results(task, {})), *figure_names]:
        begin, end = (marker.format(f"study {task} {name}") for marker in MARKERS)
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{begin}\n{end}")
    return "\n\n".join(parts) + "\n"


def sections(results: Results) -> dict[str, str]:
    """The generated parts of the page, by name."""
    found = {
        "verdict": claims.table(results, claims.GROUPS),
        "added": claims.table(results.among(ADDED_SEEDS), claims.ACCURACY),
        "small": tables.accuracy(results, "small", tables.small_methods()),
        "large": tables.accuracy(results, "large", tables.large_methods()),
        "alpha": tables.alpha(results),
        "kd": tables.kd_reward(results),
        "time": tables.time(results),
        "ablations": tables.ablations(results),
        "runs": tables.runs(results),
        "versions": f"Made with {tables.versions(results) or 'nothing yet'}.",
    }
    return {name: text.strip() for name, text in found.items()}


def show(name: str, drawn: dict[str, figures.Figure], folder: Path) -> str:
    """A picture with its caption, or a line in its place."""
    if name not in drawn:
        return "No picture yet: no run that it shows has finished."
    figure = drawn[name]
    return f"![{figure.alt}]({folder.as_posix()}/{name}.png)\n\n*{figure.caption}*"


def overview(places: Places) -> str:
    """The README of the records: what the files are, commands, versions, all runs."""
    page = os.path.relpath(places.page, places.results)
    parts = [
        "# Runs of the study",
        f"Written by `python -m study report`; [{places.page.name}]({page}) shows what came out. "
        "`TASK/METHOD/seed_K.json` holds the numbers of one "
        "run: its command, versions, every start and how it ended, the rows of "
        "`evaluations.jsonl` and, for each step, some keys of `metrics.jsonl`.",
        "```\nmake study                                    # what is missing, then the report\n"
        ".venv/bin/python -m study run --seeds 0 1 2   # --help: task, methods, steps, jobs\n"
        ".venv/bin/python -m study report\n```",
    ]
    for folder in sorted(path for path in places.results.iterdir() if path.is_dir()):
        results = load(folder)
        parts += [f"## {folder.name}", f"Versions: {tables.versions(results)}."]
        parts.append(tables.runs(results).strip())
    return "\n\n".join(parts) + "\n"
