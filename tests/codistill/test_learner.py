"""A sharded step of two processes is the step of one, and the step of plain PyTorch."""

import pytest
import torch
import torch.distributed as dist
from plain_step import CPU, TEMPERATURE, VOCAB, batch_of, objective, plain_loss
from processes import spawn
from torch.distributed.tensor import DTensor

from codistill.config.schema import OptimizerConfig, TrainingConfig
from codistill.learner import Learner
from codistill.model.loading import load_causal_lm, load_policy
from codistill.output.metrics import StepMetrics
from codistill_kernels import PolicyLoss


def start(rank: int, folder: str, path: str, world_size: int, loss: PolicyLoss) -> Learner:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init{world_size}", rank=rank, world_size=world_size
    )
    policy = load_policy("small.path", path, TrainingConfig(dtype="float32"), VOCAB, CPU)
    optimizer = OptimizerConfig(schedule="constant", warmup_fraction=0, max_grad_norm=1e9)
    return Learner("small", policy, loss, optimizer, learning_rate=1e-2, total_steps=1)


def sharded_step(rank: int, folder: str, path: str, world_size: int) -> None:
    """Two processes have batches of 3 and 1, and 2 and 2 rollouts, and one without any."""
    learner = start(rank, folder, path, world_size, PolicyLoss())
    metrics = StepMetrics(CPU)
    cuts = {1: [[0, 1, 2, 3], [4, 5, 6, 7]], 2: [[[0, 2, 4], [6], []], [[1, 3], [], [5, 7]]][rank]}
    batches = [batch_of(rows) for rows in cuts[world_size]]
    learner.backward(batches, objective(), metrics, temperature=TEMPERATURE)
    grads = {
        name: parameter.grad.full_tensor()
        if isinstance(parameter.grad, DTensor)
        else parameter.grad
        for name, parameter in learner.policy.lm.named_parameters()
    }
    learner.step(metrics)
    weights = dict(learner.policy.full_weights())
    numbers = metrics.reduce()
    if rank == 0:
        torch.save((grads, weights, numbers), f"{folder}/result{world_size}.pt")
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


def unequal_batches(rank: int, folder: str, path: str) -> None:
    learner = start(rank, folder, path, 2, PolicyLoss())
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


def test_two_processes_one_process_and_plain_pytorch_agree(models, tmp_path):
    for model in ("small", "large"):  # tied and untied head
        path = str(models[model])
        results = {}
        for world_size in (1, 2):
            spawn(sharded_step, str(tmp_path), path, world_size, processes=world_size)
            results[world_size] = torch.load(tmp_path / f"result{world_size}.pt")
            (tmp_path / f"init{world_size}").unlink(missing_ok=True)
        gold, gold_loss = plain_gradients(path)
        for grads, _, numbers in results.values():
            assert grads.keys() == gold.keys()
            for name, grad in grads.items():
                assert grad.abs().max() > 1e-4, name
                torch.testing.assert_close(grad.double(), gold[name], rtol=1e-5, atol=1e-5)
            assert abs(numbers["loss/small"] - gold_loss) < 1e-6
        one, two = results[1], results[2]
        for name in one[0]:
            torch.testing.assert_close(one[0][name], two[0][name], rtol=0, atol=1e-5)
            torch.testing.assert_close(one[1][name], two[1][name], rtol=0, atol=1e-4)
        assert one[2].keys() == two[2].keys()
        for name in one[2]:
            assert abs(one[2][name] - two[2][name]) < 1e-5 * max(1, abs(one[2][name])), name


def test_unequal_numbers_of_batches_are_found_before_they_hang(models, tmp_path):
    spawn(unequal_batches, str(tmp_path), str(models["small"]), processes=2)
