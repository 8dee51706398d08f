"""Statistics of paired runs, against numbers computed by hand and from printed tables."""

import math

import pytest

from study.statistics import Paired, holm, t_quantile, verdict


def test_pairs_are_formed_by_seed():
    """In whatever order, and only of the seeds that both methods have."""
    paired = Paired.of({2: 0.8, 0: 0.5, 1: 0.6, 9: 0.1}, {0: 0.4, 1: 0.4, 7: 1.0, 2: 0.5})
    assert paired.differences == pytest.approx((0.1, 0.2, 0.3))
    assert (paired.n, paired.in_favour) == (3, 3)


def test_mean_interval_and_p():
    paired = Paired((0.1, 0.2, 0.3))
    # s = 0.1, s / sqrt(3) = 0.057735, q = 4.302653
    assert paired.mean == pytest.approx(0.2)
    assert paired.error == pytest.approx(0.0577350)
    assert paired.interval == pytest.approx((0.2 - 0.2484137, 0.2 + 0.2484137), abs=1e-6)
    # With two degrees of freedom P(|t| < x) = x / sqrt(x^2 + 2); t = 0.2 / 0.057735 = sqrt(12)
    assert paired.p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-6)


def test_equal_differences_have_no_error():
    assert Paired((0.0, 0.0, 0.0)).p == 1
    paired = Paired((0.5, 0.5, 0.5))
    assert paired.p == 0 and paired.interval == (0.5, 0.5)


def test_exact_p_counts_signs():
    assert Paired((0.1, 0.2, 0.3)).exact_p == 2 / 8
    assert Paired((0.01, 0.02, 0.03, 0.04, 0.05)).exact_p == 2 / 32
    # Of 3, -1 and 2 the sum is 4; 6 and 4 are reached by 3, 1, 2 and by 3, -1, 2, and negated.
    assert Paired((3.0, -1.0, 2.0)).exact_p == 4 / 8


@pytest.mark.parametrize(
    ("level", "degrees", "quantile"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 4, 2.77645),
        (0.95, 9, 2.26216),
        (0.95, 30, 2.04227),
        (0.99, 4, 4.60409),
    ],
)
def test_quantiles_of_student(level, degrees, quantile):
    assert t_quantile(level, degrees) == pytest.approx(quantile, rel=1e-4)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_verdict():
    assert verdict(Paired((0.1, 0.2, 0.3)), 0.049) == "shown"
    assert verdict(Paired((-0.1, -0.2, -0.3)), 0.049) == "opposite shown"
    assert verdict(Paired((0.1, 0.2, 0.3)), 0.05) == "not shown"
    with pytest.raises(AssertionError):
        verdict(Paired((0.1, 0.2)), 0.01)
