"""Metrics of one step: collected on each process, then reduced over all processes at once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.failures import phase


class StepMetrics:
    """Named numbers of one step. In a `mean` every value counts the same, on whichever process it
    was measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.phases: list[str] = []
        """Names of the timers that run, from the outermost to the innermost."""

    def mean(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add `count` values whose sum is `total` to a mean."""
        self.add(self.sums, name, total)
        self.add(self.counts, name, count)

    def mean_of(self, name: str, values: Tensor) -> None:
        """Add all elements of `values` to a mean."""
        self.mean(name, values.sum(), values.numel())

    def total(self, name: str, value: Tensor | float) -> None:
        """Add to a sum over micro-batches and processes."""
        self.add(self.totals, name, value)

    def maximum(self, name: str, value: Tensor | float) -> None:
        """Keep the largest value, over micro-batches and processes; NaN if one is NaN."""
        value = self.scalar(value)
        self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Seconds that all blocks of this name, time/PHASE, take, on the slowest process.

        On a GPU also memory/PHASE, the most that was allocated in one of them (GiB).

        Raises:
            Failure: the block raised an error that is not foreseen; it names the phase.
        """
        start = time.perf_counter()
        self.record_memory()
        self.phases.append(name)
        with phase(name.removeprefix("time/")):
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.add(self.maxima, name, time.perf_counter() - start)
        self.record_memory()
        self.phases.pop()

    def record_memory(self) -> None:
        """Add the peak since the last call to all phases that run: each is part of those around."""
        if self.device.type != "cuda":
            return
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        for name in self.phases:
            self.maximum(name.replace("time/", "memory/"), peak)
        torch.cuda.reset_peak_memory_stats(self.device)

    def reduce(self) -> dict[str, float]:
        """The numbers over all processes; a mean of no values at all is left out.

        Collective: every process must call, with the same names collected.
        """
        means, totals, peaks = sorted(self.sums), sorted(self.totals), sorted(self.maxima)
        parts = [self.sums[name] for name in means] + [self.counts[name] for name in means]
        added = self.stacked(parts + [self.totals[name] for name in totals])
        maxima = self.stacked([self.maxima[name] for name in peaks])
        # The largest of numbers and NaN is NaN on some backends only, so flags go beside them.
        flagged = torch.stack(
            [maxima.nan_to_num(-torch.inf, torch.inf, -torch.inf), maxima.isnan().double()]
        )
        dist.all_reduce(added)
        dist.all_reduce(flagged, op=dist.ReduceOp.MAX)
        maxima = torch.where(flagged[1] > 0, torch.nan, flagged[0])
        sums, counts, whole = added.tensor_split((len(means), 2 * len(means)))
        averages = zip(means, (sums / counts).tolist(), counts.tolist(), strict=True)
        numbers = {name: average for name, average, count in averages if count}
        numbers |= dict(zip(totals, whole.tolist(), strict=True))
        return numbers | dict(zip(peaks, maxima.tolist(), strict=True))

    def add(self, store: dict[str, Tensor], name: str, value: Tensor | float) -> None:
        store[name] = store.get(name, 0.0) + self.scalar(value)

    def scalar(self, value: Tensor | float) -> Tensor:
        """Where the value is: what comes from the host stays there until all is reduced."""
        return torch.as_tensor(value, dtype=torch.float64).detach()

    def stacked(self, numbers: list[Tensor]) -> Tensor:
        return torch.stack([number.to(self.device, non_blocking=True) for number in numbers])
