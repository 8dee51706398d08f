"""codistill_kernels.integrations.torchtitan against the cross-entropy of all logits: in one
process, with a head under FSDP2, and with a head sharded by tensor parallelism."""

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy

from codistill_kernels.integrations.torchtitan import LinearCrossEntropyLoss

T, H, V = 13, 8, 31


class Model(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=bias)

    def forward(self, x, skip_lm_head: bool):
        hidden = self.body(x)
        return hidden if skip_lm_head else self.lm_head(hidden)


def make_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, labels = (
        torch.randn(T, H, generator=generator),
        torch.randint(0, V, (T,), generator=generator),
    )
    labels[2] = -100
    return x, labels


def plain_loss(model, x, labels, count):
    return cross_entropy(model(x, False), labels, reduction="sum", ignore_index=-100) / count


def fused_loss(model, x, labels, count):
    loss = LinearCrossEntropyLoss()
    loss.set_lm_head(model.lm_head)
    value, metrics = loss(model(x, True), labels, count)
    assert metrics == {}
    return value


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [None, torch.tensor(12.0)])
def test_equals_whole_logits(bias, count):
    results = []
    for function in (plain_loss, fused_loss):
        model = Model(bias=bias)
        given = 1 if count is None and function is plain_loss else count
        value = function(model, *make_case(), given)
        (2 * value).backward()  # the loss may be scaled
        results.append([value.detach(), *(p.grad for p in model.parameters())])
    for other, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


def test_head_is_left_as_it_was():
    model = Model()
    fused_loss(model, *make_case(), None)
    assert model.lm_head(torch.ones(2, H)).shape == (2, V)
    with torch.no_grad():
        assert not fused_loss(model, *make_case(), None).requires_grad


def test_without_a_head():
    with pytest.raises(ValueError, match="lm_head must be set by set_lm_head"):
        LinearCrossEntropyLoss()(*make_case())


def join(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    return init_device_mesh("cpu", (2,))


def whole_batch():
    model = Model()
    batches = [make_case(seed) for seed in (1, 2)]
    value = sum(plain_loss(model, *batch, 24.0) for batch in batches)
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters()}


def data_parallel(rank, folder):
    """Two steps: the head's gradients reach every process, and the second pass finds its shard."""
    mesh = join(rank, folder)
    model = Model()
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    value, gradients = whole_batch()
    for _ in range(2):
        model.zero_grad()
        loss = fused_loss(model, *make_case(rank + 1), torch.tensor(24.0))
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, value)
        for name, parameter in model.named_parameters():
            mean = parameter.grad.full_tensor()  # FSDP divides by the number of processes
            torch.testing.assert_close(2 * mean, gradients[name], atol=2e-6, rtol=1e-5)
    dist.barrier()
    dist.destroy_process_group()


def tensor_parallel(rank, folder):
    """31 rows on two processes: 16 and 15."""
    mesh = join(rank, folder)
    x, labels = make_case()
    plain, model = Model(), Model()
    value = plain_loss(plain, x, labels, 12.0)
    value.backward()
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
    model.lm_head.weight = nn.Parameter(weight)
    hidden = DTensor.from_local(model.body(x), mesh, [Replicate()])
    loss = LinearCrossEntropyLoss()
    loss.set_lm_head(model.lm_head)
    got, _ = loss(hidden, labels, torch.tensor(12.0))
    got.backward()
    torch.testing.assert_close(got.detach(), value.detach())
    pairs = [(model.body.weight.grad, plain.body.weight.grad)]
    pairs += [(model.lm_head.weight.grad.full_tensor(), plain.lm_head.weight.grad)]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("function", [data_parallel, tensor_parallel])
def test_processes(function, tmp_path):
    spawn(function, str(tmp_path), processes=2)
