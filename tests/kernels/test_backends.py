"""Which backend runs, what torch.compile and torch.library make of the ops, and sharding."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from processes import spawn

from codistill_kernels import _backends, _native, linear_logps

MODULE = sys.modules["codistill_kernels.linear_logps"]


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    caches = (_native.library, _backends.library_error, _backends.report_fallback)
    monkeypatch.setattr(_native, "PATH", tmp_path / _native.PATH.name)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def inputs(rows=6, hidden=8, vocab=21, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_(),
        torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_(),
        torch.randint(0, vocab, (rows,), generator=generator),
    )


def test_library_is_built_and_chosen():
    cpu = torch.device("cpu")
    assert _backends.library_error() is None
    assert _backends.choose("auto", cpu, torch.bfloat16) == "cpu"
    assert _backends.choose("auto", cpu, torch.float64) == "torch"


def test_without_library_torch_serves_and_one_line_says_so(no_library, caplog):
    with caplog.at_level(logging.INFO, logger="codistill_kernels"):
        first, second = linear_logps(*inputs()), linear_logps(*inputs())
    assert torch.equal(first, second)
    assert len(caplog.records) == 1
    assert "torch backend serves for 'cpu'" in caplog.text and "C++ compiler" in caplog.text


def test_without_library_cpu_says_how_to_build_it(no_library):
    with pytest.raises(ValueError, match="'cpu' must have its C.. library .install again, with a"):
        linear_logps(*inputs(), backend="cpu")


def test_import_does_no_work():
    code = (
        "import sys, codistill_kernels, torch\n"
        "assert codistill_kernels._native.library.cache_info().currsize == 0\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'transformers', 'vllm', 'codistill', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ops_pass_opcheck(backend):
    hidden, weight, ids = inputs()
    bias, temperature = torch.zeros(21), torch.ones(6)
    ids[0] = -1
    head = (hidden.detach(), weight.detach(), bias, ids, temperature, 5.0)
    torch.library.opcheck(MODULE.linear_statistics, (*head, True, backend))
    coefficients, softmax = torch.randn(3, 6), torch.rand(3, 6)
    for needs in ([True, True, True], [False, True, False]):
        for is_whole in (True, False):
            arguments = (*head, coefficients, softmax, is_whole, 25, needs, None, backend)
            torch.library.opcheck(MODULE.linear_gradients, arguments)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiles_as_one_graph(backend):
    def step(hidden, weight, ids):
        logps, entropy = linear_logps(
            hidden, weight, ids, temperature=0.7, return_entropy=True, backend=backend
        )
        return (2 * logps + entropy).sum()

    plain, compiled = inputs(), inputs()
    step(*plain).backward()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for one, other in zip(plain[:2], compiled[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def sharded(rank: int, folder: str, vocab_size: int) -> None:
    """One of two processes: its half of the weight must give what the whole gives."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    hidden, weight, ids = inputs(rows=9, hidden=16, vocab=64)
    ids = ids % vocab_size
    ids[2] = -100
    bias = torch.linspace(-1, 1, 64).requires_grad_()
    options = dict(temperature=0.8, softcap=9.0, vocab_size=vocab_size, return_entropy=True)
    whole = linear_logps(hidden, weight, ids, bias=bias, **options)
    grads = torch.autograd.grad((3 * whole[0] + whole[1]).sum(), (hidden, weight, bias))
    mine = slice(32 * rank, 32 * (rank + 1))
    shard = weight.detach()[mine].clone().requires_grad_()
    shard_bias = bias.detach()[mine].clone().requires_grad_()
    group = dist.group.WORLD
    for backend in ("cpu", "torch"):
        parts = linear_logps(
            hidden, shard, ids, bias=shard_bias, group=group, backend=backend, **options
        )
        found = torch.autograd.grad((3 * parts[0] + parts[1]).sum(), (hidden, shard, shard_bias))
        expected = (grads[0], grads[1][mine], grads[2][mine])
        for one, other in zip((*parts, *found), (*whole, *expected), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


@pytest.mark.parametrize("vocab_size", [64, 40, 20], ids=["even", "cut shard", "empty shard"])
def test_sharded_vocabulary_equals_whole(tmp_path, vocab_size):
    spawn(sharded, str(tmp_path), vocab_size, processes=2)
