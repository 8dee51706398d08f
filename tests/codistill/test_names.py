"""The configuration imports no torch, so it repeats names of codistill_kernels: they are the same
there, in the rules about them, and in the documentation."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from codistill.config_algorithm import (
    DownsampleConfig,
    DownsampleMethod,
    KDConfig,
    ObjectiveEstimator,
    RewardEstimator,
)
from codistill_kernels import downsample, kd_rewards, kl_penalty
from codistill_kernels._estimators import ESTIMATORS, OF_OBJECTIVES, OF_REWARDS
from codistill_kernels.rewards import METHODS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "algorithms.md").read_text()
README = (ROOT / "README.md").read_text().splitlines()
PLACES = {"reward": (*OF_REWARDS, "exact"), "objective": OF_OBJECTIVES}


def is_valid(section: type, **values: object) -> bool:
    try:
        section(**values)
    except ValidationError:
        return False
    return True


def row_of(function: str) -> str:
    (row,) = (line for line in README if line.startswith(f"| `{function}` |"))
    return row


def test_names_are_the_kernels():
    assert get_args(RewardEstimator) == PLACES["reward"]
    assert get_args(ObjectiveEstimator) == PLACES["objective"]
    assert get_args(DownsampleMethod) == tuple(METHODS)


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "exact", "k9"])
def test_estimators_are_allowed_where_there_are_such(placement, estimator):
    allowed = is_valid(KDConfig, placement=placement, estimator=estimator)
    assert allowed == (estimator in PLACES[placement])


@pytest.mark.parametrize("method", METHODS)
def test_rules_of_a_method(method):
    for keep in (1, 2, 3, 4, 6):
        valid = keep % METHODS[method].divisor == 0
        assert is_valid(DownsampleConfig, method=method, keep=keep) == valid
    ranked = is_valid(DownsampleConfig, method=method, by="shortness")
    assert ranked == (not METHODS[method].is_random)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (kd_rewards, PLACES["reward"]),
        (kl_penalty, PLACES["objective"]),
        (downsample, METHODS),
    ],
    ids=["kd_rewards", "kl_penalty", "downsample"],
)
def test_all_are_documented(function, names):
    for name in names:
        assert f'"{name}"' in function.__doc__, name
        assert f"`{name}`" in row_of(function.__name__), name


def test_all_are_in_the_table_of_the_trainer():
    for placement, names in PLACES.items():
        for name in names:
            assert f"| `{placement}` | `{name}` |" in TEXT, (placement, name)
    section = TEXT.split("## Down-sampling")[1].split("## ")[0]
    for name in METHODS:
        assert f"`{name}`" in section, name
