"""Numbers that are none: what they stop, and what they leave as it is."""

import math

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from safetensors.torch import load_file
from tiny import FakeGrader
from torch.distributed.tensor import DTensor

from codistill.config import ConfigError
from codistill.model.loading import check_finite
from codistill.output.metrics import StepMetrics
from codistill.scoring import check_numbers

CPU = torch.device("cpu")


def reduced(rank: int, folder: str) -> None:
    """On each of two processes in turn one number is NaN, and one infinite."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    metrics = StepMetrics(CPU)
    for name in (0, 1):
        metrics.maximum(f"nan/{name}", math.nan if rank == name else 1.0)
        metrics.mean(f"mean/{name}", math.nan if rank == name else 1.0, 1)
        metrics.maximum(f"inf/{name}", math.inf if rank == name else 1.0)
        metrics.maximum(f"low/{name}", -math.inf)
        metrics.maximum(f"finite/{name}", float(rank))
    numbers = metrics.reduce()
    for name in (0, 1):
        assert math.isnan(numbers[f"nan/{name}"]) and math.isnan(numbers[f"mean/{name}"])
        assert numbers[f"inf/{name}"] == math.inf and numbers[f"low/{name}"] == -math.inf
        assert numbers[f"finite/{name}"] == 1.0
        wrong = torch.tensor([1.0, math.nan if rank == name else 1.0])
        with pytest.raises(FloatingPointError, match="^the large model gives log-probabilities"):
            check_numbers({"small": torch.ones(2), "large": wrong})
    check_numbers({"small": torch.ones(2), "large": torch.zeros(0)})
    linear = torch.nn.Linear(2, 2)
    check_finite("small.path", "a", linear)
    for place, (name, weight) in enumerate(linear.named_parameters()):
        before = weight.detach().clone()
        if rank == place:  # one process alone has the number
            weight.data[0] = math.inf
        with pytest.raises(ConfigError, match=f"^small.path = 'a': .* finite; {name} has a NaN"):
            check_finite("small.path", "a", linear)
        weight.data.copy_(before)
    dist.barrier()


def test_a_nan_is_found_on_whichever_process_it_is(tmp_path):
    spawn(reduced, str(tmp_path), processes=2)


def spoil(policy, value: float) -> None:
    """Put a number that is none into every weight of the last norm."""
    weight = policy.lm.model.norm.weight
    with torch.no_grad():
        (weight.to_local() if isinstance(weight, DTensor) else weight).fill_(value)


def state(learner) -> tuple:
    """All that an optimizer step changes, as values."""
    weights = {name: weight.clone() for name, weight in learner.policy.full_weights()}
    steps = [float(entry["step"]) for entry in learner.optimizer.state.values()]
    return weights, steps, learner.schedule.state_dict()["last_epoch"]


def spoil_gradients(monkeypatch, learner, steps: int) -> None:
    """Make one gradient NaN in the next optimizer steps."""
    left = [steps]
    step = learner.step

    def spoiled(metrics) -> None:
        if left[0]:
            left[0] -= 1
            next(learner.policy.parameters()).grad.mul_(math.nan)
        step(metrics)

    monkeypatch.setattr(learner, "step", spoiled)


def test_a_gradient_that_is_not_finite_is_skipped(make_trainer, monkeypatch):
    trainer = make_trainer({}, FakeGrader())
    small, large = trainer.learners["small"], trainer.learners["large"]
    first, _, _ = trainer.step(1)
    assert first["skipped/small"] == first["skipped/large"] == 0
    spoil_gradients(monkeypatch, small, 1)
    before, other = state(small), state(large)
    numbers, _, _ = trainer.step(2)
    after = state(small)
    assert all(torch.equal(after[0][name], weight) for name, weight in before[0].items())
    assert after[1:] == before[1:] and state(large)[1:] != other[1:]
    assert (numbers["skipped/small"], numbers["skipped/large"]) == (1, 0)
    assert "grad_norm/small" not in numbers and numbers["grad_norm/large"] > 0
    numbers, _, _ = trainer.step(3)
    assert numbers["skipped/small"] == 0 and small.skipped_in_a_row == 0
    assert state(small)[2] == before[2] + 1


def test_gradients_that_stay_so_stop_the_run(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer({"training": {"max_skipped": 2}}, FakeGrader())
    spoil_gradients(monkeypatch, trainer.learners["large"], 9)
    trainer.step(1)
    with pytest.raises(FloatingPointError) as error:
        trainer.step(2)
    file = tmp_path / "runs" / "tiny" / "not_finite_large_step_2_rank_0.safetensors"
    assert str(error.value) == (
        "the gradient of the large model was not finite in 2 optimizer steps in a row; the last "
        f"batch is in {file}"
    )
    saved = load_file(file)
    rows = trainer.config.rollout.prompts_per_step * trainer.config.kept
    assert len(saved["advantages"]) == rows == len(saved["prompt_cu_seqlens"]) - 1
    assert saved["completion_cu_seqlens"][-1] == len(saved["completion_ids"])


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_model_of_nan_is_named(make_trainer, name):
    trainer = make_trainer({}, FakeGrader())
    policy = trainer.policies[name]
    spoil(policy, math.nan)
    with pytest.raises(FloatingPointError, match=f"^the {name} model gives log-probabilities that"):
        trainer.step(1)


def test_a_problem_that_is_drawn_twice_gets_other_rollouts(make_trainer):
    """8 problems, 16 a step: each occurs twice, and its groups are not copies."""
    trainer = make_trainer({"rollout": {"prompts_per_step": 16}}, FakeGrader())
    _, rollouts, _ = trainer.step(1)
    groups: dict[str, list] = {}
    for first in range(0, len(rollouts), 6):
        texts = rollouts.texts[first : first + 6]
        groups.setdefault(rollouts.problems[first].prompt, []).append(texts)
    assert [len(texts) for texts in groups.values()] == [2] * 8
    assert all(one != other for one, other in groups.values())
