"""training.offload and training.gradient_checkpointing change no number."""

from collections import Counter

import torch
from tiny import FakeGrader
from torch.utils._python_dispatch import TorchDispatchMode

from codistill import checkpoint
from codistill.batch import Ragged, TokenBatch
from codistill.config.machinery import TrainingConfig
from codistill.learner import HOST, move_states
from codistill.model.loading import load_policy
from codistill.model.policy import PRODUCTS
from codistill.output.metrics import StepMetrics

CHOICES = [("optimizer", "none"), ("all", "selective"), ("none", "full")]


def steps(make_trainer, offload: str, checkpointing: str) -> list[dict[str, float]]:
    """Metrics of three steps, times aside."""
    changes = {
        "training": {
            "offload": offload,
            "gradient_checkpointing": checkpointing,
            "dtype": "bfloat16",
        }
    }
    trainer = make_trainer(changes, FakeGrader())
    rows = [trainer.step(step)[0] for step in (1, 2, 3)]
    ignored = ("time/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(ignored)} for row in rows]


def test_metrics_are_the_same_bits(make_trainer):
    """Both models learn, so a state that is lost between two steps shows in the third."""
    expected = steps(make_trainer, "none", "none")
    assert all(row["grad_norm/large"] > 0 for row in expected)
    for choice in CHOICES:
        assert steps(make_trainer, *choice) == expected, choice


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_product_again(models, process_group):
    """And all the rest, as full checkpointing does."""
    calls = {}
    for which in ("none", "selective", "full"):
        options = TrainingConfig(dtype="float32", gradient_checkpointing=which)
        policy = load_policy("small.path", str(models["large"]), options, 18, HOST)
        rows = Ragged.of([[3, 4, 5, 6], [7, 8, 9]])
        with Count() as count:
            policy(TokenBatch.build(rows, rows, [0, 1], HOST), 0.9).sum().backward()
        calls[which] = count.calls
    products = PRODUCTS & calls["full"].keys()
    assert len(products) >= 2
    for name in products:
        assert calls["none"][name] == calls["selective"][name] < calls["full"][name], name
    others = "aten::silu", "aten::rsqrt"
    for name in others:
        assert calls["none"][name] < calls["selective"][name] == calls["full"][name], name


def test_states_are_on_the_device_for_the_step_alone(make_trainer, monkeypatch):
    """Also after a checkpoint was loaded."""
    trainer = make_trainer({"training": {"offload": "optimizer"}}, FakeGrader())
    learners = list(trainer.learners.values())
    places: list[tuple[str, torch.device]] = []
    names = {id(learner.optimizer): learner.name for learner in learners}

    def recorded(optimizer, device):
        places.append((names[id(optimizer)], device))

    monkeypatch.setattr("codistill.learner.move_states", recorded)
    device = torch.device("meta")
    monkeypatch.setattr("codistill.model.policy.Policy.device", device)
    for learner in learners:
        for weight in learner.policy.parameters():
            weight.grad = torch.ones_like(weight)
        learner.step(StepMetrics(HOST))
    assert places == [(name, place) for name in names.values() for place in (device, HOST)]
    places.clear()
    folder = trainer.config.output_dir
    checkpoint.save(folder, 1, checkpoint.states_of(learners), keep=2)
    checkpoint.load(folder, 1, learners)
    assert places == [(name, HOST) for name in names.values()]


def test_what_is_moved(process_group):
    """Momenta, and not the counts of steps: AdamW keeps these on the host."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    move_states(optimizer, HOST)
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value, before[name]), name
    move_states(optimizer, torch.device("meta"))
    places = {name: value.device.type for name, value in optimizer.state[weight].items()}
    assert places == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
