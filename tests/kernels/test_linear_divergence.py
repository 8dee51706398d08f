"""linear_divergence: the loss of on-policy distillation in every kind, and its gradient, against
fp64."""

import math

import pytest
import torch
from numerics import DTYPES, seeded
from pairs import (
    KINDS,
    as_dtype,
    as_leaves,
    check,
    every_backend,
    every_kind,
    make_models,
    with_gradients,
)

from codistill_kernels import linear_divergence, reference

CASES = {
    "sizes differ": (dict(), dict()),
    "|z| to 60, cut": (dict(std=8.0), dict(vocab_size=999, temperature=0.7)),
    "one row": (dict(rows=1, hidden=(63, 96), vocab=(7, 5)), dict()),
    "scaled apart": (dict(), dict(logit_scale=(2.0, 0.3), softcap=(None, 3.0), temperature=0.7)),
    "capped": (dict(std=4.0), dict(softcap=4.0, logit_scale=0.5)),
}


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
@pytest.mark.parametrize(("shapes", "options"), CASES.values(), ids=CASES)
def test_equals_fp64_as_well_as_eager(shapes, options, kind, dtype, backend):
    student, teacher = make_models(dtype, **shapes)
    check(student, teacher, backend, torch.ones(()), kind=kind, normalizer=7.0, **options)


@every_backend
@every_kind
def test_each_value_has_its_own_gradient(kind, backend):
    student, teacher = make_models()
    weights = torch.linspace(-1, 2, 24).where(torch.arange(24) % 7 != 3, torch.zeros(()))
    mask = torch.arange(24) % 5 != 0
    temperature = torch.linspace(0.5, 1.5, 24)
    options = dict(kind=kind, reduction="none", mask=mask)
    reference_options = options | dict(temperature=temperature.double())
    gold = with_gradients(
        reference.linear_divergence,
        as_leaves(student, torch.float64),
        as_dtype(teacher, torch.float64),
        weights,
        **reference_options,
    )
    ours = with_gradients(
        linear_divergence,
        as_leaves(student),
        teacher,
        weights,
        backend=backend,
        temperature=temperature,
        **options,
    )
    for got, wanted in zip(ours, gold, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)


@every_backend
@pytest.mark.parametrize("weight", [0.1, 0.9])
def test_weight_of_jsd(weight, backend):
    student, teacher = make_models()
    check(student, teacher, backend, torch.ones(()), kind="jsd", jsd_weight=weight)


@every_backend
@every_kind
def test_rows_that_are_sure_of_a_token(kind, backend):
    """p - 1 of a peaked row is all rounding unless it is made of the others; so is its divergence
    from a teacher that is as sure. The head is the identity, so that each logit is judged."""
    rows, vocab = 4, 600
    head = (torch.eye(vocab), None)
    sure = 23.0 * torch.eye(rows, vocab)
    noise = torch.randn(3, rows, vocab, generator=seeded(1))
    student = (sure + noise[0], *head)
    for other in (0.95 * sure + noise[1], sure.roll(1, 0) + noise[1], noise[2]):
        teacher = (other, *head)
        check(student, teacher, backend, torch.ones(()), kind=kind, reduction="none")
        check(teacher, student, backend, torch.ones(()), kind=kind, reduction="none")


@every_backend
def test_by_hand(backend):
    """p = (1/2, 1/2), q = (1/4, 3/4), m = (3/8, 5/8)"""
    one = torch.ones(1, 1)
    weights = (torch.zeros(2, 1), torch.tensor([[0.0], [math.log(3)]]))
    to_m = (math.log(4 / 3) + math.log(4 / 5)) / 2, math.log(2 / 3) / 4 + 3 * math.log(6 / 5) / 4
    values = {
        "reverse_kl": math.log(2) - math.log(3) / 2,
        "forward_kl": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        "jsd": sum(to_m) / 2,
    }
    slopes = {  # by the second logit of the student
        "reverse_kl": -math.log(3) / 4,
        "forward_kl": 1 / 2 - 3 / 4,
        "jsd": (math.log(4 / 5) - to_m[0]) / 4,
    }
    for kind in KINDS:
        leaf = weights[0].clone().requires_grad_()
        loss, stats = linear_divergence((one, leaf), (one, weights[1]), kind=kind, backend=backend)
        loss.backward()
        assert loss.item() == stats["divergence"].item() == pytest.approx(values[kind])
        assert leaf.grad[:, 0].tolist() == pytest.approx([-slopes[kind], slopes[kind]])
