"""The table of divergences: slopes are derivatives of the values, and a wrong entry is found."""

import pytest
import torch
from numerics import seeded
from pairs import KINDS, every_kind

from codistill_kernels import reference
from codistill_kernels._pair.divergences import DIVERGENCES, Terms, logit_gradients


def check_slope(kind: str) -> None:
    """dz from the slope, against autograd through the value and through the definition."""
    generator = seeded(3)
    z, other = 3 * torch.randn(2, 20, 31, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    log_p, log_q = z.log_softmax(1), other.log_softmax(1)
    value = DIVERGENCES[kind](log_p, log_q, 0.3).value.sum(1)
    definition = reference.DIVERGENCES[kind](log_p, log_q, 0.3)
    torch.testing.assert_close(value, definition)
    (gold,) = torch.autograd.grad(definition.sum(), z)
    log_p = log_p.detach()
    rest = (log_p - log_p.max(1, keepdim=True).values).exp().sum(1) - 1
    dz = logit_gradients(log_p, rest, DIVERGENCES[kind](log_p, log_q, 0.3).slope)
    torch.testing.assert_close(dz, gold, rtol=1e-9, atol=1e-12)


@every_kind
def test_slope_is_the_derivative_of_the_value(kind):
    check_slope(kind)


@every_kind
@pytest.mark.parametrize("wrong", ["scaled", "sign", "of another kind", "value"])
def test_a_wrong_entry_is_found(kind, wrong, monkeypatch):
    right, other = DIVERGENCES[kind], DIVERGENCES[KINDS[KINDS.index(kind) - 1]]

    def entry(log_p, log_q, weight):
        value, slope = right(log_p, log_q, weight)
        return {
            "scaled": Terms(value, 1.001 * slope),
            "sign": Terms(value, -slope),
            "of another kind": Terms(value, other(log_p, log_q, weight).slope),
            "value": Terms(value + 1e-4, slope),
        }[wrong]

    monkeypatch.setitem(DIVERGENCES, kind, entry)
    with pytest.raises(AssertionError):
        check_slope(kind)


def test_each_kind_has_a_definition():
    assert DIVERGENCES.keys() == reference.DIVERGENCES.keys()
