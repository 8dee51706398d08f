"""The operations on a linear head under what is around them: default dtypes, torch.compile, ids."""

import numpy
import pytest
import torch
import torch._dynamo.testing
from numerics import BACKENDS, seeded

from codistill_kernels import (
    PolicyLoss,
    codistill_losses,
    linear_logps,
    linear_policy_loss,
    linear_token_loss,
    policy_loss,
)
from codistill_kernels._linear import planning
from codistill_kernels._linear.chunks import Plan


def make_case(rows=9, hidden=16, vocab=50, dtype=torch.float32):
    generator = seeded(0)
    x = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator)
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    return x.to(dtype), weight.to(dtype), ids


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_is_not_rounded_to_the_default_dtype(backend, default_dtype):
    x, weight, ids = make_case()
    z = (x.double() @ weight.double().T) / torch.tensor(0.7, dtype=torch.float64)
    gold = z.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    found = linear_logps(x, weight, ids, temperature=0.7, backend=backend)
    assert (found.double() - gold).abs().max() < 1e-5


def test_fp64_temperature_is_exact():
    x, weight, ids = make_case(dtype=torch.float64)
    gold = (x @ weight.T / 0.7).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    assert (linear_logps(x, weight, ids, temperature=0.7) - gold).abs().max() < 1e-13


@pytest.mark.parametrize("bad", [-1, -5, 50, 1050])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_the_vocabulary_give_nan_where_they_are_not_looked_at(backend, bad):
    """Such an id has no logit, and so no log-probability, on a CPU as on a GPU."""
    x, weight, ids = make_case()
    ids[2], ids[4] = bad, -100
    bias = torch.full((50,), -150.0)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def logps(x, weight):
        return linear_logps(x, weight, ids, bias=bias, backend=backend)

    found = torch.compile(logps, backend="eager")(*leaves)
    assert found[2].isnan() and found[4] == 0 and found[[0, 1, 3, 5]].isfinite().all()
    found.sum().backward()
    assert leaves[0].grad[2].isnan().all() and leaves[1].grad.isnan().any()

    def loss(x, weight):
        terms = dict(mask=ids != -100, normalizer=3.0, bias=bias, backend=backend)
        return linear_policy_loss(x, weight, ids, None, torch.ones(9), **terms)[0]

    assert torch.compile(loss, backend="eager")(*leaves).isnan()


LENGTHS = range(10, 32, 2)


