"""The configuration imports no torch, so it repeats names of codistill_kernels: they are the same
there, in the rules about them, and in the documentation. Ranges are the kernels' alone."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError
from test_config import MINIMAL

import codistill_kernels
from codistill.config import Config, ConfigError
from codistill.config.algorithm import (
    DownsampleConfig,
    DownsampleMethod,
    KDConfig,
    LossKind,
    ObjectiveEstimator,
    RewardEstimator,
)
from codistill.losses import OF_THE_LARGE_MODEL, make_policy_loss
from codistill_kernels import PolicyLoss, downsample, kd_rewards, kl_penalty, policy_loss
from codistill_kernels._estimators import ESTIMATORS, OF_OBJECTIVES, OF_REWARDS
from codistill_kernels._pair.divergences import DIVERGENCES
from codistill_kernels._surrogates import SURROGATES
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


def policy_loss_of(name: str, **settings: object) -> PolicyLoss:
    return make_policy_loss(Config(**MINIMAL, loss=settings), name)


def row_of(function: str) -> str:
    (row,) = (line for line in README if line.startswith(f"| `{function}` |"))
    return row


def test_names_are_the_kernels():
    assert get_args(RewardEstimator) == PLACES["reward"]
    assert get_args(ObjectiveEstimator) == PLACES["objective"]
    assert get_args(DownsampleMethod) == tuple(METHODS)
    assert get_args(LossKind) == tuple(SURROGATES)


SETTINGS = {field for kind in SURROGATES.values() for field in kind.settings} - {"dual_clip"}


@pytest.mark.parametrize("kind", SURROGATES)
def test_settings_of_a_loss_are_right_or_wrong_as_the_kernels_say(kind):
    for setting in SETTINGS:
        for value in (-1.5, -0.15, 0.0, 0.5, 1.0, 1.5):
            settings = {"kind": kind, setting: value}
            try:
                expected = PolicyLoss(**settings)
            except ValueError:
                with pytest.raises(ConfigError, match=rf"^loss\.{setting} = {value}: expected "):
                    policy_loss_of("small", **settings)
            else:
                assert policy_loss_of("small", **settings) == expected


@pytest.mark.parametrize("setting", OF_THE_LARGE_MODEL)
def test_settings_of_the_large_model_are_its_own(setting):
    settings = {f"large_{setting}": 2.0}
    assert policy_loss_of("large", **settings) == PolicyLoss(**{setting: 2.0})
    assert policy_loss_of("small", **settings) == PolicyLoss()
    with pytest.raises(ConfigError, match=rf"^loss\.large_{setting} = -1.0: expected > "):
        policy_loss_of("large", **{f"large_{setting}": -1.0})


def test_every_setting_of_a_loss_is_a_key_with_the_same_default():
    keys = Config.model_fields["loss"].default
    for field in fields(PolicyLoss):
        key = f"large_{field.name}" if field.name in OF_THE_LARGE_MODEL else field.name
        if field.name != "entropy_bonus":  # a setting of the kernels alone
            assert getattr(keys, key) == field.default, key


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
        (policy_loss, SURROGATES),
    ],
    ids=["kd_rewards", "kl_penalty", "downsample", "policy_loss"],
)
def test_all_are_documented(function, names):
    text = PolicyLoss.__doc__ if function is policy_loss else function.__doc__
    for name in names:
        assert f'"{name}"' in text, name
        assert f"`{name}`" in row_of(function.__name__), name


def test_all_are_in_the_table_of_the_trainer():
    for placement, names in PLACES.items():
        for name in names:
            assert f"| `{placement}` | `{name}` |" in TEXT, (placement, name)
    section = TEXT.split("## Down-sampling")[1].split("## ")[0]
    for name in METHODS:
        assert f"`{name}`" in section, name


def test_names_in_the_guide_to_distillation_exist():
    text = (ROOT / "docs" / "distillation.md").read_text()
    functions = set(re.findall(r"`(linear_\w+|kd_\w+|kl_\w+)[`(]", text))
    assert functions and all(hasattr(codistill_kernels, name) for name in functions)
    assert all(f"`{name}`" in text for name in ESTIMATORS)
    assert all(f'"{name}"' in text for name in DIVERGENCES)
