"""Liger-Kernel's cases. Chunked GRPO and scaled cross-entropy are compared with Liger itself. Its
fused cross-entropy needs a GPU and is replaced by torch's, as in its suite."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from codistill_kernels.integrations import liger as ours
from conformance.cases import grid

peer = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
SHAPES = [(3, 47, 31, 123), (8, 128, 1024, 4096)]  # B, T, H, V
TOLERANCE = {torch.float32: dict(atol=2e-5, rtol=1e-3), torch.bfloat16: dict(atol=1e-1, rtol=5e-1)}


def make_case(shape, dtype, has_bias, temperature=1.0, seed=0):
    """Liger's arguments: leaves, and the rest. The other policies' log-probabilities are close."""
    sequences, width, hidden, vocab = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    x, weight = (normal(*size).to(dtype) for size in ((sequences, width, hidden), (vocab, hidden)))
    bias = normal(vocab).to(dtype) if has_bias else None
    ids = torch.randint(0, vocab, (sequences, width), generator=generator)
    logits = x @ weight.T if bias is None else x @ weight.T + bias
    logps = (logits / temperature).float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    mask = (torch.rand(sequences, width, generator=generator) > 0.3).float()
    advantages = normal(sequences).to(dtype)
    advantages[0], advantages[1] = -advantages[0].abs(), advantages[1].abs()
    return (x, weight, bias), ids, mask, advantages, logps, normal


def run(loss, leaves, *arguments, **options):
    """loss, metrics, gradients"""
    x, weight, bias = (None if t is None else t.clone().requires_grad_() for t in leaves)
    value, metrics = loss(x, weight, *arguments, bias=bias, **options)
    value.backward()
    gradients = [t.grad for t in (x, weight, bias) if t is not None]
    return [value.detach(), *metrics, *gradients]


def check(settings, leaves, *arguments, tolerance, **options):
    theirs = peer.LigerFusedLinearGRPOLoss(compiled=False, **settings)
    expected = run(theirs, leaves, *arguments, **options)
    got = run(ours.LigerFusedLinearGRPOLoss(**settings), leaves, *arguments, **options)
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), **tolerance)


LOSSES = [
    (kind, level, delta)
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
    for level in ("token", "sequence")
    for delta in (None, 2.0)
    if not (kind in ("cispo", "sapo", "vespo") and (level == "sequence" or delta))
    and not (kind == "luspo" and level == "token")
]


def grpo_case(shape, dtype, has_bias, setting, reference, loss):
    beta, epsilon, temperature = setting
    kind, level, delta = loss
    settings: dict = dict(beta=beta, temperature=temperature, loss_type=kind, delta=delta)
    settings |= dict(epsilon_low=epsilon, epsilon_high=epsilon, importance_sampling_level=level)
    settings |= dict(max_completion_length=shape[1], use_ref_model=reference != "none")
    leaves, *arguments, logps, normal = make_case(shape, dtype, has_bias, temperature)
    options = {}
    if reference == "logps":
        options["ref_per_token_logps"] = logps + 0.01 * normal(*logps.shape)
    elif reference == "model":
        moved = [None if t is None else t + 0.01 * normal(*t.shape).to(t) for t in leaves]
        options = dict(zip(("ref_input", "ref_weight", "ref_bias"), moved, strict=True))
    if reference != "model":
        options["old_per_token_logps"] = logps + 0.01 * normal(*logps.shape)
    check(settings, leaves, *arguments, tolerance=TOLERANCE[dtype], **options)


AXES: dict = dict(
    has_bias=[False, True],
    setting=[(0.1, 0.2, 1.0), (0.0, 0.1, 2.0)],
    reference=["logps", "model", "none"],
    loss=LOSSES,
)


@grid(default=16, dtype=[torch.float32], **AXES)
def test_grpo(dtype, has_bias, setting, reference, loss):
    grpo_case(SHAPES[0], dtype, has_bias, setting, reference, loss)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_grpo_far_from_the_reference(loss):
    """The KL is as large as the rest; in the cases above it is smaller than the tolerance."""
    kind, level, delta = loss
    leaves, *arguments, logps, normal = make_case(SHAPES[0], torch.float32, False)
    settings = dict(beta=1.0, loss_type=kind, importance_sampling_level=level, delta=delta)
    settings |= dict(max_completion_length=SHAPES[0][1])
    others = ("old_per_token_logps", "ref_per_token_logps")
    options = {name: logps + 0.5 * normal(*logps.shape) for name in others}
    check(settings, leaves, *arguments, tolerance=TOLERANCE[torch.float32], **options)


@grid(
    default=4,
    dtype=[torch.bfloat16],
    **AXES | dict(loss=[loss for loss in LOSSES if loss[0] != "vespo"]),
)
def test_grpo_bf16(dtype, has_bias, setting, reference, loss):
    """vespo is left out, as in Liger's suite: its weight is exponential in rounding errors."""
    grpo_case(SHAPES[0], dtype, has_bias, setting, reference, loss)


