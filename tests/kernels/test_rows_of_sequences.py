"""Tokens [B, T]: what flat tokens and cu_seqlens give, in the caller's shape."""

import math

import pytest
import torch
import torch._dynamo.testing
from numerics import BACKENDS, DTYPES, MatrixUnit, assert_as_accurate_as_eager, seeded

from codistill_kernels import (
    PolicyLoss,
    codistill_losses,
    importance_weights,
    kl_penalty,
    linear_logps,
    linear_policy_loss,
    linear_reverse_kl,
    linear_token_loss,
    policy_loss,
    reference,
)

B, T, H, V = 5, 7, 16, 61
LENGTHS = [7, 3, 1, 0, 5]  # the fourth row is padding alone
LOSSES = {kind: PolicyLoss(kind, 0.1, 0.2) for kind in ("clip", "cispo", "gspo", "gmpo")}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def ends(rows=B, width=T):
    return width * torch.arange(rows + 1)


def padding_mask():
    return torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def log_case(dtype=torch.float64):
    """Log-probabilities [B, T] and what goes with them; NaN in the padding."""
    generator = seeded(0)
    old = -5 * torch.rand(B, T, generator=generator, dtype=dtype)
    mask = padding_mask()
    logps = old + 0.3 * torch.randn(B, T, generator=generator, dtype=dtype)
    return dict(
        logps=torch.where(mask, logps, torch.nan).requires_grad_(),
        old_logps=torch.where(mask, old, torch.nan),
        advantages=torch.randn(B, generator=generator, dtype=dtype),
        mask=mask,
        importance_weights=torch.rand(B, T, generator=generator, dtype=dtype),
    )


