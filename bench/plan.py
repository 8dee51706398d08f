"""A run of the benchmark suite: what it measures and where it writes the rows. A pytest plugin."""

import argparse
import gc
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import results
from bench.batch import make_batch
from bench.cases import SETS, Case, cases, in_order
from bench.check import CheckFailed, check
from bench.measure import DTYPES, Runner, extra_mib, matmul_seconds
from bench.operations import OPERATIONS, OURS
from bench.report import short
from bench.roofline import roofline_ms

OUT_OF_MEMORY = "out of memory"
DEFAULT_SETS = ("goals", "main", "inactive", "growth")


@dataclass(frozen=True)
class Measurement:
    """One row to measure."""

    case: Case
    implementation: str
    mode: str

    def __str__(self) -> str:
        return f"{self.case.operation} {self.case.shape} {self.implementation} {self.mode}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description="Time, memory and error of every operation, ours and peers', side by side.",
    )
    add = parser.add_argument
    several = dict(nargs="+", metavar="NAME")
    add(
        "--set",
        choices=SETS,
        default=DEFAULT_SETS,
        dest="sets",
        **several,
        help=f"sets of cases: {', '.join(SETS)}; default: all but quick",
    )
    add(
        "--operation",
        choices=OPERATIONS,
        default=[],
        dest="operations",
        **several,
        help=f"default: all of {', '.join(OPERATIONS)}",
    )
    add(
        "--implementation",
        choices=names_of_all(),
        default=[],
        dest="implementations",
        **several,
        help=f"default: all of {', '.join(names_of_all())} that are installed and run here",
    )
    add("--device", choices=("cpu", "cuda"), default=None, help="default: a GPU if there is one")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--output", type=Path, help="CSV file; default: bench/results/<device>.csv, quick: none")
    return parser


def names_of_all() -> list[str]:
    """Names of all implementations of all operations."""
    each = (operation.implementations() for operation in OPERATIONS.values())
    return list(dict.fromkeys(name for implementations in each for name in implementations))


