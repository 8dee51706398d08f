"""The study: train every method of a task with several seeds, and write the report.

python -m study run       the runs that are missing, each kept when it is finished, and the report;
                          exit code 1 if any failed
python -m study report    tables, verdicts and pictures, from the records of the runs
"""

import argparse
import sys
from pathlib import Path

from study.methods import METHODS, SEEDS, STEPS
from study.places import Places


def main(arguments: list[str]) -> int:
    """Run a command; its exit code."""
    options = parser().parse_args(arguments)
    return {"run": run, "report": report}[options.command](options)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--task", default="words", help="what is learned (words)")
        output = "folder for records, runs and report of a study of your own (the repository's)"
        command.add_argument("--output", type=Path, metavar="FOLDER", help=output)
        if name == "run":
            add_run_options(command)
    return whole


def add_run_options(command: argparse.ArgumentParser) -> None:
    names = list(METHODS)
    text = f"all, or some of {', '.join(names)}; what these need runs too"
    counts = ", ".join(f"{group} {len(seeds)}" for group, seeds in SEEDS.items())
    seeds = f"a run of each method for each (0, 1, ..., by group as many as: {counts})"
    steps = f"of a run; continued training takes a quarter of them more ({STEPS})"
    command.add_argument(
        "--methods", nargs="+", choices=names, default=names, metavar="NAME", help=text
    )
    command.add_argument("--seeds", nargs="+", type=int, metavar="K", help=seeds)
    command.add_argument("--steps", type=int, default=STEPS, help=steps)
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each (1)")


def run(options: argparse.Namespace) -> int:
    # Imported here: transformers takes seconds, and --help needs nothing of it.
    from study.runs import Run, execute_all
    from study.tasks import TASKS

    if options.task not in TASKS:
        print(f"study: --task: expected one of {', '.join(TASKS)}", file=sys.stderr)
        return 2
    asked = [
        (METHODS[name], seed)
        for name in options.methods
        for seed in options.seeds or SEEDS[METHODS[name].group]
    ]
    runs = [
        Run(TASKS[options.task], method, seed, options.steps, places(options))
        for method, seed in sorted(asked, key=lambda pair: pair[1])
    ]
    try:
        failed = execute_all(runs, options.jobs)
    except ValueError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    report(options)
    return 1 if failed else 0


def report(options: argparse.Namespace) -> int:
    from study.report import write

    for path in write(options.task, places(options)):
        print(path)
    return 0


def places(options: argparse.Namespace) -> Places:
    return Places.within(options.output) if options.output else Places()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
