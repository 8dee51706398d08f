"""Predicted time and memory of the Triton backend on GPUs, from their highest rates. Runs nothing.

    python -m bench roofline                      a table for people, goals marked
    python -m bench roofline --csv --output FILE  a line per device, operation, mode and shape

The rates are in bench/devices.py, the operations' work in bench/paths.py and bench/path_parts.py.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.batch import CLIPPED_EVERY
from bench.devices import DEVICES, Device, Run, device_named
from bench.path_parts import DTYPE, Case
from bench.paths import OPERATIONS
from bench.shapes import Shape
from bench.table import text_of
from codistill_kernels._linear.cpu_backend import CpuChunks
from codistill_kernels._linear.planning import workspace_bytes

MODES = {"linear_reverse_kl": ("forward",)}
ALL_MODES = ("forward", "backward", "both")
# A token whose ratio is beyond a bound is clipped only if its advantage has the right sign, which
# every second one has in the benchmark's inputs.
CLIPPED = 1 / (2 * CLIPPED_EVERY)


@dataclass(frozen=True)
class Goal:
    """The bounds that a case must keep on an H200; None: no bound."""

    ms: float | None = None
    gib: float | None = None
    share: float | None = None
    """Least share of cuBLAS' FLOP/s."""


@dataclass(frozen=True)
class Prediction:
    """Time and memory of a case on a device."""

    device: Device
    case: Case
    parts: dict[str, float]
    """Seconds by kind of work."""
    gib: float
    """Peak memory beside the inputs, gradients and outputs included, in 2^30 bytes."""
    ways: list[str]
    """How the code would compute it, such as "kept" or "2 chunks"."""

    @property
    def ms(self) -> float:
        return 1e3 * sum(self.parts.values())

    @property
    def share(self) -> float:
        """Share of cuBLAS' FLOP/s, counting the operations that the mathematics needs."""
        return self.case.needed_flops / (self.ms * 1e-3) / self.device.matmul

    def misses(self, goal: Goal) -> list[str]:
        """The bounds that are not kept."""
        found = []
        if goal.ms is not None and self.ms > goal.ms:
            found.append(f"{goal.ms:g} ms")
        if goal.gib is not None and self.gib > goal.gib:
            found.append(f"{goal.gib:g} GiB")
        if goal.share is not None and self.share < goal.share:
            found.append(f"{goal.share:.0%} of cuBLAS")
        return found


def predict(device: Device, case: Case) -> Prediction:
    """Walk along the operation's path and add up what it takes on the device."""
    run = Run(device)
    steps = OPERATIONS[case.operation](run, case)
    next(steps, None)
    if case.mode != "forward":
        if case.mode == "backward":
            run.restart()
        next(steps, None)
    return Prediction(device, case, run.parts, run.peak / 2**30, run.ways)


# --- cases -------------------------------------------------------------------------------------

LLAMA, QWEN = (4096, (4096,), 128256), (8192, (4096,), 151936)
GOALS = {
    Case("linear_policy_loss", "both", *LLAMA): Goal(ms=18.5, gib=2.2),
    Case("linear_policy_loss", "both", *QWEN): Goal(ms=43, gib=2.6),
    Case("linear_logps", "both", *LLAMA): Goal(ms=18.5, gib=2.2),
    Case("linear_logps", "both", *QWEN): Goal(ms=43, gib=2.6),
    # So little memory that exponentials of a few rows would not pay: a GPU that is nearly full.
    Case("linear_logps", "both", *QWEN, workspace_mib=512): Goal(ms=58, gib=1.7),
    Case("linear_logps", "forward", *QWEN): Goal(share=0.85),
    Case("linear_logps", "forward", 16384, (1536,), 151936): Goal(share=0.75),
    Case("linear_reverse_kl", "forward", 16384, (1536, 3584), 151936): Goal(ms=40),
}
# Cases that only the table shows.
VARIANTS = (
    Case("linear_policy_loss", "both", *LLAMA, clipped=CLIPPED),
    Case("linear_policy_loss", "both", *QWEN, clipped=CLIPPED),
    Case("linear_policy_loss", "both", *QWEN, inactive=0.3),
)
SHAPES = (
    *(
        (operation, *shape)
        for operation in ("linear_policy_loss", "linear_logps")
        for shape in (
            LLAMA,
            QWEN,
            (16384, (3584,), 152064),
            (16384, (1536,), 151936),
            (8192, (1536,), 151665),  # an odd vocabulary, of a head with more rows
        )
    ),
    ("codistill_losses", 8192, (1536, 3584), 151936),
    ("linear_reverse_kl", 16384, (1536, 3584), 151936),
    ("linear_divergence", 8192, (1536, 3584), 151936),
    ("selective_logps", 8192, (), 151936),
)


def cases() -> list[Case]:
    """The cases of the CSV: every operation in all of its modes, with the default workspace."""
    return [
        Case(operation, mode, *shape)
        for operation, *shape in SHAPES
        for mode in MODES.get(operation, ALL_MODES)
    ]


# --- beside measurements -----------------------------------------------------------------------


