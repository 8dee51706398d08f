"""Eq. 6, Eq. 4, Eq. 7 and Eq. 3 by hand."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from codistill_kernels import group_advantages, kd_rewards, reference
from codistill_kernels._estimators import OF_REWARDS


def test_kd_rewards_by_hand():
    # Eq. 6 with N = 10, alpha = 2: sequence 0 has log-ratios 0.5 and -0.1, sequence 1 none,
    # sequence 2 has 1.0: 1 + 2 * 0.4 / 10, 0 + 0, 0 + 2 * 1.0 / 10
    teacher, student = torch.tensor([-1.0, -2.1, -0.5]), torch.tensor([-1.5, -2.0, -1.5])
    ends = torch.tensor([0, 2, 2, 3])
    arguments = (torch.tensor([1.0, 0.0, 0.0]), teacher, student.requires_grad_(), ends)
    out = kd_rewards(*arguments, alpha=2.0, max_completion_tokens=10)
    assert out.tolist() == pytest.approx([1.08, 0.0, 0.2])
    assert not out.requires_grad and out.dtype == torch.float32
    gold = reference.kd_rewards(*arguments, alpha=2.0, max_completion_tokens=10)
    torch.testing.assert_close(out, gold.detach())


def test_kd_rewards_k3_by_hand():
    # Eq. 4 with x = teacher / student = 2, 0.5, 1: x - log x - 1 = 1 - log 2, log 2 - 0.5, 0.
    # Sequence 0 has the first two: 1 - 2 * 0.5 / 10; the KL estimate is taken away, never added.
    student = torch.tensor([-1.0, -2.0, -1.5])
    teacher = student + torch.tensor([math.log(2), -math.log(2), 0.0])
    arguments = (torch.tensor([1.0, 0.25, 0.0]), teacher, student, torch.tensor([0, 2, 2, 3]))
    terms = dict(alpha=2.0, max_completion_tokens=10, estimator="k3")
    assert kd_rewards(*arguments, **terms).tolist() == pytest.approx([0.9, 0.25, 0.0])


def test_kd_rewards_k3_of_close_models_keeps_its_digits():
    # d = 1e-4: exp(d) - 1 - d = d^2 / 2 (1 + d / 3) = 5.00017e-9, which fp32 would lose in 1.0001
    student = torch.zeros(1, dtype=torch.float64)
    terms = dict(alpha=1.0, max_completion_tokens=1, estimator="k3")
    out = kd_rewards(torch.zeros(1), student + 1e-4, student, torch.tensor([0, 1]), **terms)
    assert out.item() == pytest.approx(-5.0001667e-9, rel=1e-6)


def test_kd_rewards_without_alpha_are_the_rewards():
    rewards = torch.tensor([0.25, 1.0])
    tokens = torch.randn(2, 4)
    out = kd_rewards(rewards, *tokens, torch.tensor([0, 1, 4]), alpha=0, max_completion_tokens=3)
    assert torch.equal(out, rewards)


def test_kd_rewards_of_halves_are_subtracted_exactly():
    # bf16 holds these numbers; their differences it does not
    teacher = torch.tensor([-0.013, -7.03, -0.4], dtype=torch.bfloat16)
    student = torch.tensor([-5.03, -0.0021, -11.3], dtype=torch.bfloat16)
    out = kd_rewards(
        torch.zeros(3, dtype=torch.bfloat16),
        teacher,
        student,
        torch.arange(4),
        alpha=1.0,
        max_completion_tokens=1,
    )
    assert out.dtype == torch.float32
    assert out.tolist() == pytest.approx((teacher.double() - student.double()).tolist(), rel=1e-7)


def test_kd_rewards_leave_masked_tokens_out():
    # Eq. 6 with N = 10, alpha = 2 and log-ratios 0.5, (NaN), 1.0: 1 + 2 * 0.5 / 10, 2 * 1 / 10
    teacher, student = torch.tensor([-1.0, math.nan, -0.5]), torch.tensor([-1.5, -2.0, -1.5])
    terms = dict(alpha=2.0, max_completion_tokens=10, mask=torch.tensor([True, False, True]))
    for estimator, expected in (
        ("k1", [1.1, 0.2]),
        ("k3", [1 - 0.2 * (math.exp(0.5) - 1.5), -0.2 * (math.e - 2)]),
    ):
        arguments = (torch.tensor([1.0, 0.0]), teacher, student, torch.tensor([0, 2, 3]))
        out = kd_rewards(*arguments, **terms, estimator=estimator)
        assert out.tolist() == pytest.approx(expected)
        gold = reference.kd_rewards(*arguments, **terms, estimator=estimator)
        torch.testing.assert_close(out, gold)


def test_exact_kd_rewards_leave_masked_tokens_out():
    generator = torch.Generator().manual_seed(0)
    models = [
        tuple(torch.randn(shape, generator=generator) for shape in ((5, 4), (7, 4)))
        for _ in range(2)
    ]
    terms = dict(alpha=2.0, max_completion_tokens=3, estimator="exact", student=models[0])
    terms |= dict(teacher=models[1], mask=torch.tensor([1, 0, 1, 1, 0]).bool())
    arguments = (torch.ones(2), None, None, torch.tensor([0, 2, 5]))
    gold = reference.kd_rewards(*arguments, **terms)
    models[0][0][1] = torch.nan
    torch.testing.assert_close(kd_rewards(*arguments, **terms), gold)


def test_the_definition_divides_by_a_number_as_it_is():
    # Two tokens of logits 0, 7: KL of softmax(10) and softmax(0): p 10 - log(1 + e^10) + log 2.
    # A temperature of 0.7 rounded to fp32 (7 / 0.7 = 10 no more) is off by 1e-8.
    student, teacher = (torch.tensor([[0.0], [z]], dtype=torch.float64) for z in (7.0, 0.0))
    hidden = torch.ones(1, 1, dtype=torch.float64)
    out = reference.linear_reverse_kl((hidden, student), (hidden, teacher), temperature=0.7)
    p = 1 / (1 + math.exp(-10))
    expected = p * 10 - math.log1p(math.exp(10)) + math.log(2)
    assert out.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("estimator", [*OF_REWARDS, "exact"])
def test_kd_rewards_without_a_rollout(estimator):
    none, ends = torch.zeros(0), torch.tensor([0])
    terms = dict(alpha=1.0, max_completion_tokens=9, estimator=estimator)
    if estimator == "exact":
        model = (torch.zeros(0, 4), torch.zeros(6, 4))
        out = kd_rewards(none, None, None, ends, **terms, teacher=model, student=model)
    else:
        out = kd_rewards(none, none, none, ends, **terms)
    assert out.shape == (0,) and out.dtype == torch.float32


def test_group_advantages_of_halves_by_hand():
    # deviation of 0, 0, 0, d: d / 2; the mean d / 4: -0.25 / 0.5 three times and 0.75 / 0.5
    rewards = torch.tensor([1, 1, 1, 1.0078125], dtype=torch.bfloat16)
    assert group_advantages(rewards, 4, scale="std").tolist() == [-0.5, -0.5, -0.5, 1.5]
    # 150^2 is beyond fp16's 65504 / 4; the deviation is 300 / sqrt(3)
    rewards = torch.tensor([0, 300, 0, 300], dtype=torch.float16)
    out = group_advantages(rewards, 4, scale="std")
    assert out.dtype == torch.float16
    expected = [-math.sqrt(3) / 2, math.sqrt(3) / 2] * 2
    assert out.tolist() == pytest.approx(expected, rel=2**-11)
    # the sum of a large group is beyond fp16, too
    rewards = torch.tensor([0.0, 60000.0] * 4, dtype=torch.float16)
    assert group_advantages(rewards, 8).tolist() == [-30000, 30000] * 4


def test_group_advantages_with_eps():
    # mean 0.5, deviation sqrt(0.5): +-0.5 / (0.70711 + 0.25); equal ones stay 0
    rewards = torch.tensor([1.0, 0.0, 3.0, 3.0])
    out = group_advantages(rewards, 2, scale="std", eps=0.25)
    value = 0.5 / (math.sqrt(0.5) + 0.25)
    assert out.tolist() == pytest.approx([value, -value, 0.0, 0.0])
    gold = reference.group_advantages(rewards, 2, scale="std", eps=0.25)
    torch.testing.assert_close(out, gold)
    rewards = torch.tensor([1.0, 1.0000001] * 2)
    assert group_advantages(rewards, 4, scale="std").abs().max() > 0.8
    assert group_advantages(rewards, 4, scale="std", eps=1e-4).abs().max() < 2e-3


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 4.0, 6.0, 8.0])
    expected = [0.5, -0.5, -0.5, 0.5, -3.0, -1.0, 1.0, 3.0]
    assert group_advantages(rewards, 4).tolist() == expected  # Eq. 7
    # Eq. 3, sample deviation: sqrt(4 * 0.25 / 3) = 0.57735 and sqrt(20 / 3) = 2.58199
    scaled = [0.866025, -0.866025, -0.866025, 0.866025, -1.161895, -0.387298, 0.387298, 1.161895]
    out = group_advantages(rewards, 4, scale="std")
    assert out.tolist() == pytest.approx(scaled, rel=1e-5)
    torch.testing.assert_close(out, reference.group_advantages(rewards, 4, scale="std"))


@pytest.mark.parametrize("scale", [None, "std"])
def test_equal_rewards_have_no_advantage(scale):
    # The mean of three times 0.1 is not 0.1 in fp32: a deviation of 1e-9 would blow up.
    assert not group_advantages(torch.full((3,), 0.1), 3, scale=scale).any()
    assert not group_advantages(torch.full((2,), 0.1), 1, scale=scale).any()


def test_lengths_share_a_graph():
    def call(rewards):
        return group_advantages(rewards, 2, scale="std")

    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for length in range(10, 32, 2):
        rewards = torch.arange(length).roll(5).float()
        assert torch.equal(compiled(rewards), call(rewards))
    assert count.frame_count <= 2


TOKENS, ENDS = torch.zeros(4), torch.tensor([0, 1, 4])
NO_LOGPS = dict(teacher_logps=None, student_logps=None)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: group_advantages(torch.zeros(5), 2), "group_size"),
        (lambda: group_advantages(torch.tensor([1, 0]), 2), "rewards"),
        (lambda: group_advantages(torch.zeros(4), 2, scale="max"), "scale"),
        (lambda: eq6(cu_seqlens=torch.tensor([0, 1, 5])), "cu_seqlens"),
        (lambda: eq6(rewards=torch.zeros(3)), "cu_seqlens"),
        (lambda: eq6(teacher_logps=torch.zeros(4, 1)), "teacher_logps"),
        (lambda: eq6(student_logps=torch.zeros(3)), "student_logps"),
        (lambda: eq6(alpha=-1.0), "alpha"),
        (lambda: eq6(max_completion_tokens=0), "max_completion_tokens"),
        (lambda: eq6(estimator="k9"), "estimator"),
        (lambda: group_advantages(torch.zeros(4).numpy(), 2), "rewards"),
        (lambda: group_advantages(torch.zeros(4), 2, eps=1e-4), "eps"),
        (lambda: group_advantages(torch.zeros(4), 2, scale="std", eps=-1.0), "eps"),
        (lambda: eq6(rewards=torch.zeros(2).numpy()), "rewards"),
        (lambda: eq6(rewards=0.5), "rewards"),
        (lambda: eq6(teacher_logps=TOKENS.numpy()), "teacher_logps"),
        (lambda: eq6(student_logps=TOKENS.long()), "student_logps"),
        (lambda: eq6(student_logps=TOKENS.to("meta")), "student_logps"),
        (lambda: eq6(mask=torch.ones(4)), "mask"),
        (lambda: eq6(mask=torch.ones(4).bool().to("meta")), "mask"),
        (lambda: eq6(cu_seqlens=ENDS.short()), "cu_seqlens"),
        (lambda: eq6(cu_seqlens=ENDS.to("meta")), "cu_seqlens"),
        (lambda: eq6(temperature=0.7), "temperature"),
        (lambda: eq6(temperature=torch.ones(4)), "temperature"),
        (lambda: eq6(vocab_size=5), "vocab_size"),
        (lambda: eq6(backend="nonsense"), "backend"),
        (lambda: eq6(teacher=(TOKENS, TOKENS), estimator="k3"), "teacher"),
        (lambda: eq6(student=(TOKENS, TOKENS)), "student"),
        (lambda: eq6(estimator="exact"), "teacher_logps"),
        (lambda: eq6(estimator="exact", **NO_LOGPS), "teacher"),
        (lambda: eq6(estimator="exact", **NO_LOGPS, teacher=(TOKENS,)), "teacher"),
        (lambda: eq6(estimator="exact", **NO_LOGPS, teacher=(TOKENS.numpy(),) * 2), "teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call()


def eq6(**change):
    arguments = dict(
        rewards=torch.zeros(2),
        teacher_logps=TOKENS,
        student_logps=TOKENS,
        cu_seqlens=ENDS,
        alpha=1.0,
        max_completion_tokens=4,
    )
    return kd_rewards(**arguments | change)
