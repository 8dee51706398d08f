"""The grids of cases in the peers' suites: a sample runs by default, all of them with `-m long`."""

import itertools
import random

import pytest


def grid(*, default: int, **axes: list) -> pytest.MarkDecorator:
    """Parametrize a test by the product of the axes. About `default` cases run by default, among
    them every value of every axis (0: none); the others are marked long."""
    names = list(axes)
    cases = list(itertools.product(*axes.values()))
    chosen = random.Random(0).sample(cases, min(default, len(cases)))
    for position, values in enumerate(axes.values()):
        for value in values if default else []:
            if not any(case[position] == value for case in chosen):
                chosen.append(next(case for case in cases if case[position] == value))
    params = [
        pytest.param(*case, marks=() if case in chosen else pytest.mark.long) for case in cases
    ]
    return pytest.mark.parametrize(names, params)
