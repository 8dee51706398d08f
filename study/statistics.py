"""What may be said of two methods from runs with the same seeds.

Two runs with one seed draw the same problems in the same order, so methods are compared by the
differences within seeds. n pairs with mean d and sample standard deviation s (divided by n - 1)
give

    the 95 % confidence interval   d ± q s / √n,   q the 97.5 % quantile of Student's t, n - 1
    the p-value of Student's t     P(|t| >= d √n / s), two-sided
    the exact p-value              share of the 2^n ways to choose the signs of the differences
                                   whose |sum| is at least the one observed (Fisher's sign flips)

Student's t takes the differences to be normal; the exact value assumes only that their signs are
arbitrary if the methods are equal, but with n pairs it is never below 2 / 2^n: 0.25 with 3 and
0.0625 with 5, so that few seeds could never show anything by it alone. It is printed beside the
other for the reader. A bootstrap of 3 to 5 differences gives intervals that are far too narrow.

Several claims are judged together by Holm's procedure: the k-th smallest of m p-values is
multiplied by m - k + 1, and no value may be below one that was smaller. The chance that any of
them is wrongly called shown, or wrongly called the opposite, then is at most 5 %.
"""

import itertools
import math
import statistics
from dataclasses import dataclass
from functools import cached_property

import numpy as np

LEVEL = 0.05
FEWEST_PAIRS = 3
"""With fewer pairs nothing is said."""
ANGLES = np.linspace(0.0, math.pi / 2, 100_001)


@dataclass(frozen=True)
class Paired:
    """Differences of two methods within seeds, positive where the claim's side is ahead."""

    differences: tuple[float, ...]

    @classmethod
    def of(cls, high: dict[int, float], low: dict[int, float]) -> "Paired":
        """`high` minus `low`, values by seed, for the seeds that both have."""
        seeds = sorted(high.keys() & low.keys())
        return cls(tuple(high[seed] - low[seed] for seed in seeds))

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def is_enough(self) -> bool:
        return self.n >= FEWEST_PAIRS

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.differences) / math.sqrt(self.n)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the mean."""
        width = t_quantile(1 - LEVEL, self.n - 1) * self.error
        return self.mean - width, self.mean + width

    @cached_property
    def p(self) -> float:
        """The two-sided p-value of Student's t."""
        degrees = self.n - 1
        angle = math.atan2(abs(self.mean), self.error * math.sqrt(degrees))
        return 1 - float(np.interp(angle, ANGLES, t_mass(degrees)))

    @cached_property
    def exact_p(self) -> float:
        """The two-sided p-value of the exact test; all 2^n signs are tried."""
        observed = abs(sum(self.differences))
        reached = [
            abs(sum(sign * d for sign, d in zip(signs, self.differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=self.n)
        ]
        return sum(value >= observed * (1 - 1e-9) for value in reached) / len(reached)

    @property
    def in_favour(self) -> int:
        """How many of the pairs are on the claim's side."""
        return sum(difference > 0 for difference in self.differences)


def t_mass(degrees: int) -> np.ndarray:
    """P(|t| <= √degrees tan a) at each of `ANGLES`, Student's t with so many degrees of freedom.

    With t = √degrees tan a its density is proportional to cos(a)^(degrees - 1), which trapezoids
    integrate to 1e-9: no table, and no dependency for one quantile.
    """
    density = np.cos(ANGLES) ** (degrees - 1)
    mass = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return mass / mass[-1]


def t_quantile(level: float, degrees: int) -> float:
    """q with P(|t| <= q) = level."""
    angle = float(np.interp(level, t_mass(degrees), ANGLES))
    return math.sqrt(degrees) * math.tan(angle)


def holm(p_values: list[float]) -> list[float]:
    """The p-values, in the order given, as Holm's procedure corrects them for their number."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def verdict(paired: Paired, adjusted_p: float) -> str:
    """A word for a claim at this scale.

    shown: the mean difference is on the claim's side, and `adjusted_p`, the p-value of Student's t
        after Holm's correction over the claims of its group, is below 0.05;
    opposite shown: the same, with the mean difference on the other side;
    not shown: anything else, which does not say that the claim is wrong.

    With fewer than `FEWEST_PAIRS` pairs there is no verdict, and this is not to be called.
    """
    assert paired.is_enough, paired
    if adjusted_p >= LEVEL:
        return "not shown"
    return "shown" if paired.mean > 0 else "opposite shown"
