"""Predicted time and memory of the Triton backend on GPUs, from their ceilings. Runs nothing.

    python -m bench roofline                      a table for people, goals marked
    python -m bench roofline --csv --output FILE  a line per device, operation, mode and shape

Ceilings: bench/devices.py. What is done with them: bench/paths.py.
"""

import argparse
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.batch import CLIPPED_EVERY
from bench.devices import DEVICES, Device, device_named
from bench.paths import DTYPE, OPERATIONS, Case, Run
from bench.shapes import Shape
from codistill_kernels._linear.cpu_backend import CpuChunks
from codistill_kernels._linear.planning import workspace_bytes

MODES = {"linear_reverse_kl": ("forward",)}
ALL_MODES = ("forward", "backward", "both")
COLUMNS = ("device", "operation", "mode", "tokens", "hidden", "vocab", "dtype", "ms", "gib")
# A clipped token has an advantage of the right sign: every second one in the benchmark's inputs.
CLIPPED = 1 / (2 * CLIPPED_EVERY)


@dataclass(frozen=True)
class Goal:
    """What a case is held to on an H200; None: not held to it."""

    ms: float | None = None
    gib: float | None = None
    share: float | None = None
    """Of cuBLAS' FLOP/s."""


@dataclass(frozen=True)
class Prediction:
    device: Device
    case: Case
    parts: dict[str, float]
    """Seconds."""
    gib: float
    """Peak beside the inputs, gradients and outputs included, in 2^30 bytes."""
    ways: list[str]

    @property
    def ms(self) -> float:
        return 1e3 * sum(self.parts.values())

    @property
    def share(self) -> float:
        """Of cuBLAS' FLOP/s, by the operations that the mathematics needs."""
        return self.case.needed_flops / (self.ms * 1e-3) / self.device.matmul

    def misses(self, goal: Goal) -> list[str]:
        """Bounds that are not kept."""
        found = []
        if goal.ms is not None and self.ms > goal.ms:
            found.append(f"{goal.ms:g} ms")
        if goal.gib is not None and self.gib > goal.gib:
            found.append(f"{goal.gib:g} GiB")
        if goal.share is not None and self.share < goal.share:
            found.append(f"{goal.share:.0%} of cuBLAS")
        return found


def predict(device: Device, case: Case) -> Prediction:
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
    # Exponentials of fewer rows than pay: the way for a GPU that is nearly full.
    Case("linear_logps", "both", *QWEN, workspace_mib=512): Goal(ms=58, gib=1.7),
    Case("linear_logps", "forward", *QWEN): Goal(share=0.85),
    Case("linear_logps", "forward", 16384, (1536,), 151936): Goal(share=0.75),
    Case("linear_reverse_kl", "forward", 16384, (1536, 3584), 151936): Goal(ms=40),
}
# Beside the goals, what only the table shows.
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
            (8192, (1536,), 151665),  # the vocabulary without its padding: odd
        )
    ),
    ("codistill_losses", 8192, (1536, 3584), 151936),
    ("linear_reverse_kl", 16384, (1536, 3584), 151936),
    ("selective_logps", 8192, (), 151936),
)


def cases() -> list[Case]:
    """Of the CSV: every operation in every mode that it has, with the default workspace."""
    return [
        Case(operation, mode, *shape)
        for operation, *shape in SHAPES
        for mode in MODES.get(operation, ALL_MODES)
    ]


# --- beside measurements -----------------------------------------------------------------------


def roofline_ms(
    device: str, operation: str, shape: Shape, mode: str, dtype: str, matmul_tflops: float | None
) -> float | None:
    """What a measurement of ours is held against, None where nothing is predicted.

    On a known GPU the prediction for bf16. Elsewhere the time of the products that the C++ path
    makes, at the rate of a matmul that was measured beside it, and nothing for the rest: 2 N H V
    forward, 6 forward and backward, 8 where logits are computed again. Over active tokens.
    """
    gpu = device_named(device)
    if gpu is None:
        return cpu_ms(operation, shape, mode, matmul_tflops) if matmul_tflops else None
    name = operation.replace("linear_cross_entropy", "linear_policy_loss")  # with advantages of 1
    if name not in OPERATIONS or dtype != "bf16":
        return None
    hidden = tuple(filter(None, (shape.hidden, shape.large_hidden)))
    has_ratios = operation in ("linear_policy_loss", "codistill_losses")
    case = Case(name, mode, shape.tokens, hidden, shape.vocab, clipped=CLIPPED * has_ratios)
    return predict(gpu, replace(case, inactive=1 - shape.active / shape.tokens)).ms