class Plan:
    """Gives pytest the measurements to make, makes each and writes its row at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dtype = options, DTYPES[options.dtype]
        self.device = torch.device(
            options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.path = options.output
        if self.path is None and "quick" not in options.sets:
            self.path = results.path_of(self.device)
        self.rows: list[results.Row] = []
        self.said: set[str] = set()
        self.prepared: tuple = ()

    # --- pytest's hooks ---

    def pytest_generate_tests(self, metafunc) -> None:
        if "measurement" in metafunc.fixturenames:
            metafunc.parametrize("measurement", self.measurements(), ids=str)

    @pytest.fixture
    def plan(self) -> "Plan":
        return self

    # --- measuring ---

    def measurements(self) -> list[Measurement]:
        """All that the options ask for and that can run here."""
        chosen = cases(self.options.sets, self.options.operations, is_cpu=self.device.type == "cpu")
        return [
            Measurement(case, name, mode)
            for case, name in in_order(chosen)
            if self.can_run(case.operation, name)
            for mode in case.modes
        ]

    def can_run(self, operation: str, name: str) -> bool:
        """Whether the implementation is asked for and runs here. Prints once why one does not."""
        if self.options.implementations and name not in self.options.implementations:
            return False
        why = OPERATIONS[operation].implementations()[name].missing(self.device)
        if why and name not in self.said:
            self.said.add(name)
            print(f"without {name}: {why}")
        return not why

    def measure(self, measurement: Measurement, benchmark) -> results.Row:
        """Make the row, write it and print it. benchmark: pytest-benchmark's fixture."""
        row = results.Row(**self.columns(measurement), **self.figures(measurement, benchmark))
        if row.is_ok and row.implementation == OURS:
            sizes = (measurement.case.shape, row.mode, row.dtype, row.matmul_tflops)
            row = replace(row, roofline_ms=roofline_ms(row.device, row.operation, *sizes))
        self.rows.append(row)
        if self.path:
            results.table(self.path).add([row])
        print("\n" + line(row), flush=True)
        return row

    def columns(self, measurement: Measurement) -> dict:
        """The columns of the row that say what is measured, and where."""
        shape, operation = measurement.case.shape, measurement.case.operation
        implementation = OPERATIONS[operation].implementations()[measurement.implementation]
        return results.environment(self.device) | dict(
            operation=operation,
            model=shape.model,
            tokens=shape.tokens,
            hidden=shape.hidden,
            vocab=shape.vocab,
            inactive=shape.inactive,
            dtype=self.options.dtype,
            implementation=measurement.implementation,
            version=implementation.version,
            mode=measurement.mode,
        )

    def figures(self, measurement: Measurement, benchmark) -> dict:
        """The status and, if the check passed, the figures."""
        case, mode = measurement.case, measurement.mode
        self.prepare(case, measurement.implementation)
        if self.status != results.OK:
            return dict(status=self.status)
        try:
            times = self.runner.time(benchmark, mode)
        except torch.OutOfMemoryError:
            return dict(status=OUT_OF_MEMORY)
        low, median, high = np.quantile(times, (0.2, 0.5, 0.8))
        return dict(
            status=results.OK,
            median_ms=1e3 * median,
            p20_ms=1e3 * low,
            p80_ms=1e3 * high,
            rounds=len(times),
            extra_mib=self.memory.get(mode),
            error=self.error,
            **self.rates(case, mode, median),
        )

    def rates(self, case: Case, mode: str, seconds: float) -> dict[str, float]:
        """FLOP/s that were reached, and those of a matmul that is measured now, because a machine's
        speed changes. Nothing for a backward pass alone: some implementations make their gradients
        in the forward pass."""
        operation = OPERATIONS[case.operation]
        flops = operation.flops(case.shape, mode)
        if not flops or mode == "backward":
            return {}
        whole = operation.flops(replace(case.shape, inactive=0.0), "forward")
        product = matmul_seconds(case.shape, self.dtype, self.device)
        return dict(tflops=flops / seconds / 1e12, matmul_tflops=whole / product / 1e12)

    def prepare(self, case: Case, name: str) -> None:
        """Check an implementation, make its inputs and measure its memory; once for all modes."""
        if self.prepared == (case, name):
            return
        operation = OPERATIONS[case.operation]
        self.prepared, self.runner = (case, name), None
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        try:
            self.error = check(operation, name, case.shape, self.dtype, self.device)
            batch = make_batch(case.shape, self.dtype, self.device)
            self.runner = Runner(operation, operation.implementations()[name].run, batch)
            self.memory = extra_mib(operation, name, case.shape, self.options.dtype, self.runner)
            self.status = results.OK
        except CheckFailed as error:
            self.status = f"inaccurate: {error}"
        except torch.OutOfMemoryError:
            self.status = OUT_OF_MEMORY
        except Exception as error:  # a peer may not be made for this shape or this GPU
            traceback.print_exc()
            self.status = f"failed: {type(error).__name__}"


def line(row: results.Row) -> str:
    """A measurement for a person to read."""
    head = f"{row.title} {row.mode:8} {row.implementation:22}"
    if not row.is_ok:
        return f"{head} {row.status}"
    memory = "" if row.extra_mib is None else f", {row.extra_mib:.0f} MiB"
    rate = "" if row.tflops is None else f", {row.tflops / row.matmul_tflops:.0%} of a matmul"
    if row.roofline_share is not None:
        rate += f", {row.roofline_share:.0%} of roofline"
    spread = f"({row.p20_ms:.4g} to {row.p80_ms:.4g})"
    return f"{head} {row.median_ms:.4g} ms {spread}{memory}{rate}, error {row.error:.1e}"


def main(arguments: list[str]) -> int:
    """Exit code 1 if one of our implementations has no figures."""
    plan = Plan(parser().parse_args(arguments))
    suite = Path(__file__).with_name("bench_kernels.py")
    options = ["-q", "-s", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-quiet"]
    code = pytest.main([str(suite), *options, "--no-header", "--durations=1"], plugins=[plan])
    print(short(plan.rows))
    print(f"{len(plan.rows)} measurements" + (f" in {plan.path}" if plan.path else ""))
    return int(code)
