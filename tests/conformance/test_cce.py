"""cut-cross-entropy's cases: rows sure of their token, softcap, bias, shift, ignored targets.

Its rule: an element may be off by what eager in the same dtype is off there, plus a tolerance of
the dtype. Not expressible, and not here: return_lse and the z-loss made of it.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from codistill_kernels.integrations.liger import LigerFusedLinearCrossEntropyLoss
from conformance.cases import grid

SHAPES = [(256, 512, 128), (252, 507, 128), (252, 507, 123)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VALUE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
GRADIENT = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def make_case(shape, dtype, has_bias, invalids):
    """hidden [4, T, H], weight, targets, bias; half of the tokens have a nearly certain target."""
    tokens, vocab, width = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype) / width**0.5
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    weight[: tokens // 2] = hidden[: tokens // 2]
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    if invalids:
        targets[torch.randperm(tokens, generator=generator)[: tokens // 5]] = -100
    bias = (0.02 * torch.randn(vocab, generator=generator)).to(dtype) if has_bias else None
    return hidden.view(4, -1, width), weight, targets.view(4, -1), bias


def eager(hidden, weight, targets, bias, softcap, reduction):
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide, targets, reduction=reduction)


def ours(hidden, weight, targets, bias, softcap, reduction):
    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap, reduction=reduction)
    return loss(weight, hidden, targets, bias)


def run(function, case, dtype, shift, softcap, reduction, needs=(True, True, True)):
    """The loss and the requested gradients by hidden states, weight and bias."""
    hidden, weight, targets, bias = case
    inputs = [None if t is None else t.to(dtype) for t in (hidden, weight, bias)]
    leaves = [
        None if t is None else t.clone().requires_grad_(need)
        for t, need in zip(inputs, needs, strict=True)
    ]
    x, w, b = leaves
    x, targets = x[:, : x.shape[1] - shift], targets[:, shift:]
    value = function(x.flatten(0, 1), w, targets.flatten(), b, softcap, reduction)
    counted = (targets != -100).sum()
    (value / counted if reduction == "sum" else value).mean().backward()
    return value.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def check(name, got, reference, gold, tolerance):
    error, allowed = (got - gold).abs(), (reference - gold).abs() + tolerance
    assert (error <= allowed).all(), f"{name}: {(error - allowed).max().item():.2e} too far"


@grid(
    default=14,
    dtype=DTYPES,
    shape=SHAPES,
    softcap=[None, 20.0],
    has_bias=[False, True],
    shift=[0, 1, 2],
    invalids=[False, True],
    reduction=["none", "mean", "sum"],
)
def test_value_and_gradients(dtype, shape, softcap, has_bias, shift, invalids, reduction):
    case = make_case(shape, dtype, has_bias, invalids)
    options = (shift, softcap, reduction)
    gold, gold_gradients = run(eager, case, torch.float64, *options)
    value, gradients = run(ours, case, dtype, *options)
    reference, eager_gradients = run(eager, case, dtype, *options)
    if reduction != "sum":  # as in its suite: of a sum only the gradients are judged
        check("loss", value, reference, gold, VALUE[dtype])
    for name, *three in zip(
        ("hidden", "weight", "bias"), gradients, eager_gradients, gold_gradients, strict=True
    ):
        if three[0] is not None:
            assert three[0].dtype == dtype
            check(name, *three, GRADIENT[dtype])


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, False), (False, False, True)])
def test_partial_gradients(needs):
    case = make_case(SHAPES[0], torch.bfloat16, True, False)
    options = (0, None, "mean", needs)
    _, gold = run(eager, case, torch.float64, *options)
    _, gradients = run(ours, case, torch.bfloat16, *options)
    _, reference = run(eager, case, torch.bfloat16, *options)
    for need, got, other, true in zip(needs, gradients, reference, gold, strict=True):
        assert (got is not None) == need
        if need:
            check("gradient", got, other, true, 1e-2)
