"""First contact with a GPU: is every operation right, and how fast against the prediction?

    python -m bench first_contact                 ceilings, correctness, the goals' shapes
    python -m bench first_contact --experiments   why it is not as fast as predicted

Prints one line per number, and adds it to bench/results/<device>-first_contact.csv at once.
"""

import argparse
import functools
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench import experiments, ours, results
from bench.batch import make_batch
from bench.cases import larger_pair, odd_head
from bench.devices import Device, device_named
from bench.exactness import CHECKS
from bench.findings import FAILED, OK, Finding, Findings, in_range
from bench.gold import REAL, Inputs, Setting
from bench.measure import Runner, gpu_peak_mib, gpu_times
from bench.operations import OPERATIONS
from bench.path_parts import Case
from bench.roofline import Prediction, predict
from bench.shapes import Shape, head_shape

SURPRISE = 0.15  # a relative difference from the prediction that is worth a remark
Step = tuple[str, Callable[[], Iterator[Finding]]]


# --- ceilings ----------------------------------------------------------------------------------


def ceilings(device_name: str) -> Iterator[Finding]:
    """The two rates on this GPU that every prediction is made from."""
    device = device_named(device_name)
    rates = (device.copy / 1e12, device.matmul / 1e12) if device else (0, 0)
    expected = [(0.95 * rate, 1.05 * rate) if device else None for rate in rates]
    otherwise = "all predictions scale with this rate"
    rate = experiments.copy_bytes_per_second(2**31) / 1e12
    yield in_range("copy, read and written", rate, "TB/s", expected[0], otherwise)
    rate = experiments.product_flops(8192, 8192, 8192) / 1e12
    yield in_range("product 8192 x 8192 x 8192, bf16", rate, "TFLOP/s", expected[1], otherwise)


# --- speed -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """An operation at the size that it is judged by."""

    operation: str
    mode: str
    shape: Shape
    way: str = ""
    """How gradients are made, if not as the code would choose; see `experiments.way`."""

    def __str__(self) -> str:
        way = f" by {self.way}" if self.way else ""
        hidden = self.shape.hidden + self.shape.large_hidden
        return f"{self.operation} {self.mode}{way} {self.shape.tokens}x{hidden}x{self.shape.vocab}"

    def prediction(self, device: Device | None) -> Prediction | None:
        """What the model of the GPU paths predicts; None for an unknown device or a chosen way."""
        if device is None or self.way:
            return None
        shape = self.shape
        return predict(
            device, Case(self.operation, self.mode, shape.tokens, shape.hidden_sizes, shape.vocab)
        )


SMALLER, LARGER = (
    head_shape("Llama-3.1-8B", 4096, is_cpu=False),
    head_shape("Qwen3-8B", 8192, is_cpu=False),
)
GOALS = (
    Goal("linear_policy_loss", "both", SMALLER),
    Goal("linear_policy_loss", "both", LARGER),
    Goal("linear_logps", "forward", LARGER),
    Goal("linear_logps", "both", LARGER),
    Goal("linear_logps", "both", LARGER, "columns"),
    Goal("linear_logps", "both", odd_head()),
    Goal("linear_reverse_kl", "forward", larger_pair()),
)


def goal(case: Goal, device: Device | None) -> Iterator[Finding]:
    """Time by the GPU's and by the host's clock, and peak memory, each beside its prediction."""
    predicted = case.prediction(device)
    ms, gib = (None, None) if predicted is None else (predicted.ms, predicted.gib)
    batch = make_batch(case.shape, torch.bfloat16, torch.device("cuda"))
    runner = Runner(OPERATIONS[case.operation], getattr(ours, case.operation), batch)
    run = getattr(runner, case.mode)
    with experiments.way(case.way):
        on_gpu, on_host = gpu_times(run)
        peak = gpu_peak_mib(run, batch) / 1024
    yield beside(str(case), on_gpu, "ms", ms)
    yield beside(f"{case}, host clock", on_host, "ms", ms)
    yield beside(f"{case}, memory", peak, "GiB", gib)


def beside(what: str, measured: float, unit: str, predicted: float | None) -> Finding:
    """A number beside its prediction; None: nothing is predicted."""
    if predicted is None:
        return Finding(what, f"{measured:.4g}", unit, "-", "")
    ratio = measured / predicted
    verdict = OK if abs(ratio - 1) <= SURPRISE else f"{ratio:.2f} x the prediction"
    return Finding(what, f"{measured:.4g}", unit, f"{predicted:.4g}", verdict)


# --- the command -------------------------------------------------------------------------------


def first_steps() -> Iterator[Step]:
    """Names and functions of all that the command does by default, in order."""
    name, device = torch.cuda.get_device_name(), torch.device("cuda")
    yield "ceilings", lambda: ceilings(name)
    inputs = functools.cache(lambda: Inputs(REAL, Setting(torch.bfloat16, device, "triton")))
    for check in CHECKS:
        yield check.__name__, lambda check=check: check(inputs())
    inputs.cache_clear()
    for case in GOALS:
        yield str(case), lambda case=case: goal(case, device_named(name))


def experiment_steps() -> Iterator[Step]:
    return ((experiment.__name__, experiment) for experiment in experiments.EXPERIMENTS)


def run(steps: Iterator[Step], findings: Findings, seconds: float) -> int:
    """Run the steps and return exit code 1 if something failed. After an error in a step the next
    one still runs; after `seconds` none begins."""
    deadline = time.monotonic() + seconds
    for name, step in steps:
        if time.monotonic() > deadline:
            print(f"stopped after {seconds:g} s, before {name}")
            break
        try:
            for finding in step():
                findings.add(finding)
        except Exception as error:
            traceback.print_exc()
            findings.add(Finding(name, type(error).__name__, "", "", FAILED))
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
    print(f"failed: {', '.join(findings.failed) or 'nothing'}; all of it in {findings.table.path}")
    return 1 if findings.failed else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench first_contact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--experiments", action="store_true", help="run these instead")
    parser.add_argument("--seconds", type=float, default=170, help="no step begins later")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench first_contact must run on a GPU, found none", file=sys.stderr)
        return 2
    path = results.path_of(torch.device("cuda"), suffix="-first_contact")
    steps = experiment_steps() if options.experiments else first_steps()
    return run(steps, Findings(path), options.seconds)
