"""TRL's cases: log-probabilities of logits, and of hidden states by chunks of the vocabulary.

Not here: several ids a row, which the kernels refuse. Half precision differs on purpose: TRL asks
for the bits of a softmax in that dtype, these kernels give fp32 from the same logits.
"""

import pytest
import torch
from peers import log_softmax_head

from codistill_kernels import linear_logps, selective_logps

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selective_log_softmax(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (4, 32), generator=generator)
    logits = torch.randn(4, 32, 1024, generator=generator).to(dtype)
    gold = logits.double().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    got = selective_logps(logits, ids)
    torch.testing.assert_close(got.double(), gold, rtol=1e-5, atol=1e-5)
    if dtype in (torch.float16, torch.bfloat16):
        theirs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        assert (got - gold).abs().max() < 0.01 * (theirs - gold).abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(768,), (32, 128), (2, 16, 64)], ids=str)
def test_entropy_from_logits(dtype, shape):
    logits = torch.randn(*shape, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    log_p = logits.double().log_softmax(-1)
    _, entropy = selective_logps(logits, torch.zeros(shape, dtype=torch.int64), return_entropy=True)
    expected = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_log_probs(dtype, temperature, masked, softcap):
    """bf16 results against fp64 on the same operands. TRL's reference rounds logits to bf16."""
    generator = torch.Generator().manual_seed(42)
    x, weight = (
        torch.randn(*size, generator=generator).to(dtype) for size in ((64, 32), (128, 32))
    )
    labels = torch.randint(0, 128, (64,), generator=generator)
    keep = torch.rand(64, generator=generator) > 0.4 if masked else torch.ones(64) > 0
    options = dict(temperature=temperature, softcap=softcap)
    results = []
    for ours in (True, False):
        leaves = [
            t.clone().to(dtype if ours else torch.float64).requires_grad_() for t in (x, weight)
        ]
        if ours:
            ids = torch.where(keep, labels, -100)
            logps, entropy = linear_logps(*leaves, ids, return_entropy=True, **options)
        else:
            logps, entropy = log_softmax_head(*leaves, labels, **options)
            logps, entropy = (torch.where(keep, t, 0.0) for t in (logps, entropy))
        logps.sum().backward()
        results.append([logps, entropy, *(t.grad for t in leaves)])
    for index, (mine, other) in enumerate(zip(*results, strict=True)):
        is_rounded = dtype == torch.bfloat16 and index > 1
        tolerance = 1e-2 if is_rounded else 1e-5
        limits = dict(atol=tolerance * (4 if is_rounded else 1), rtol=tolerance)
        torch.testing.assert_close(mine.double(), other, **limits)