def roofline_ms(
    device: str, operation: str, shape: Shape, mode: str, dtype: str, matmul_tflops: float | None
) -> float | None:
    """Predicted time of a measurement of ours; None if nothing is predicted.

    On a known GPU this is the prediction for bf16. On a CPU it is the time of the C++ path's
    products alone, at the rate of the matmul that was measured with it; see `cpu_ms`.
    """
    gpu = device_named(device)
    if gpu is None:
        return cpu_ms(operation, shape, mode, matmul_tflops) if matmul_tflops else None
    # The cross entropy is the policy loss with advantages of 1.
    name = "linear_policy_loss" if operation == "linear_cross_entropy" else operation
    if name not in OPERATIONS or dtype != "bf16":
        return None
    has_ratios = operation in ("linear_policy_loss", "codistill_losses")
    case = Case(
        name,
        mode,
        shape.tokens,
        shape.hidden_sizes,
        shape.vocab,
        inactive=1 - shape.active / shape.tokens,
        clipped=CLIPPED if has_ratios else 0.0,
    )
    return predict(gpu, case).ms


def cpu_ms(operation: str, shape: Shape, mode: str, matmul_tflops: float) -> float:
    """Time of the products over active tokens: for each model 2 N H V forward, 6 forward and
    backward, 8 if logits are computed twice. A teacher's are 2 N H V.

    mode: forward or both; no matmul is measured with a backward pass alone.
    """
    workspace = workspace_bytes(None, torch.device("cpu"), shape.vocab)
    way = CpuChunks.plan(shape.active, shape.vocab, DTYPE, workspace).way
    recomputes = way == "columns" or (way == "chunks" and operation == "linear_logps")
    factor = 2 if mode == "forward" else 8 if recomputes and not shape.has_teacher else 6
    products = factor * shape.hidden + (2 if shape.has_teacher else factor) * shape.large_hidden
    return products * shape.active * shape.vocab / (matmul_tflops * 1e9)


# --- output ------------------------------------------------------------------------------------


def title(case: Case) -> str:
    """The case in a few words."""
    sizes = ("+".join(map(str, case.hidden)), str(case.vocab))
    parts = [f"{case.operation} {case.mode} {'x'.join([str(case.tokens), *filter(None, sizes)])}"]
    parts += [f"{case.inactive:.0%} inactive"] * (case.inactive > 0)
    parts += [f"1 of {round(1 / case.clipped)} clipped"] if case.clipped else []
    parts += [f"workspace {case.workspace_mib} MiB"] if case.workspace_mib else []
    return ", ".join(parts)


def line(prediction: Prediction, goal: Goal | None) -> str:
    """A prediction for a person to read; goal: the bounds of the case, if it has any."""
    # The backward pass alone gets no share: with chunks the forward pass makes the gradients.
    has_share = prediction.case.hidden and prediction.case.mode != "backward"
    share = f"{prediction.share:5.0%}" if has_share else "    -"
    parts = " ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in prediction.parts.items())
    mark = ""
    if goal is not None:
        missed = prediction.misses(goal)
        mark = f"  MISSED: {', '.join(missed)}" if missed else "  met"
    figures = f"{prediction.ms:7.2f} ms {prediction.gib:5.2f} GiB {share}"
    ways = " + ".join(prediction.ways)
    return f"  {title(prediction.case):72} {figures}  {ways:16} [{parts}]{mark}"


def table(devices: list[Device]) -> str:
    """All predictions, those of the goals first. Goals are for the H200 and marked there alone."""
    every = list(dict.fromkeys([*GOALS, *VARIANTS, *cases()]))
    lines = []
    for device in devices:
        lines.append(f"{device.name}: time, extra memory, share of cuBLAS, way [ms of the parts]")
        for case in every:
            goal = GOALS.get(case) if device.name == "H200" else None
            lines.append(line(predict(device, case), goal))
    return "\n".join(lines)


def summary() -> str:
    """The README's table: the goals on Hopper GPUs."""
    devices = [DEVICES["H200"], DEVICES["H100"]]
    lines = ["| bf16 | " + " | ".join(device.name for device in devices) + " | memory |"]
    lines.append("| --- | --- | --- | --- |")
    for case in GOALS:
        found = [predict(device, case) for device in devices]
        figures = " | ".join(f"{p.ms:.1f} ms, {p.share:.0%}" for p in found)
        lines.append(f"| {title(case)} | {figures} | {found[0].gib:.1f} GiB |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Line:
    """A prediction in the CSV. hidden is the sum over the models, gib is in 2^30 bytes."""

    device: str
    operation: str
    mode: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    ms: float
    gib: float


def csv_text(devices: list[Device]) -> str:
    """The predictions of all `cases` on these devices."""
    lines = []
    for device in devices:
        for case in cases():
            found = predict(device, case)
            sizes = (case.tokens, sum(case.hidden), case.vocab)
            lines.append(
                Line(device.name, case.operation, case.mode, *sizes, "bf16", found.ms, found.gib)
            )
    return text_of(Line, lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench roofline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=DEVICES, help="default: all")
    parser.add_argument(
        "--csv",
        action="store_true",
        help="instead of the table, with the default workspace; hidden of two models is the sum of "
        "theirs (1536 + 3584 = 5120), 0 without a head; gib: 2^30 bytes",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file of the CSV; default: stdout"
    )
    options = parser.parse_args(arguments)
    if options.output and not options.csv:
        parser.error("--output must come with --csv")
    devices = [DEVICES[options.device]] if options.device else list(DEVICES.values())
    if not options.csv:
        print(table(devices))
    elif options.output is None:
        print(csv_text(devices), end="")
    else:
        try:
            options.output.write_text(csv_text(devices))
        except OSError as error:
            parser.error(f"--output must be a file that can be written, got {error}")
    return 0
