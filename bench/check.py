"""Whether an implementation computes the operation: no check passed, no number printed.

Each is compared with fp64, output by output and gradient by gradient, in the worst row. Ours must
pass the kernels' own contract: at most twice the error of eager whose products are summed in fp32
and never rounded (tests/numerics.py). Peers may round logits as eager code in their dtype does, and
be four times as far off as that.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from bench import eager
from bench.batch import Batch, make_batch
from bench.measure import upstream
from bench.operations import OURS, Operation, Run
from bench.shapes import ROLLOUTS_A_PROMPT, Shape
from tests.numerics import MatrixUnit, row_error

TOKENS = 128
CONTRACT_FACTOR, PEER_FACTOR = 2.0, 4.0
FLOOR = 1e-5  # a scalar sums terms of both signs: its relative error is luck to some extent
CEILING = 0.05  # of the error that is multiplied: beyond it a result has no correct digit to spare


class CheckFailed(AssertionError):
    """Not this operation, or not to the accuracy of its dtype."""


def small(shape: Shape) -> Shape:
    """Few tokens, the same model: what a kernel does to a row does not depend on their number."""
    if not shape.vocab:
        sequences = 2 * ROLLOUTS_A_PROMPT
        return dataclasses.replace(shape, tokens=16 * sequences, sequences=sequences)
    return shape.with_tokens(min(shape.tokens, TOKENS))


@functools.lru_cache(maxsize=1)  # implementations of one case follow each other
def standards(
    operation: Operation, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs; results in fp64, of eager with sums in fp32 (the contract), of eager in `dtype`."""
    batch = make_batch(small(shape), dtype, device)
    baseline = getattr(eager, operation.name)
    gold = results(operation, baseline, batch.to(torch.float64))
    with MatrixUnit(dtype):
        exact = results(operation, baseline, batch.to(torch.float32))
    plain = results(operation, baseline, batch.to(dtype))
    # A matrix's gradient is rounded once, to what its leaf holds.
    exact = [t.to(p.dtype) for t, p in zip(exact, plain, strict=True)]
    return batch, gold, exact, plain


def check(
    operation: Operation,
    implementation: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The error: of its worst row, relative, over everything it returns.

    Raises:
        CheckFailed: it is too large.
    """
    batch, gold, exact, plain = standards(operation, shape, dtype, device)
    judge, factor = (exact, CONTRACT_FACTOR) if implementation == OURS else (plain, PEER_FACTOR)
    found = results(operation, operation.implementations()[implementation].run, batch.to(dtype))
    errors = []
    for index, (got, base, target) in enumerate(zip(found, judge, gold, strict=True)):
        error, allowed = row_error(got, target), row_error(base, target)
        limit = factor * min(allowed, CEILING) + FLOOR
        if not error <= limit:
            raise CheckFailed(
                f"result {index} is {error:.1e} off in its worst row, eager {allowed:.1e}"
            )
        errors.append(error)
    return max(errors)


def results(operation: Operation, run: Run, batch: Batch) -> list[Tensor]:
    """Outputs and, where there are any, gradients."""
    outputs = run(batch)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = [] if operation.gradient_only else [t.detach() for t in outputs]
    if operation.differentiable:
        torch.autograd.backward(outputs, upstream(outputs, batch))
        found += [leaf.grad for leaf in batch.leaves()]
    return found
