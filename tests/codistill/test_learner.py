"""A step of several processes, sharded and replicated, is the step of one and of plain PyTorch."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from plain_step import CPU, TEMPERATURE, VOCAB, batch_of, objective, plain_loss
from processes import spawn
from torch.distributed.tensor import DTensor

from codistill import checkpoint, distributed
from codistill.config.machinery import OptimizerConfig, TrainingConfig
from codistill.learner import Learner
from codistill.model.loading import load_causal_lm, load_policy
from codistill.output.metrics import StepMetrics
from codistill_kernels import PolicyLoss

CUTS = {
    1: [[[0, 1, 2, 3], [4, 5, 6, 7]]],
    2: [[[0, 2, 4], [6], []], [[1, 3], [], [5, 7]]],
    4: [[[0, 2], [6]], [[4], []], [[1], [3]], [[], [5, 7]]],
}
"""Rollouts of each micro-batch, by number of processes and rank; some batches have none."""


class Layout(NamedTuple):
    """How the weights are spread: each replica over processes / replicas of them."""

    processes: int
    replicas: int

    @property
    def name(self) -> str:
        return f"{self.processes}_processes_{self.replicas}_replicas"


def start(rank: int, folder: str, path: str, layout: Layout, loss: PolicyLoss) -> Learner:
    os.environ["RANK"] = str(rank)  # the first process writes checksums
    init = f"file://{folder}/init_{layout.name}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=layout.processes)
    mesh = distributed.shard_mesh(layout.replicas, CPU)
    options = TrainingConfig(dtype="float32")
    policy = load_policy("small.path", path, options, VOCAB, CPU, mesh=mesh)
    optimizer = OptimizerConfig(schedule="constant", warmup_fraction=0, max_grad_norm=1e9)
    return Learner("small", policy, loss, optimizer, learning_rate=1e-2, total_steps=1)


def step_in_layout(rank: int, folder: str, path: str, layout: Layout, before: Layout | None):
    """A step with the rollouts of `CUTS`; then the checkpoint of another layout is loaded."""
    learner = start(rank, folder, path, layout, PolicyLoss())
    matrix = learner.policy.lm.model.layers[0].mlp.gate_proj.weight
    assert len(matrix.to_local()) == len(matrix) * layout.replicas / layout.processes
    metrics = StepMetrics(CPU)
    batches = [batch_of(rows) for rows in CUTS[layout.processes][rank]]
    learner.backward(batches, objective(), metrics, temperature=TEMPERATURE)
    grads = {n: whole(parameter.grad) for n, parameter in learner.policy.lm.named_parameters()}
    learner.step(metrics)
    result = dict(grads=grads, numbers=metrics.reduce(), state=state_of(learner))
    checkpoint.save(Path(folder) / layout.name, 1, checkpoint.states_of([learner]), keep=2)
    if before is not None:
        checkpoint.load(Path(folder) / before.name, 1, [learner])
        result["loaded"] = state_of(learner)
    if rank == 0:
        torch.save(result, f"{folder}/{layout.name}.pt")
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights, as the engine gets them, and first moments."""
    moments = {
        f"{name} moment": whole(learner.optimizer.state[parameter]["exp_avg"])
        for name, parameter in learner.policy.lm.named_parameters()
    }
    return {name: w.clone() for name, w in learner.policy.full_weights()} | moments


def unequal_batches(rank: int, folder: str, path: str) -> None:
    learner = start(rank, folder, path, Layout(2, 1), PolicyLoss())
    with pytest.raises(RuntimeError, match="between 1 and 2 batches"):
        batches = [batch_of([row]) for row in range(1 + rank)]
        learner.backward(batches, objective(), StepMetrics(CPU), temperature=1.0)
    dist.barrier()
    dist.destroy_process_group()


def plain_gradients(path: str) -> tuple[dict[str, torch.Tensor], float]:
    lm = load_causal_lm(path, dtype=torch.float64)
    loss = plain_loss(lm)
    loss.backward()
    return {name: parameter.grad for name, parameter in lm.named_parameters()}, loss.item()


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ("small", [Layout(1, 1), Layout(4, 2)]),  # tied head
        ("large", [Layout(1, 1), Layout(2, 1), Layout(2, 2)]),
    ],
)
def test_every_layout_and_plain_pytorch_agree(models, tmp_path, model, layouts):
    path = str(models[model])
    gold, gold_loss = plain_gradients(path)
    results = []
    for before, layout in zip([None, *layouts], layouts, strict=False):
        spawn(step_in_layout, str(tmp_path), path, layout, before, processes=layout.processes)
        results.append(torch.load(tmp_path / f"{layout.name}.pt"))
    for found in results:
        assert found["grads"].keys() == gold.keys()
        for name, grad in found["grads"].items():
            assert grad.abs().max() > 1e-4, name
            torch.testing.assert_close(grad.double(), gold[name], rtol=1e-5, atol=1e-5)
        assert abs(found["numbers"]["loss/small"] - gold_loss) < 1e-6
    one = results[0]
    for before, found in zip(results, results[1:], strict=False):
        torch.testing.assert_close(found["grads"], one["grads"], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["state"], one["state"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["loaded"], before["state"], rtol=0, atol=0)
        assert found["numbers"] == pytest.approx(one["numbers"], rel=1e-5, abs=1e-5)


def test_unequal_numbers_of_batches_are_found_before_they_hang(models, tmp_path):
    spawn(unequal_batches, str(tmp_path), str(models["small"]), processes=2)
