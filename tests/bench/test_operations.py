"""The benchmark's operations: all implementations compute the same, and the check can tell."""

import dataclasses

import pytest
import torch

from bench import check, eager, measure, ours
from bench.batch import make_batch
from bench.operations import OPERATIONS, OURS, Implementation
from bench.shapes import Shape, rollout_shape
from codistill_kernels import reference

CPU = torch.device("cpu")
HEAD = Shape("test", tokens=64, hidden=32, vocab=301, inactive=0.25)
SHAPES = {
    "linear_logps": dataclasses.replace(HEAD, inactive=0.0),
    "linear_policy_loss": HEAD,
    "linear_cross_entropy": HEAD,
    "codistill_losses": dataclasses.replace(HEAD, large_hidden=48, logit_gap=0.02),
    "linear_reverse_kl": dataclasses.replace(HEAD, large_hidden=48),
    "linear_divergence": dataclasses.replace(HEAD, large_hidden=48, has_teacher=True),
    "selective_logps": dataclasses.replace(HEAD, hidden=0, inactive=0.0),
}
ROLLOUTS = rollout_shape(prompts=2, tokens=8)
CASES = [
    (operation, name)
    for operation in OPERATIONS
    for name, implementation in OPERATIONS[operation].implementations().items()
    if not implementation.missing(CPU) and name != "torch.compile"  # compiles for a minute
]


def shape_of(operation: str) -> Shape:
    return SHAPES.get(operation, ROLLOUTS)


@pytest.mark.parametrize(("operation", "name"), CASES)
def test_implementations_pass_the_check(operation, name):
    error = check.check(OPERATIONS[operation], name, shape_of(operation), torch.float32, CPU)
    assert error < 1e-3


@pytest.mark.parametrize("operation", ["linear_logps", "linear_policy_loss"])
@pytest.mark.parametrize("name", [OURS, "eager"])
def test_vocabulary_may_be_less_than_the_head(operation, name):
    shape = dataclasses.replace(shape_of(operation), head_rows=320)
    batch = make_batch(shape, torch.float32, CPU)
    assert len(batch.models[0][1]) == 320 and len(batch.weight) == 301 > batch.token_ids.max()
    assert check.check(OPERATIONS[operation], name, shape, torch.float32, CPU) < 1e-3


def definitions(batch):
    """Results of those operations that codistill_kernels.reference defines under the same name."""
    terms = ours.loss_terms(batch)
    weights = dict(truncate=eager.TRUNCATE)
    logps = (batch.other_logps, batch.old_logps)
    sequences = (batch.rewards, *logps, batch.cu_seqlens)
    return {
        "linear_logps": lambda: reference.linear_logps(*batch.models[0], batch.token_ids),
        "linear_policy_loss": lambda: reference.policy_loss(
            reference.linear_logps(*batch.models[0], batch.token_ids), **terms
        ),
        "linear_reverse_kl": lambda: reference.linear_reverse_kl(*batch.models),
        "linear_divergence": lambda: reference.linear_divergence(
            *batch.models, batch.mask, kind="jsd", normalizer=batch.mask.sum()
        ),
        "selective_logps": lambda: reference.selective_logps(batch.logits, batch.token_ids),
        "policy_loss": lambda: reference.policy_loss(batch.other_logps, **terms),
        "importance_weights": lambda: reference.importance_weights(*logps, batch.mask, **weights),
        "kd_rewards": lambda: reference.kd_rewards(*sequences, **ours.KD),
        "group_advantages": lambda: reference.group_advantages(batch.rewards, 14),
        "downsample": lambda: reference.downsample(batch.rewards, 14, 8),
    }


NAMES = sorted(definitions(make_batch(HEAD, torch.float64, CPU)))


@pytest.mark.parametrize("operation", NAMES)
def test_gold_is_the_definition(operation):
    batch = make_batch(shape_of(operation), torch.float32, CPU).to(torch.float64)
    expected = definitions(batch)[operation]()
    torch.testing.assert_close(getattr(eager, operation)(batch), expected, rtol=1e-9, atol=1e-12)


def broken(operation: str, change) -> Implementation:
    run = getattr(ours, operation)
    return Implementation(lambda batch: change(run(batch)), "codistill-grpo")


class ScaledGradient(torch.autograd.Function):
    """The identity with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype", "change"),
    [
        (OURS, FP32, lambda t: 1.01 * t),
        (OURS, FP32, ScaledGradient.apply),
        (OURS, BF16, lambda t: 1.01 * t),
        (OURS, BF16, ScaledGradient.apply),
        ("eager", FP32, lambda t: 1.01 * t),
        ("eager", FP32, ScaledGradient.apply),
        # A peer's gradient may be 1 % off: rounded logits cost as much.
        ("eager", BF16, lambda t: 1.01 * t),
    ],
)
def test_check_rejects_one_percent(monkeypatch, name, dtype, change):
    operation = OPERATIONS["linear_logps"]
    wrong = broken("linear_logps", change)
    implementations = operation.implementations() | {name: wrong}
    monkeypatch.setattr(type(operation), "implementations", lambda self: implementations)
    with pytest.raises(check.CheckFailed, match="off in its worst row"):
        check.check(operation, name, SHAPES["linear_logps"], dtype, CPU)


def test_batch_is_what_it_says():
    batch = make_batch(HEAD, torch.float32, CPU)
    assert batch.mask.sum() == HEAD.active == 48
    ratio = (eager.linear_logps(batch) - batch.old_logps).exp()
    beyond = (ratio - 1).abs() > 0.2
    assert 0 < beyond.sum() <= HEAD.tokens / 32  # few tokens are clipped, and none is near a bound
    assert ((ratio - 0.8).abs() > 0.02).all() and ((ratio - 1.2).abs() > 0.02).all()


def test_work_counts_active_tokens_and_nothing_twice():
    operation = OPERATIONS["linear_policy_loss"]
    assert operation.flops(HEAD, "forward") == 2 * 48 * 32 * 301
    assert operation.flops(HEAD, "both") == 6 * 48 * 32 * 301
    pair = SHAPES["codistill_losses"]
    assert OPERATIONS["codistill_losses"].flops(pair, "both") == 6 * 48 * (32 + 48) * 301
    taught = SHAPES["linear_divergence"]
    divergence = OPERATIONS["linear_divergence"]
    assert divergence.flops(taught, "forward") == 2 * 48 * (32 + 48) * 301
    assert divergence.flops(taught, "both") == 48 * (6 * 32 + 2 * 48) * 301


def test_a_teacher_is_not_differentiated():
    batch = make_batch(SHAPES["linear_divergence"], torch.float32, CPU)
    needs = [tensor.requires_grad for model in batch.models for tensor in model]
    assert needs == [True, True, False, False] and len(batch.leaves()) == 2
    both = make_batch(SHAPES["codistill_losses"], torch.float32, CPU)
    assert len(both.leaves()) == 4 and all(leaf.requires_grad for leaf in both.leaves())


def test_memory_of_logits_is_seen():
    """Eager holds [N, V] in fp32 at least once; ours does not."""
    shape = dataclasses.replace(HEAD, tokens=1024, vocab=8192, inactive=0.0)
    logits_mib = 1024 * 8192 * 4 / 2**20
    operation = OPERATIONS["linear_logps"]
    runner = measure.Runner(operation, eager.linear_logps, make_batch(HEAD, torch.float32, CPU))
    held, ours_held = (
        measure.extra_mib(operation, name, shape, "fp32", runner)["forward"]
        for name in ("eager", OURS)
    )
    assert logits_mib <= held <= 4 * logits_mib
    assert ours_held < logits_mib / 2