def head_case(dtype=torch.float32):
    generator = seeded(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    states, weight, bias = randn(B, T, H), randn(V, H) / 2, randn(V)
    mask = padding_mask()
    leaves = [
        torch.where(mask[..., None], states, torch.nan).to(dtype),
        weight.to(dtype),
        bias,
    ]
    ids = torch.where(mask, torch.randint(0, V, (B, T), generator=generator), -100)
    temperature = torch.rand(B, T, generator=generator) + 0.5
    return [leaf.requires_grad_() for leaf in leaves], ids, mask, temperature


def flat(arguments):
    """Every argument [B, T] as [N], every other as it is."""
    return {
        name: value.flatten() if isinstance(value, torch.Tensor) and value.ndim == 2 else value
        for name, value in arguments.items()
    }


def assert_same(found, flat_result):
    """loss and statistics, and gradients after them: equal bits, tokens as [B, T]."""
    (loss, stats), (flat_loss, flat_stats) = found, flat_result
    assert torch.equal(loss, flat_loss) and stats.keys() == flat_stats.keys()
    for name, value in stats.items():
        expected = flat_stats[name]
        expected = expected.view(B, T) if expected.ndim else expected
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


@every_loss
def test_policy_loss_is_that_of_the_definition(loss):
    """fp64, against reference.policy_loss of flat tokens with cu_seqlens."""
    case = log_case()
    value, stats = policy_loss(**case, loss=loss, normalizer=3.0)
    terms = flat(case | {"logps": case["logps"].detach()})
    leaf = terms.pop("logps").requires_grad_()
    bounds = dict(kind=loss.kind, epsilon_low=0.1, epsilon_high=0.2)
    gold = reference.policy_loss(leaf, **terms, **bounds, normalizer=3.0, cu_seqlens=ends())
    torch.testing.assert_close(value, gold, rtol=1e-12, atol=1e-14)
    value.backward()
    gold.backward()
    expected = leaf.grad.view(B, T)
    torch.testing.assert_close(case["logps"].grad, expected, rtol=1e-12, atol=1e-14)
    assert stats["logps"].shape == (B, T) and stats["tokens"] == sum(LENGTHS)
    assert_same(
        (value, stats), policy_loss(**flat(case), loss=loss, normalizer=3.0, cu_seqlens=ends())
    )


def test_gspo_by_hand():
    """Two rows, the last token of the second padding: means of the log-ratio 0.1 and 0.2."""
    logps = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.2, -2.0], [-0.7, -9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = policy_loss(
        logps, old, torch.tensor([2.0, -3.0]), mask, loss=PolicyLoss("gspo"), normalizer=4.0
    )
    first, second = math.exp(0.1), math.exp(0.2)
    # Each token weighs the whole sequence's surrogate: 2 tokens and 1.
    assert loss.item() == pytest.approx(-(2 * 2 * first - 3 * second) / 4)
    loss.backward()
    wanted = [[-2 * first / 4, -2 * first / 4], [3 * second / 4, 0]]
    torch.testing.assert_close(logps.grad, torch.tensor(wanted, dtype=torch.float64))
    assert stats["tokens"] == 3


def test_advantages_of_tokens():
    """[B, T] advantages that are alike in a row are those of the row."""
    case = log_case()
    by_row = policy_loss(**case, normalizer=3.0)
    by_token = policy_loss(
        **case | dict(advantages=case["advantages"][:, None].expand(B, T)), normalizer=3.0
    )
    assert torch.equal(by_row[0], by_token[0])


@pytest.mark.parametrize("weights", ["tokens", "sequences", None])
def test_kl_penalty(weights):
    case = log_case()
    weights = {"tokens": case["importance_weights"], "sequences": case["advantages"].abs()}.get(
        weights
    )
    arguments = dict(logps=case["logps"], reference_logps=case["old_logps"], mask=case["mask"])
    value, stats = kl_penalty(**arguments, weights=weights, normalizer=3.0)
    is_row = weights is not None and weights.ndim == 1
    by_token = weights[:, None].expand(B, T) if is_row else weights
    gold = reference.kl_penalty(**flat(arguments | dict(weights=by_token)), normalizer=3.0)
    torch.testing.assert_close(value, gold, rtol=1e-12, atol=1e-14)
    assert stats["tokens"] == sum(LENGTHS)
    (gradient,) = torch.autograd.grad(value, case["logps"])
    assert gradient.isfinite().all() and not gradient[3].any()


def test_importance_weights():
    case = log_case()
    pair = dict(trainer_logps=case["logps"], engine_logps=case["old_logps"], mask=case["mask"])
    found = importance_weights(**pair, truncate=1.1)
    gold = reference.importance_weights(**flat(pair), truncate=1.1)
    assert found.shape == (B, T) and not found.requires_grad
    torch.testing.assert_close(found, gold.view(B, T), rtol=1e-12, atol=0)


def with_flat_twin(function, leaves, ids, **arguments):
    """(loss, statistics) of [B, T] and of [N] tokens, and the gradients of both."""
    results = []
    for is_flat in (False, True):
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        states, weight, bias = copies
        if is_flat:
            states, given = states.flatten(0, 1), flat(arguments) | dict(token_ids=ids.flatten())
        else:
            given = arguments | dict(token_ids=ids)
        loss, stats = function(states, weight, bias=bias, **given)
        loss.sum().backward()
        results.append(((loss, stats), [copy.grad for copy in copies]))
    return results


@every_backend
@every_loss
def test_linear_policy_loss(loss, backend):
    leaves, ids, mask, temperature = head_case()
    case = log_case(torch.float32)
    terms = {name: case[name] for name in ("old_logps", "advantages", "importance_weights", "mask")}

    def function(states, weight, **arguments):
        if states.ndim == 2:
            arguments["cu_seqlens"] = ends()
        return linear_policy_loss(states, weight, **arguments)

    options = dict(loss=loss, normalizer=3.0, temperature=temperature, backend=backend)
    (found, grads), (expected, flat_grads) = with_flat_twin(
        function, leaves, ids, **terms, **options
    )
    assert_same(found, expected)
    assert all(map(torch.equal, grads, flat_grads))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gspo_is_as_accurate_as_eager(dtype, backend):
    """Against the definition in fp64: log-probabilities, loss and all three gradients."""
    leaves, ids, mask, temperature = head_case(dtype)
    case = log_case(torch.float32)
    old, advantages = case["old_logps"], case["advantages"]
    loss = PolicyLoss("gspo", 0.5, 0.5)

    def definition(dtype):
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        states, weight, bias = copies
        options = dict(bias=bias, temperature=temperature.to(dtype).flatten())
        logps = reference.linear_logps(states.flatten(0, 1), weight, ids.flatten(), **options)
        value = reference.policy_loss(
            logps,
            old.to(dtype).flatten(),
            advantages.to(dtype),
            mask.flatten(),
            kind="gspo",
            epsilon_low=0.5,
            epsilon_high=0.5,
            normalizer=3.0,
            cu_seqlens=ends(),
        )
        value.backward()
        return [value.detach(), *(copy.grad for copy in copies)]

    gold = definition(torch.float64)
    with MatrixUnit(dtype):
        eager = definition(torch.float32)
    states, weight, bias = leaves
    terms = dict(loss=loss, normalizer=3.0, bias=bias, temperature=temperature, backend=backend)
    value, _ = linear_policy_loss(states, weight, ids, old, advantages, mask, **terms)
    value.backward()
    ours = [value.detach(), *(leaf.grad for leaf in leaves)]
    for name, a, b, c in zip(("loss", "dx", "dw", "db"), ours, eager, gold, strict=True):
        assert_as_accurate_as_eager(name, a, b.to(a.dtype), c)


@every_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_token_loss(reduction, backend):
    """Rows are numbers of the flattened tokens."""
    leaves, ids, mask, temperature = head_case()
    numbers = torch.linspace(-1, 1, B * T).view(B, T)

    def fn(logps, entropy, rows):
        return numbers.flatten()[rows] * logps + 0.1 * entropy

    options = dict(mask=mask, temperature=temperature, reduction=reduction, backend=backend)
    (found, grads), (expected, flat_grads) = with_flat_twin(
        linear_token_loss, leaves, ids, fn=fn, **options
    )
    loss = expected[0].view(B, T) if reduction == "none" else expected[0]
    assert_same(found, (loss, expected[1]))
    assert all(map(torch.equal, grads, flat_grads))
    states, weight, bias = (leaf.detach().double() for leaf in leaves)
    head = dict(bias=bias, temperature=temperature.double().flatten())
    gold = reference.linear_token_loss(
        states.flatten(0, 1), weight, ids.flatten(), fn, mask.flatten(), **head
    )
    torch.testing.assert_close(found[0].sum().double(), gold, rtol=1e-5, atol=1e-5)


@every_backend
def test_linear_reverse_kl(backend):
    (states, weight, _), _, mask, temperature = head_case()
    teacher = (states.detach().flip(2), weight.detach().flip(1) + 0.1)
    options = dict(mask=mask, temperature=temperature)
    found = linear_reverse_kl((states, weight), teacher, **options, backend=backend)
    flat_heads = ((hidden.flatten(0, 1), w) for hidden, w in ((states, weight), teacher))
    expected = linear_reverse_kl(*flat_heads, **flat(options), backend=backend)
    assert found.shape == (B, T) and torch.equal(found.flatten(), expected)


@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_codistill_losses(kind):
    leaves, ids, mask, temperature = head_case()
    case = log_case(torch.float32)
    small, large = tuple(leaves), (leaves[0].detach().flip(2), leaves[1].detach() + 0.1)
    terms = dict(small_old_logps=case["old_logps"], mask=mask, temperature=temperature)
    terms |= dict(small_advantages=case["advantages"], large_advantages=-case["advantages"])
    options = dict(loss=PolicyLoss(kind), normalizer=3.0)
    found = codistill_losses(small, large, ids, **terms, **options)
    flat_models = ((hidden.flatten(0, 1), *head) for hidden, *head in (small, large))
    expected = codistill_losses(
        *flat_models, ids.flatten(), **flat(terms), **options, cu_seqlens=ends()
    )
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
@every_loss
def test_no_tokens(loss, shape):
    none, rows = torch.zeros(shape), torch.ones(shape[0])
    value, stats = policy_loss(none, none, rows, loss=loss, normalizer=0.0)
    assert value == 0 and stats["logps"].shape == shape
    states = torch.zeros(*shape, H, requires_grad=True)
    ids = none.long()
    value, stats = linear_policy_loss(
        states, torch.ones(V, H), ids, none, rows, loss=loss, normalizer=0.0
    )
    value.backward()
    assert value == 0 and stats["logps"].shape == shape and states.grad.shape == states.shape


@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_no_function_compiles_once_per_length(kind):
    weight = torch.randn(V, H)
    functions = [
        lambda x, ids, old, adv: linear_policy_loss(
            x, weight, ids, old, adv, loss=PolicyLoss(kind), normalizer=3.0
        ),
        lambda x, ids, old, adv: policy_loss(
            old, old.sin(), adv, loss=PolicyLoss(kind), normalizer=3.0
        ),
        lambda x, ids, old, adv: linear_token_loss(
            x, weight, ids, lambda logps, entropy, rows: -logps * old.flatten()[rows]
        ),
        lambda x, ids, old, adv: codistill_losses(
            (x, weight), (x, weight), ids, old, adv, adv, loss=PolicyLoss(kind), normalizer=3.0
        )[0],
    ]
    for function in functions:
        torch._dynamo.reset()
        count = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
        for width in range(10, 32, 2):
            rows = width // 2
            x, ids = torch.randn(rows, width, H), torch.randint(0, V, (rows, width))
            arguments = (x, ids, torch.randn(rows, width) - 5, torch.randn(rows))
            found, expected = compiled(*arguments), function(*arguments)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert count.frame_count <= 2


def test_linear_logps_is_of_the_same_tokens():
    leaves, ids, mask, temperature = head_case()
    states, weight, bias = (leaf.detach() for leaf in leaves)
    head = dict(bias=bias, temperature=temperature)
    logps = linear_logps(states, weight, ids, **head)
    _, stats = linear_policy_loss(
        states, weight, ids, None, torch.ones(B), mask, normalizer=1.0, **head
    )
    torch.testing.assert_close(stats["logps"], logps, rtol=1e-5, atol=1e-6)
