"""Time and memory of one implementation on one case.

    python -m bench.measure '{"operation": ..., "implementation": ..., "dtype": ..., "shape": ...}'

prints the extra memory on a CPU. There the peak can only be measured in a process of its own.
"""

import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.batch import Batch, make_batch
from bench.operations import OPERATIONS, Operation, Run
from bench.shapes import Shape

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SECONDS = {"cpu": 1.0, "cuda": 0.3}  # that the rounds of one measurement may take
ROUNDS = (5, 50)  # at least and at most
L2_BYTES = 256 * 2**20  # larger than any L2; written between rounds, so that no input is cached
SLEEP_CYCLES = 200_000  # about 0.1 ms: time for the host to launch one run
# Freed memory goes back to the system at once: memory left by an earlier call would hide a peak.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class Runner:
    """Runs an implementation: its forward pass without a graph, its backward pass, or both."""

    def __init__(self, operation: Operation, run: Run, batch: Batch) -> None:
        self.operation, self.run, self.batch = operation, run, batch
        self.is_gpu = batch.mask.is_cuda

    def forward(self) -> None:
        with torch.no_grad():
            self.run(self.batch)

    def graph(self) -> tuple[Tensor, ...]:
        """The outputs, with a graph to go back through."""
        drop_gradients(self.batch)
        outputs = self.run(self.batch)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        torch.autograd.backward(outputs, upstream(outputs, self.batch))

    def both(self) -> None:
        self.backward(self.graph())

    def synchronized(self, function: Callable, *arguments: object) -> None:
        """Call the function and wait for the GPU."""
        function(*arguments)
        if self.is_gpu:
            torch.cuda.synchronize()

    def before_round(self, mode: str) -> tuple[tuple, dict]:
        """Arguments of `synchronized` for a round, in the form of pytest-benchmark's setup."""
        function = {"forward": self.forward, "backward": self.backward, "both": self.both}[mode]
        arguments = (function, self.graph()) if mode == "backward" else (function,)
        if self.is_gpu:
            torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda").zero_()
            torch.cuda.synchronize()
        return arguments, {}

    def time(self, benchmark, mode: str) -> list[float]:
        """Seconds of each round. Before them one round warms up, and one decides their number."""
        arguments, _ = self.before_round(mode)
        self.synchronized(*arguments)
        start = time.perf_counter()
        arguments, _ = self.before_round(mode)
        self.synchronized(*arguments)
        once = time.perf_counter() - start
        budget = SECONDS[self.batch.mask.device.type]
        rounds = min(max(int(budget / once), ROUNDS[0]), ROUNDS[1])
        benchmark.pedantic(
            self.synchronized, setup=lambda: self.before_round(mode), rounds=rounds, iterations=1
        )
        return benchmark.stats.stats.data


def drop_gradients(batch: Batch) -> None:
    for leaf in batch.leaves():
        leaf.grad = None


def upstream(outputs: tuple[Tensor, ...], batch: Batch) -> list[Tensor]:
    """The gradient that arrives at each output; it is 1 at a loss."""
    return [
        (batch.upstream if output.ndim else torch.ones_like(output)).to(output.dtype)
        for output in outputs
    ]


def matmul_seconds(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Fastest of five products [N, H] x [H, V], added up over the models; 0 without a head."""
    seconds = 0.0
    for hidden in shape.hidden_sizes:
        x = torch.randn(shape.tokens, hidden, device=device).to(dtype)
        weight = torch.randn(shape.weight_rows, hidden, device=device).to(dtype)
        out = torch.empty(shape.tokens, shape.weight_rows, dtype=dtype, device=device)
        times = []
        for _ in range(6):  # the first warms up
            start = time.perf_counter()
            torch.mm(x, weight.T, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds += min(times[1:])
    return seconds


def gpu_times(
    run: Callable[[], object], *, rounds: int = 10, repeats: int = 1
) -> tuple[float, float]:
    """Median milliseconds of a run: between two events on the GPU, and by the host's clock.

    With `repeats` > 1 the runs of a round follow each other without a gap, for runs that are
    shorter than the time to launch them. The host's time then says nothing.
    """
    run()  # compiles
    on_gpu, on_host = [], []
    for _ in range(rounds):
        torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda").zero_()
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        if repeats > 1:
            torch.cuda._sleep(repeats * SLEEP_CYCLES)  # until all are launched
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize()
        on_host.append(1e3 * (time.perf_counter() - start) / repeats)
        on_gpu.append(first.elapsed_time(last) / repeats)
    return statistics.median(on_gpu), statistics.median(on_host)


# --- memory ------------------------------------------------------------------------------------


def extra_mib(
    operation: Operation, implementation: str, shape: Shape, dtype: str, runner: Runner
) -> dict[str, float]:
    """Peak MiB beside the inputs in each mode, gradients and outputs included."""
    modes = [mode for mode in operation.modes if mode != "backward"]
    if runner.is_gpu:
        return {mode: gpu_peak_mib(getattr(runner, mode), runner.batch) for mode in modes}
    task = dict(
        operation=operation.name,
        implementation=implementation,
        dtype=dtype,
        shape=dataclasses.asdict(shape),
    )
    done = subprocess.run(
        [sys.executable, "-m", "bench.measure", json.dumps(task)],
        cwd=ROOT,
        env=os.environ | MALLOC,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"memory of {task}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def gpu_peak_mib(run: Callable[[], None], batch: Batch) -> float:
    """Peak MiB of a run on the GPU, beyond what is allocated before it."""
    run()  # compiles, and allocates what libraries keep
    drop_gradients(batch)  # so that memory before the run does not include them
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_mib(field: str) -> float:
    """This process's memory: VmRSS is its size now, VmHWM its peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: the peak needs Linux")


def cpu_peak_mib(run: Callable[[], None], batch: Batch) -> float:
    """Peak MiB of a run on the CPU, beyond the size of the process before it."""
    run()
    drop_gradients(batch)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_mib("VmRSS")
    run()
    return resident_mib("VmHWM") - before


def main() -> None:
    """Print the extra memory of each mode as JSON; the task is the only argument, as JSON too."""
    task = json.loads(sys.argv[1])
    operation = OPERATIONS[task["operation"]]
    run = operation.implementations()[task["implementation"]].run
    device = torch.device("cpu")
    batch = make_batch(Shape(**task["shape"]), DTYPES[task["dtype"]], device)
    runner = Runner(operation, run, batch)
    modes = [mode for mode in operation.modes if mode != "backward"]
    print(json.dumps({mode: cpu_peak_mib(getattr(runner, mode), batch) for mode in modes}))


if __name__ == "__main__":
    main()
