"""The algorithm between rollouts and losses, by hand."""

import pytest
import torch

from codistill.config import Config, OptimizerConfig
from codistill.data import Problem
from codistill.learner import learning_rate_factor
from codistill.rollout import Completion
from codistill.scoring import Rollouts, score


def test_score_by_hand(settings):
    """One prompt, M = 6, G = 4, N = 8, alpha = 4; every completion has two tokens."""
    settings["rollout"]["prompts_per_step"] = 1
    settings["training"]["micro_batch_size"] = 4
    settings["kd"] = {"alpha": 4.0}
    config = Config(**settings)
    problem = Problem("1+1", ("2",), "1+1=", [3, 12, 3, 13])
    rollouts = Rollouts(
        problems=[problem] * 6,
        completions=[Completion([2, 1], [0.0, 0.0], False)] * 6,
        hints=[0] * 6,
        texts=[""] * 6,
        accuracy=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
        format=torch.zeros(6),
    )
    small = [torch.tensor([-1.0, -1.0])] * 6
    gain = [0.2, -0.4, 0.0, 0.6, -0.2, -1.0]  # log-ratio of the first token
    large = [torch.tensor([-1.0 + g, -1.0]) for g in gain]
    scored = score(config, rollouts, {"small": small, "large": large})
    # Eq. 6: kd = 4 * gain / 8
    assert scored.kd_rewards.tolist() == pytest.approx([0.1, -0.2, 0.0, 0.3, -0.1, -0.5])
    # effective 1.1, 0.8, 1.0, 0.3, -0.1, -0.5: best two 0, 2; worst two 4, 5
    assert scored.kept.tolist() == [0, 2, 4, 5]
    # Eq. 7 over the kept: mean of 1.1, 1.0, -0.1, -0.5 is 0.375; of 1, 1, 0, 0 it is 0.5
    assert scored.advantages["small"].tolist() == pytest.approx([0.725, 0.625, -0.475, -0.875])
    assert scored.advantages["large"].tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, 20 % warm-up: 1/3, 2/3, then 1, then half a cosine over 8 steps
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),
    ],
)
def test_learning_rate(schedule, expected):
    config = OptimizerConfig(schedule=schedule, warmup_fraction=0.2)
    factors = [learning_rate_factor(step, 10, config) for step in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx(expected)
