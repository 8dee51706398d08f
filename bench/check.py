"""Whether an implementation computes the operation. One that does not pass gets no number.

Every output and every gradient is compared with fp64 in its worst row. Ours must keep the kernels'
tolerance: at most twice the error of eager PyTorch whose products are summed in fp32 and never
rounded (bench/tolerance.py). Peers may round logits as eager code in their dtype does, and have
four times the error of that.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from bench import eager
from bench.batch import Batch, make_batch
from bench.measure import upstream
from bench.operations import OURS, Operation, Run
from bench.shapes import ROLLOUTS_PER_PROMPT, Shape
from bench.tolerance import FACTOR, SCALAR_FLOOR, MatrixUnit, allowed_error, row_error

TOKENS = 128
PEER_FACTOR = 4.0


class CheckFailed(AssertionError):
    """The implementation computes something else, or not as accurately as its dtype permits."""


def small(shape: Shape) -> Shape:
    """The same model with few tokens: what a kernel does to a row does not depend on the others."""
    if not shape.vocab:
        sequences = 2 * ROLLOUTS_PER_PROMPT
        return dataclasses.replace(shape, tokens=16 * sequences, sequences=sequences)
    return dataclasses.replace(shape, tokens=min(shape.tokens, TOKENS))


@functools.lru_cache(maxsize=1)  # the implementations of a case are checked one after the other
def standards(
    operation: Operation, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, and eager PyTorch's results on them: in fp64, in `dtype` with products that are
    summed in fp32 and not rounded, and as one writes it in `dtype`."""
    batch = make_batch(small(shape), dtype, device)
    baseline = getattr(eager, operation.name)
    gold = results(operation, baseline, batch.to(torch.float64))
    with MatrixUnit(dtype):
        exact = results(operation, baseline, batch.to(torch.float32))
    plain = results(operation, baseline, batch.to(dtype))
    # A gradient is rounded once, to the dtype of its leaf.
    exact = [t.to(p.dtype) for t, p in zip(exact, plain, strict=True)]
    return batch, gold, exact, plain


def check(
    operation: Operation,
    implementation: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Largest relative error of a row, over all outputs and gradients.

    Raises:
        CheckFailed: a result is too far off.
    """
    batch, gold, exact, plain = standards(operation, shape, dtype, device)
    judge, factor = (exact, FACTOR) if implementation == OURS else (plain, PEER_FACTOR)
    found = results(operation, operation.implementations()[implementation].run, batch.to(dtype))
    errors = []
    for index, (got, base, target) in enumerate(zip(found, judge, gold, strict=True)):
        error, of_eager = row_error(got, target), row_error(base, target)
        if not error <= allowed_error(of_eager, factor=factor, floor=SCALAR_FLOOR):
            raise CheckFailed(
                f"result {index} is {error:.1e} off in its worst row, eager {of_eager:.1e}"
            )
        errors.append(error)
    return max(errors)


def results(operation: Operation, run: Run, batch: Batch) -> list[Tensor]:
    """Outputs and gradients, as far as the operation has them."""
    outputs = run(batch)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = [] if operation.gradient_only else [t.detach() for t in outputs]
    if operation.differentiable:
        torch.autograd.backward(outputs, upstream(outputs, batch))
        found += [leaf.grad for leaf in batch.leaves()]
    return found
