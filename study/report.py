"""Writes what the study has found: docs/study.md between its markers, pictures, and a README."""

from dataclasses import dataclass
from pathlib import Path

from bench.sections import with_section
from study import claims, figures, tables
from study.methods import ADDED_SEEDS
from study.record import RESULTS
from study.results import Results, load

PAGE = Path("docs/study.md")
PICTURES = Path("docs/study")


@dataclass(frozen=True)
class Places:
    """Files and folders of the report; tests take others."""

    results: Path = RESULTS
    page: Path = PAGE
    pictures: Path = PICTURES


def write(task: str, places: Places | None = None) -> list[Path]:
    """Write the report of a task from the records that there are; the files.

    Raises:
        ValueError: the page lacks a marker.
    """
    places = places or Places()
    results = load(places.results / task)
    folder = places.pictures / task
    drawn = figures.write(results, folder)
    text = places.page.read_text()
    for name, section in sections(results).items():
        text = with_section(text, f"study {task} {name}", section)
    for name in figures.FIGURES:
        picture = show(name, drawn, folder.relative_to(places.page.parent))
        text = with_section(text, f"study {task} figure {name}", picture)
    places.page.write_text(text)
    readme = places.results / "README.md"
    readme.parent.mkdir(parents=True, exist_ok=True)
    readme.write_text(overview(sorted(path for path in places.results.iterdir() if path.is_dir())))
    return [places.page, readme, *(folder / f"{name}.png" for name in drawn)]


def sections(results: Results) -> dict[str, str]:
    """The generated parts of the page, by name."""
    found = {
        "small": tables.accuracy(results, "small", tables.small_methods()),
        "large": tables.accuracy(results, "large", tables.large_methods()),
        "alpha": tables.alpha(results),
        "kd": tables.kd_reward(results),
        "time": tables.time(results),
        "ablations": tables.ablations(results),
        "runs": tables.runs(results),
        "versions": f"Made with {tables.versions(results) or 'nothing yet'}.",
        "verdict": claims.table(results, claims.GROUPS),
        "added": claims.table(results.among(ADDED_SEEDS), claims.ACCURACY),
    }
    return {name: text.strip() for name, text in found.items()}


def show(name: str, drawn: dict[str, figures.Figure], folder: Path) -> str:
    """A picture with its caption, or a line in its place."""
    if name not in drawn:
        return "No picture yet: no run that it shows has finished."
    figure = drawn[name]
    return f"![{figure.alt}]({folder.as_posix()}/{name}.png)\n\n*{figure.caption}*"


def overview(folders: list[Path]) -> str:
    """bench/results/study/README.md: what the files are, commands, versions, all runs."""
    parts = [
        "# Runs of the study",
        "Written by `python -m study report`; [docs/study.md](../../../docs/study.md) explains "
        "the study and shows what came out. `TASK/METHOD/seed_K.json` holds the numbers of one "
        "run: its command, versions, every start and how it ended, the rows of "
        "`evaluations.jsonl` and, for each step, some keys of `metrics.jsonl`.",
        "```\nmake study                                    # what is missing, then the report\n"
        ".venv/bin/python -m study run --seeds 0 1 2   # --help: task, methods, steps, jobs\n"
        ".venv/bin/python -m study report\n```",
    ]
    for folder in folders:
        results = load(folder)
        parts += [f"## {folder.name}", f"Versions: {tables.versions(results)}."]
        parts.append(tables.runs(results).strip())
    return "\n\n".join(parts) + "\n"
