"""QuACK's cases of chunked linear cross-entropy: bf16, real vocabularies, few or ragged tokens.

Its rule: the largest error of the loss is at most 3 times eager's, of a gradient 2 times.
"""

import torch
from torch.nn.functional import cross_entropy

from codistill_kernels.integrations.liger import LigerFusedLinearCrossEntropyLoss
from conformance.cases import grid


def make_case(tokens, width, vocab, ignored=0.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (0.1 * torch.randn(tokens, width, generator=generator)).bfloat16()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).bfloat16()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, targets


def run(dtype, hidden, weight, targets, loss):
    x, w = (t.to(dtype).requires_grad_() for t in (hidden.detach(), weight.detach()))
    value = loss(x, w, targets)
    value.backward()
    return value.detach(), x.grad, w.grad


def check(case, reduction):
    def eager(x, w, targets):
        return cross_entropy(
            (x @ w.T).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction=reduction
        )

    def ours(x, w, targets):
        return LigerFusedLinearCrossEntropyLoss(reduction=reduction)(w, x, targets)

    gold = run(torch.float64, *case, eager)
    reference = run(torch.bfloat16, *case, eager)
    got = run(torch.bfloat16, *case, ours)
    for name, factor, floor, mine, other, true in zip(
        ("loss", "hidden", "weight"),
        (3, 2, 2),
        (1e-5, 1e-4, 1e-4),
        got,
        reference,
        gold,
        strict=True,
    ):
        allowed = factor * (other - true).abs().max() + floor
        allowed += 2**-23 * true.abs().max()  # one digit of fp32: eager may be exact by luck
        assert (mine - true).abs().max() < allowed, name


@grid(
    default=1,
    reduction=["mean", "sum"],
    vocab=[32000, 50264],
    width=[768, 1024],
    tokens=[8, 16, 24],
)
def test_few_tokens(reduction, vocab, width, tokens):
    check(make_case(tokens, width, vocab), reduction)


@grid(default=0, reduction=["mean", "sum"], vocab=[128256], width=[768, 1024], tokens=[8, 24])
def test_few_tokens_of_a_large_vocabulary(reduction, vocab, width, tokens):
    check(make_case(tokens, width, vocab), reduction)


@grid(
    default=4,
    reduction=["mean", "sum"],
    vocab=[1536, 2048],
    width=[512, 768],
    tokens=[128, 600, 1024],
)
def test_ragged_and_ignored(reduction, vocab, width, tokens):
    check(make_case(tokens, width, vocab, ignored=0.15), reduction)


def test_equal_bits():
    case = make_case(128, 512, 1536, ignored=0.15)
    loss = LigerFusedLinearCrossEntropyLoss()
    first, second = (run(torch.bfloat16, *case, lambda x, w, y: loss(w, x, y)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