@grid(
    default=0,
    has_bias=[False, True],
    setting=AXES["setting"],
    reference=["logps"],
    loss=[loss for loss in LOSSES if loss[0] != "vespo"],
)
def test_grpo_large(has_bias, setting, reference, loss):
    grpo_case(SHAPES[1], torch.float32, has_bias, setting, reference, loss)


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_corrected_kl(kind, level):
    leaves, *arguments, logps, normal = make_case(SHAPES[0], torch.float32, False)
    settings = dict(beta=0.1, loss_type=kind, importance_sampling_level=level)
    options = dict(old_per_token_logps=logps + normal(*logps.shape))
    options["ref_per_token_logps"] = logps + 0.1 * normal(*logps.shape)
    check(
        settings | dict(use_bias_correction_kl=True),
        leaves,
        *arguments,
        tolerance=dict(atol=1e-5, rtol=5e-4),
        **options,
    )


@grid(
    default=6,
    kind=["grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo"],
    beta=[0.0, 0.1],
    shape=["[B]", "[B, 1]", "[B, T]"],
)
def test_grpo_engine_ratio(kind, beta, shape):
    leaves, *arguments, logps, normal = make_case((4, 32, 64, 128), torch.float32, False)
    ratio = 0.001 + 0.999 * torch.rand(logps.shape, generator=torch.Generator().manual_seed(1))
    ratio = {"[B]": ratio[:, 0], "[B, 1]": ratio[:, :1], "[B, T]": ratio}[shape]
    level = "sequence" if kind == "luspo" else "token"
    settings = dict(beta=beta, loss_type=kind, importance_sampling_level=level)
    settings |= dict(use_ref_model=False)
    options = dict(vllm_is_ratio=ratio, old_per_token_logps=logps + 0.01 * normal(*logps.shape))
    tolerance = dict(atol=1e-5, rtol=5e-4)
    check(settings, leaves, *arguments, tolerance=tolerance, **options)


@pytest.mark.parametrize("kind", ["dapo", "cispo", "vespo"])
def test_grpo_num_items_in_batch(kind):
    leaves, ids, mask, advantages, *_ = make_case(SHAPES[0], torch.float32, False)
    settings = dict(beta=0.0, loss_type=kind, use_ref_model=False)
    arguments = (ids, mask, advantages)
    count = mask.sum().item()
    tolerance = dict(atol=1e-5, rtol=5e-4)
    for given in (1.7 * count, torch.tensor(2 * count)):
        check(settings, leaves, *arguments, tolerance=tolerance, num_items_in_batch=given)
    loss = ours.LigerFusedLinearGRPOLoss(**settings)
    alone, same, half = (
        run(loss, leaves, *arguments, num_items_in_batch=given)
        for given in (None, count, 2 * count)
    )
    for a, b, c in zip(
        alone[:1] + alone[2:], same[:1] + same[2:], half[:1] + half[2:], strict=True
    ):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, 2 * c)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dapo", "grpo"])
def test_grpo_of_a_long_sequence(kind):
    """More tokens and more of the vocabulary than one of Liger's chunks holds."""
    leaves, ids, mask, advantages, *_ = make_case((2, 4096, 256, 5000), torch.float32, False)
    settings = dict(beta=0.04, loss_type=kind, use_ref_model=False)
    tolerance = dict(atol=2e-5, rtol=1e-3)
    check(settings, leaves, ids, mask, advantages, tolerance=tolerance)


