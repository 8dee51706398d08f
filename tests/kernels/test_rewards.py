"""Eq. 6, Eq. 7, Eq. 3 and section 3.3 by hand."""

import pytest
import torch

from codistill_kernels import downsample, group_advantages, kd_rewards, reference


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


def test_kd_rewards_without_alpha_are_the_rewards():
    rewards = torch.tensor([0.25, 1.0])
    tokens = torch.randn(2, 4)
    out = kd_rewards(rewards, *tokens, torch.tensor([0, 1, 4]), alpha=0, max_completion_tokens=3)
    assert torch.equal(out, rewards)


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


def test_downsample_by_hand():
    # group 0: best are 1 (0.9) and 4 (0.7), worst 2 (0.0) and 5 (0.1); group 1 starts at 6
    scores = torch.tensor([0.5, 0.9, 0.0, 0.4, 0.7, 0.1] + [3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert downsample(scores, 6, 4).tolist() == [1, 2, 4, 5, 6 + 1, 6 + 2, 6 + 3, 6 + 4]
    assert downsample(scores, 6, 2).tolist() == [1, 2, 6 + 1, 6 + 3]
    assert downsample(scores, 6, 6).tolist() == list(range(12))


def test_downsample_breaks_ties_by_place():
    assert downsample(torch.zeros(5), 5, 4).tolist() == [0, 1, 3, 4]
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert downsample(scores, 6, 2).tolist() == [0, 5]


def test_downsample_equals_reference():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (14 * 20,), generator=generator).float()  # many ties
    for keep in (2, 8, 14):
        assert torch.equal(downsample(scores, 14, keep), reference.downsample(scores, 14, keep))


TOKENS, ENDS = torch.zeros(4), torch.tensor([0, 1, 4])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: group_advantages(torch.zeros(5), 2), "group_size"),
        (lambda: group_advantages(torch.tensor([1, 0]), 2), "rewards"),
        (lambda: group_advantages(torch.zeros(4), 2, scale="max"), "scale"),
        (lambda: downsample(torch.zeros(4), 4, 3), "keep"),
        (lambda: downsample(torch.zeros(4), 4, 6), "keep"),
        (lambda: downsample(torch.tensor([1.0, torch.nan]), 2, 2), "scores"),
        (lambda: downsample(torch.zeros(4), 4, 2, method="best"), "method"),
        (lambda: eq6(cu_seqlens=torch.tensor([0, 1, 5])), "cu_seqlens"),
        (lambda: eq6(rewards=torch.zeros(3)), "cu_seqlens"),
        (lambda: eq6(teacher_logps=torch.zeros(4, 1)), "teacher_logps"),
        (lambda: eq6(student_logps=torch.zeros(3)), "student_logps"),
        (lambda: eq6(alpha=-1.0), "alpha"),
        (lambda: eq6(max_completion_tokens=0), "max_completion_tokens"),
        (lambda: eq6(estimator="k9"), "estimator"),
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
