"""codistill, kdrl and grpo: which models are loaded, which learn, from what, and what is logged."""

import pytest
import torch
from pydantic import ValidationError
from test_run import KEYS
from torch import Tensor

from codistill.config import Config


def weights(trainer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: weight.clone() for key, weight in policy.full_weights()}
        for name, policy in trainer.policies.items()
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    different = [not torch.equal(before[key], after[key]) for key in before]
    assert all(different) or not any(different)
    return all(different)


@pytest.mark.parametrize(
    ("changes", "loaded", "trained"),
    [
        ({}, {"small", "large"}, {"small", "large"}),
        ({"algorithm": "kdrl"}, {"small", "large"}, {"small"}),
        ({"algorithm": "grpo"}, {"small"}, {"small"}),
        ({"algorithm": "grpo", "grpo": {"model": "large"}}, {"large"}, {"large"}),
    ],
    ids=["codistill", "kdrl", "grpo small", "grpo large"],
)
def test_an_algorithm_trains_the_models_it_says(make_trainer, changes, loaded, trained):
    trainer = make_trainer(changes)
    before = weights(trainer)
    assert before.keys() == loaded
    trainer.step(1)
    numbers, rollouts, scored = trainer.step(2)  # its engine has the weights of step 1, or it stops
    after = weights(trainer)
    assert {name for name in loaded if changed(before[name], after[name])} == trained

    expected = {
        key
        for key in KEYS - {"step"}
        for name in [next((n for n in ("small", "large") if n in key), None)]
        if name is None or name in trained
    }
    if len(loaded) == 1:
        expected.remove("reward/kd")
        assert torch.equal(scored.credit.effective_rewards, rollouts.rewards)
    assert expected <= numbers.keys()
    absent = {"small", "large"} - trained
    assert not [key for key in numbers if any(name in key for name in absent)]
    writer = "large" if trained == {"large"} else "small"
    assert numbers[f"ratio/{writer}_mean"] == pytest.approx(1, abs=1e-5)  # its own rollouts
    assert trainer.evaluate(1).keys() == {"step", writer}


def test_grpo_takes_the_model_that_is_configured(settings):
    settings["algorithm"] = "grpo"
    assert Config(**settings).writer == "small"
    large = settings.pop("small") and Config(**settings)
    assert (large.writer, large.loaded, large.trained) == ("large", ("large",), ("large",))
    settings.pop("large")
    with pytest.raises(ValidationError, match="small is missing: expected small or large"):
        Config(**settings)


@pytest.mark.parametrize("algorithm", ["codistill", "kdrl"])
def test_two_models_are_needed(settings, algorithm):
    settings |= {"algorithm": algorithm, "large": None}
    with pytest.raises(ValidationError, match="large is missing: expected theta"):
        Config(**settings)
    settings |= {"algorithm": "grpo", "grpo": {"model": "large"}}
    with pytest.raises(ValidationError, match="large is missing: expected theta"):
        Config(**settings)