@grid(
    default=5,
    shape=[(4 * 47, 31, 123), (1024, 1024, 4096)],
    dtype=[torch.float32, torch.bfloat16],
    reduction=["mean", "sum", "none"],
    has_bias=[False, True],
    softcap=[None, 30.0],
    ignore_index=[-100, 42],
)
def test_cross_entropy(shape, dtype, reduction, has_bias, softcap, ignore_index):
    tokens, hidden, vocab = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = torch.rand(vocab, hidden, generator=generator).to(dtype)
    bias = torch.rand(vocab, generator=generator).to(dtype) if has_bias else None
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.randperm(tokens, generator=generator)[: tokens // 3]] = ignore_index
    upstream = torch.rand(tokens, generator=generator) if reduction == "none" else torch.ones(())

    def torch_loss(weight, x, targets, bias):
        logits = x @ weight.T if bias is None else x @ weight.T + bias
        logits = logits.float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)

    fused = ours.LigerFusedLinearCrossEntropyLoss(
        reduction=reduction, softcap=softcap, ignore_index=ignore_index
    )
    results = []
    for loss in (torch_loss, fused):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (weight, x, bias)]
        value = loss(leaves[0], leaves[1], targets, leaves[2])
        value.backward(upstream)
        results.append([value.detach(), *(t.grad for t in leaves if t is not None)])
    mean = dict(atol=1e-5, rtol=5e-4) if dtype == torch.float32 else dict(atol=5e-3, rtol=5e-2)
    whole = dict(atol=1e-3, rtol=5e-2) if dtype == torch.float32 else dict(atol=5.0, rtol=50.0)
    for other, mine in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, **mean if reduction == "mean" else whole)


@pytest.mark.parametrize("scaled", [False, True])
def test_cross_entropy_scaled_by_probability(scaled):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in ((19, 8), (31, 8)))
    targets = torch.randint(0, 31, (19,), generator=generator)
    targets[::5] = -100
    nll = cross_entropy(x @ weight.T, targets, reduction="none")
    expected = (nll * (-nll).exp() if scaled else nll).sum() / (targets != -100).sum()
    loss = ours.LigerFusedLinearCrossEntropyLoss(use_token_scaling=scaled)
    torch.testing.assert_close(loss(weight, x, targets), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((521, 7, 13), torch.float32),
        ((17, 31, 257), torch.float32),
        ((65, 64, 4096), torch.bfloat16),
        pytest.param((1025, 64, 131072), torch.bfloat16, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("outputs", ["nll", "entropy", "both"])
def test_scaled_cross_entropy(shape, dtype, outputs):
    """Compared with Liger's fallback for a CPU."""
    name = "LigerFusedLinearScaledCrossEntropyFunction"
    theirs = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    tokens, hidden, vocab = shape
    generator = torch.Generator().manual_seed(42)
    x = (0.25 * torch.randn(tokens, hidden, generator=generator)).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::11] = -100
    upstream = torch.randn(2, tokens, generator=generator)
    results = []
    for module in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        nll, entropy = getattr(module, name).apply(*leaves, targets, 0.8, -100, 2, True)
        parts = [(nll, upstream[0])] if outputs != "entropy" else []
        parts += [(entropy, upstream[1].to(entropy.dtype))] if outputs != "nll" else []
        torch.autograd.backward(*map(list, zip(*parts, strict=True)))
        results.append([nll.detach(), entropy.detach(), *(t.grad for t in leaves)])
    limits = dict(atol=6e-5, rtol=6e-5) if dtype == torch.float32 else dict(atol=8e-2, rtol=5e-2)
    for other, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), **limits)


def test_scaled_cross_entropy_alone():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in ((4, 8), (16, 8)))
    x.requires_grad_()
    nll = ours.LigerFusedLinearScaledCrossEntropyFunction.apply(x, weight, torch.arange(4))
    assert nll.shape == (4,)
    nll.sum().backward()
    assert x.grad is not None