def cpu_ms(operation: str, shape: Shape, mode: str, matmul_tflops: float) -> float:
    """mode: forward or both; no matmul is measured beside a backward pass alone."""
    workspace = workspace_bytes(None, torch.device("cpu"), shape.vocab)
    way = CpuChunks.plan(shape.active, shape.vocab, DTYPE, workspace).way
    recomputes = way == "columns" or (way == "chunks" and operation == "linear_logps")
    factor = 2 if mode == "forward" else 8 if recomputes else 6
    hidden = shape.hidden + shape.large_hidden
    return factor * shape.active * hidden * shape.vocab / (matmul_tflops * 1e9)


# --- output ------------------------------------------------------------------------------------


def title(case: Case) -> str:
    sizes = ("+".join(map(str, case.hidden)), str(case.vocab))
    parts = [f"{case.operation} {case.mode} {'x'.join([str(case.tokens), *filter(None, sizes)])}"]
    parts += [f"{case.inactive:.0%} inactive"] * (case.inactive > 0)
    parts += [f"1 of {round(1 / case.clipped)} clipped"] if case.clipped else []
    parts += [f"workspace {case.workspace_mib} MiB"] if case.workspace_mib else []
    return ", ".join(parts)


def line(prediction: Prediction, goal: Goal | None) -> str:
    """A case, for a person."""
    # Not of the backward pass alone: in chunks gradients are made in the forward pass.
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
    """Goals first; they are of the H200 and marked there alone."""
    every = list(dict.fromkeys([*GOALS, *VARIANTS, *cases()]))
    lines = []
    for device in devices:
        lines.append(f"{device.name}: time, extra memory, share of cuBLAS, way [ms of the parts]")
        for case in every:
            goal = GOALS.get(case) if device.name == "H200" else None
            lines.append(line(predict(device, case), goal))
    return "\n".join(lines)


def summary() -> str:
    """Of the README: the goals on Hopper GPUs."""
    devices = [DEVICES["H200"], DEVICES["H100"]]
    lines = ["| bf16 | " + " | ".join(device.name for device in devices) + " | memory |"]
    lines.append("| --- | --- | --- | --- |")
    for case in GOALS:
        found = [predict(device, case) for device in devices]
        figures = " | ".join(f"{p.ms:.1f} ms, {p.share:.0%}" for p in found)
        lines.append(f"| {title(case)} | {figures} | {found[0].gib:.1f} GiB |")
    return "\n".join(lines)


def rows(devices: list[Device]) -> list[tuple]:
    """Of the CSV, in the order of COLUMNS."""
    made = []
    for device in devices:
        for case in cases():
            prediction = predict(device, case)
            sizes = (case.tokens, sum(case.hidden), case.vocab)
            figures = (f"{prediction.ms:.3f}", f"{prediction.gib:.3f}")
            made.append((device.name, case.operation, case.mode, *sizes, "bf16", *figures))
    return made


def write_csv(file, devices: list[Device]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(devices))


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
    parser.add_argument("--output", type=Path, metavar="FILE", help="of the CSV; default: stdout")
    options = parser.parse_args(arguments)
    if options.output and not options.csv:
        parser.error("--output must come with --csv")
    devices = [DEVICES[options.device]] if options.device else list(DEVICES.values())
    if not options.csv:
        print(table(devices))
    elif options.output is None:
        write_csv(sys.stdout, devices)
    else:
        try:
            with options.output.open("w", newline="") as file:
                write_csv(file, devices)
        except OSError as error:
            parser.error(f"--output must be a file that can be written, got {error}")
    return 0