def compilations(function, lengths=LENGTHS) -> int:
    """Compiled frames of a function of (hidden states, ids, [N] numbers) over so many lengths."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in lengths:
        x, _, ids = make_case(rows, hidden=8, vocab=40)
        compiled(x, ids, torch.randn(rows))
    return counter.frame_count


def test_no_function_compiles_once_per_length():
    weight = torch.randn(40, 8)
    functions = [
        lambda x, ids, adv: linear_logps(x, weight, ids, temperature=0.7),
        lambda x, ids, adv: linear_policy_loss(x, weight, ids, None, adv, normalizer=3.0)[0],
        lambda x, ids, adv: codistill_losses(
            (x, weight), (x, weight), ids, adv, adv, adv, normalizer=3.0
        )[0][0],
        lambda x, ids, adv: linear_policy_loss(
            x,
            weight,
            ids,
            adv,
            torch.ones(2),
            loss=PolicyLoss("gspo"),
            normalizer=3.0,
            cu_seqlens=torch.tensor([0, 4, ids.shape[0]]),
        )[0],
    ]
    assert max(map(compilations, functions)) <= 2


def test_no_function_compiles_once_per_temperature():
    weight = torch.randn(40, 8)
    x, _, ids = make_case(10, hidden=8, vocab=40)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    def logps(x, ids, temperature):
        return linear_logps(x, weight, ids, temperature=temperature)

    compiled = torch.compile(logps, fullgraph=True, dynamic=True, backend=counter)
    for temperature in (0.5, 0.6, 0.7, 0.8, 1.0, 1.3):
        found = compiled(x, ids, temperature)
        torch.testing.assert_close(found, logps(x, ids, temperature))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("vocab", [131073, 151936])
def test_large_vocabularies_take_one_pass_on_a_cpu_by_default(vocab):
    workspace = planning.workspace_bytes(None, torch.device("cpu"), vocab)
    plan = planning.CpuChunks.plan(1024, vocab, torch.bfloat16, workspace)
    assert plan.way == "chunks" and plan.rows >= 256
    assert workspace == max(128 * 2**20, 1024 * vocab)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_of_every_dtype(backend):
    """Temperatures in fp64, as numpy gives them: all is computed and returned in fp32."""
    x, weight, ids = make_case()
    old, advantages = torch.full((9,), -4.0), torch.linspace(-1, 1, 9)
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        normalizer = torch.tensor(3, dtype=dtype)
        terms = (old.to(dtype), advantages.to(torch.float64))
        loss, _ = linear_policy_loss(*leaves, ids, *terms, normalizer=normalizer, backend=backend)
        loss.backward()
        assert loss.dtype == torch.float32
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_to_divide_is_zero(backend, compiled):
    x, weight, ids = make_case()
    mask = torch.zeros(9, dtype=torch.bool)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def loss(x, weight):
        terms = dict(mask=mask, normalizer=mask.sum(), backend=backend)
        return linear_policy_loss(x, weight, ids, None, torch.ones(9), **terms)[0]

    value = (torch.compile(loss, backend="aot_eager") if compiled else loss)(*leaves)
    value.backward()
    assert value == 0 and not any(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["chunks", "columns"])
def test_clamped_log_ratios(backend, way, monkeypatch):
    """Settings reach the fused op; an overflowing ratio has a bound and no gradient."""
    kind = planning.chunks_for(torch.empty(0), 1, backend)
    monkeypatch.setattr(kind, "plan", lambda *_: Plan(way, 4))
    x, weight, ids = make_case()
    logps = linear_logps(x, weight, ids)
    old = logps.detach() + torch.tensor([0.1, -200, 0.2, 0, 0.3, -0.1, -200, 0.1, 0])
    loss = PolicyLoss(epsilon_high=1e9, epsilon_low=0.99, log_ratio_clamp=20.0)
    results = []
    for fused in (True, False):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        terms = dict(old_logps=old, advantages=torch.ones(9), loss=loss, normalizer=1.0)
        if fused:
            value, _ = linear_policy_loss(*leaves, ids, **terms, backend=backend)
        else:
            value, _ = policy_loss(linear_logps(*leaves, ids, backend=backend), **terms)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not results[0][1][[1, 6]].any()


NUMBERS = numpy.zeros((4, 8), dtype=numpy.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(token_ids=numpy.zeros(4, dtype=numpy.int64)), "token_ids must be a torch.Tensor"),
        (dict(hidden_states=NUMBERS), "hidden_states must be a torch.Tensor"),
        (dict(lm_head_weight=torch.nn.Linear(8, 20)), "lm_head_weight must be a torch.Tensor"),
        (dict(mask=numpy.ones(4, bool)), "mask must be a torch.Tensor"),
        (dict(mask=torch.ones(4, dtype=torch.bool, device="meta")), "mask must be on cpu"),
        (dict(advantages=1.0), "advantages must be a torch.Tensor"),
        (dict(old_logps=torch.zeros(4, device="meta")), "old_logps must be on cpu"),
        (dict(loss="clip"), "loss must be"),
        (dict(workspace_mib=64.0), "workspace_mib must be"),
        (dict(normalizer=-1.0), "normalizer must be"),
        (
            dict(hidden_states=torch.zeros(4, 0), lm_head_weight=torch.zeros(20, 0)),
            r"lm_head_weight must be \[V, H\] with H > 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_of_type_and_device_are_named(change, message):
    arguments = dict(
        hidden_states=torch.zeros(4, 8),
        lm_head_weight=torch.zeros(20, 8),
        token_ids=torch.zeros(4, dtype=torch.long),
        old_logps=torch.zeros(4),
        advantages=torch.zeros(4),
        normalizer=1.0,
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_policy_loss(**arguments | change)


def policy(x, weight, ids, backend):
    ones = torch.ones(9)
    return linear_policy_loss(x, weight, ids, None, ones, normalizer=1.0, backend=backend)[0]


def token(x, weight, ids, backend):
    return linear_token_loss(x, weight, ids, lambda logps, *_: logps.square(), backend=backend)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["chunks", "columns"])
@pytest.mark.parametrize("function", [policy, token])
def test_higher_and_other_derivatives_are_refused(function, way, backend, monkeypatch):
    """Gradient penalties, Hessian products, forward mode, vmap are refused, never 0."""
    kind = planning.chunks_for(torch.empty(0), 1, backend)
    monkeypatch.setattr(kind, "plan", lambda *_: Plan(way, 4))
    x, weight, ids = make_case()
    x.requires_grad_()
    with pytest.raises(RuntimeError):
        (dx,) = torch.autograd.grad(function(x, weight, ids, backend), x, create_graph=True)
        (function(x, weight, ids, backend) + dx.square().sum()).backward()

    def loss(x):
        return function(x, weight, ids, backend)

    with pytest.raises(RuntimeError):
        torch.autograd.functional.hvp(loss, x.detach(), torch.ones_like(x))
    with pytest.raises(RuntimeError):
        torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    with pytest.raises(RuntimeError):
        torch.func.vmap(loss)(x.detach().expand(2, 9, 16))
