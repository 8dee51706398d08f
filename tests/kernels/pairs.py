"""Pairs of a student and a teacher for the tests of divergences, and how a divergence is judged."""

import pytest
import torch
from numerics import BACKENDS, MatrixUnit, assert_as_accurate_as_eager, seeded

from codistill_kernels import linear_divergence, reference
from codistill_kernels._pair.divergences import DIVERGENCES

KINDS = tuple(DIVERGENCES)
NAMES = ("hidden states", "weight", "bias")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_models(dtype=torch.float32, *, rows=24, hidden=(24, 40), vocab=(1021, 1100), std=2.0):
    """(hidden states, weight, bias) of a student, and of a teacher that differs in both sizes."""
    generator = seeded(0)
    return tuple(
        (
            torch.randn(rows, h, generator=generator).to(dtype),
            (std * torch.randn(v, h, generator=generator) / h**0.5).to(dtype),
            torch.randn(v, generator=generator).to(dtype),
        )
        for h, v in zip(hidden, vocab, strict=True)
    )


def as_dtype(model, dtype):
    return tuple(t if t is None else t.to(dtype) for t in model)


def as_leaves(model, dtype=None):
    return tuple(
        t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in model
    )


def with_gradients(function, student, teacher, weights, **options):
    """Values or loss, and the gradients by the student of their sum with these weights."""
    out = function(student, teacher, **options)
    value = out[0] if isinstance(out, tuple) else out
    (value * weights.to(value.dtype)).sum().backward()
    return [value.detach(), *(t.grad for t in student if t is not None)]


def check(student, teacher, backend, weights, **options):
    dtype = student[0].dtype
    results = []
    for precision in (torch.float32, torch.float64):
        models = as_leaves(student, precision), as_dtype(teacher, precision)
        with MatrixUnit(dtype if precision == torch.float32 else precision):
            found = with_gradients(reference.linear_divergence, *models, weights, **options)
        results.append(found)
    ours = with_gradients(
        linear_divergence, as_leaves(student), teacher, weights, backend=backend, **options
    )
    assert ours[0].dtype == torch.float32
    for name, got, eager, gold in zip(("value", *NAMES), ours, *results, strict=False):
        floor = 1e-5 if got.ndim == 0 else 1e-6  # one number: luck to some extent
        assert_as_accurate_as_eager(name, got, eager.to(got.dtype), gold, floor=floor)
