"""The tolerance itself: gradients that are known to be bad must not pass it."""

import pytest
import torch
from numerics import assert_as_accurate_as_eager

from codistill_kernels import reference


def logits_gradient(vocab: int):
    """d loss / d logits of 16 rows in fp64 and rounded to bf16; one row masked out."""
    generator = torch.Generator().manual_seed(0)
    rows = 16
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 2
    logits.requires_grad_()
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    ids[3] = -100
    eye = torch.eye(vocab, dtype=torch.float64) if vocab < 2000 else None
    if eye is None:
        log_p = logits.log_softmax(-1).gather(1, ids.clamp(min=0)[:, None]).squeeze(1)
        logps = torch.where(ids >= 0, log_p, 0.0)
    else:
        logps = reference.linear_logps(logits, eye, ids)
    logps.sum().backward()
    target = torch.zeros_like(logits, dtype=torch.bool)
    target[torch.arange(rows), ids.clamp(min=0)] = True
    return logits.grad, logits.grad.bfloat16(), {"target": target, "rest": ~target}


def zero_all(grad, target):
    return torch.zeros_like(grad)


def zero_non_target(grad, target):
    return torch.where(target, grad, 0.0)


def zero_target(grad, target):
    return torch.where(target, 0.0, grad)


def scale_by_1pct(grad, target):
    return grad.double() * 1.01


def one_row_2pct(grad, target):
    grad = grad.double().clone()
    grad[5] *= 1.02
    return grad


def leak_into_masked_row(grad, target):
    grad = grad.clone()
    grad[3, 7] = 1e-6
    return grad


MUTANTS = [
    zero_all,
    zero_non_target,
    zero_target,
    scale_by_1pct,
    one_row_2pct,
    leak_into_masked_row,
]


@pytest.mark.parametrize("vocab", [1024, 151936])
def test_tolerance_accepts_what_eager_gives(vocab):
    gold, eager, parts = logits_gradient(vocab)
    assert_as_accurate_as_eager("dlogits", eager, eager, gold, parts=parts)


@pytest.mark.parametrize("vocab", [1024, 151936])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_tolerance_rejects(mutant, vocab):
    gold, eager, parts = logits_gradient(vocab)
    with pytest.raises(AssertionError, match="error"):
        broken = mutant(eager, parts["target"])
        assert_as_accurate_as_eager("dlogits", broken, eager, gold, parts=parts)
