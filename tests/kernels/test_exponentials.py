"""Exponentials that are kept for the gradients: the Triton backend's way, and what it costs.

The kernels run in Triton's interpreter and on a GPU; on the CPU the same code runs in bf16 with the
kernels written out in PyTorch, since the interpreter cuts bf16 instead of rounding it.
"""

import math

import pytest
import torch
import torch.distributed as dist
from numerics import (
    BACKENDS,
    DEVICE,
    DTYPES,
    INTERPRETED,
    MatrixUnit,
    assert_as_accurate_as_eager,
    row_error,
    seeded,
)
from processes import spawn

from codistill_kernels import linear_logps, reference
from codistill_kernels._linear import exponentials_triton, slab_sizes, slabs, triton_backend
from codistill_kernels._linear.chunks import Plan
from codistill_kernels._linear.head import Head
from codistill_kernels._scaling import scale_in_place

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="runs in test_triton.py")
NO_MATTER = dict(has_entropy=True, needs_dw=True, workspace=0)  # where raw logits are kept
WAYS = {"kept": False, "kept, shared": True, "columns": None}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How the backward pass gets its gradients, whatever the memory."""
    # Several segments and slabs, on a GPU too.
    monkeypatch.setattr(slab_sizes, "SEGMENT", 512)
    monkeypatch.setattr(slab_sizes, "ROWS", 16)
    monkeypatch.setattr(slab_sizes, "ROW_PADDING", 8)
    is_shared = WAYS[request.param]
    plan = Plan("columns" if is_shared is None else "kept", 0)
    monkeypatch.setattr(slab_sizes, "plan", lambda *_: plan)
    monkeypatch.setattr(slab_sizes, "shares_memory", lambda *_: is_shared)
    return request.param


def make_case(rows=20, hidden=24, vocab=1100, std=2.0, dtype=torch.float32):
    generator = seeded(0)
    x = torch.randn(rows, hidden, generator=generator)
    weight = std * torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    ids = torch.randint(0, 1000, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    return x.to(dtype), weight.to(dtype), ids, upstream


def gradients(function, x, weight, ids, upstream, **options):
    """logps and the gradients of hidden states and head of sum(upstream logps)."""
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    logps = function(*leaves, ids, **options)
    (upstream.to(logps.dtype) * logps).sum().backward()
    return logps.detach(), *(leaf.grad for leaf in leaves)


def exact_logps(hidden_states, lm_head_weight, ids, *, temperature=1.0, **options):
    """In fp64, with all digits of p_y - 1 where autograd through a softmax has none."""
    vocab_size, softcap = options.get("vocab_size"), options.get("softcap")
    z = (hidden_states @ lm_head_weight.T + options.get("bias", 0.0))[:, :vocab_size]
    z = z if softcap is None else softcap * (z / softcap).tanh()
    z = z / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    target = z.gather(1, ids[:, None])
    others = z.scatter(1, ids[:, None], -torch.inf)
    return -torch.nn.functional.softplus((others - target).logsumexp(dim=1))


def check(case, ours, **options):
    """Against eager with products as a matrix unit makes them, and fp64, from the same inputs."""
    *tensors, ids, upstream = case
    with MatrixUnit(tensors[0].dtype):
        wide = [t.float() for t in tensors]
        eager = gradients(reference.linear_logps, *wide, ids, upstream, **options)
    wide = [t.double() for t in tensors]
    gold = gradients(exact_logps, *wide, ids, upstream, **options)
    for name, got, base, target in zip(("logps", "dx", "dw"), ours, eager, gold, strict=True):
        assert_as_accurate_as_eager(name, got, base.to(got.dtype), target)


def check_triton(case, **options):
    check(case, gradients(linear_logps, *case, backend="triton", **options), **options)


def peaked(case, size):
    """Every third row sure of its token, whose logit is about `size`."""
    x, weight, ids, upstream = case
    w = weight[ids[::3]].float()
    x[::3] = (size * w / w.norm(dim=1, keepdim=True) ** 2).to(x.dtype)
    return x, weight, ids, upstream


OPTIONS = {
    "plain": dict(),
    "temperatures": dict(temperature=torch.linspace(0.5, 2, 20)),
    "softcap": dict(softcap=5.0, temperature=0.7),
    "odd vocab_size": dict(vocab_size=1001),
    "one segment": dict(vocab_size=500),
}


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_fp64_as_well_as_eager(way, options, dtype):
    options = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    x, weight, ids, upstream = make_case(dtype=dtype)
    ids %= options.get("vocab_size", 1100)
    check_triton((x, weight, ids, upstream), **options)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [20.0, 60.0, 130.0, -130.0])
def test_peaked_rows_keep_their_gradient(way, size, dtype):
    """Beyond 42 nats segments have different powers of two, which are brought to one."""
    check_triton(peaked(make_case(std=4.0, dtype=dtype), size))


@needs_triton
@pytest.mark.parametrize("largest", [41.5888309, 41.588834, 85.9501, 42.0, -2.7725887, 500.0])
def test_segments_apart_by_one_power_of_two(way, largest):
    """Logits near 60, 124 and -4 log(2) nats, where offsets change; dW of tokens 50 nats below."""
    logits = torch.linspace(-3, 3, 1100) + largest - 50
    logits[7], logits[600], logits[1050] = largest, largest - 1, largest - 2
    ids = torch.tensor([7, 600, 1050, 3])
    case = torch.ones(4, 1), logits[:, None].contiguous(), ids, torch.tensor([1.0, -2.0, 3.0, 0.5])
    logps, _, dw = gradients(linear_logps, *case, backend="triton")
    exact = gradients(exact_logps, *(t.double() for t in case[:2]), *case[2:])
    torch.testing.assert_close(logps.double(), exact[0], rtol=2e-6, atol=1e-4)
    assert row_error(dw, exact[2]) < 1e-4  # fp32 logits of this size are so exact


@needs_triton
@pytest.mark.parametrize("base", [30.0, 1000.0, -1000.0])
def test_logits_far_from_zero(way, base):
    """All logits of a row: their gradients sum to 0, and an error of that sum counts base times."""
    x, weight, ids, upstream = make_case()
    x[:, 0], weight[:, 0] = 1.0, base
    check_triton((x, weight, ids, upstream))


@needs_triton
def test_after_a_backward_pass_that_failed(way, monkeypatch):
    """A pass that fails has used the exponentials up: the next one computes logits again."""
    x, weight, ids, upstream = make_case()
    expected = gradients(linear_logps, x, weight, ids, upstream, backend="triton")
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    loss = (upstream * linear_logps(*leaves, ids, backend="triton")).sum()
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise torch.OutOfMemoryError

        for module in (exponentials_triton, triton_backend):
            patch.setattr(module, "product", fail)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-6)


@needs_triton
def test_second_derivatives_are_refused(way):
    x, weight, ids, upstream = make_case(rows=4)
    expected = gradients(linear_logps, x, weight, ids, upstream, backend="triton")
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    loss = (upstream * linear_logps(*leaves, ids, backend="triton")).sum()
    dx, _ = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.testing.assert_close(dx.detach(), expected[1], rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="codistill.linear_gradients"):
        dx.square().sum().backward()


@needs_triton
def test_banned_columns_and_a_bias(way):
    case = make_case()
    bias = torch.linspace(-3, 3, 1100)
    bias[512:1024] = -torch.inf  # a segment of nothing else
    case[2][:] %= 500
    check_triton(case, bias=bias)


@needs_triton
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["gathered", "all, others 0"])
def test_rows_without_a_gradient_do_not_reach_it(way, share, monkeypatch):
    """Neither ignored rows nor rows whose upstream gradient is 0 do, whatever they hold."""
    monkeypatch.setattr(slab_sizes, "GATHERED_SHARE", share)
    x, weight, ids, upstream = make_case()
    ids[::4], upstream[1::4] = -100, 0.0
    x[::4], x[5] = torch.nan, torch.inf
    rows = torch.arange(20) % 4 > 1
    _, dx, dw = gradients(linear_logps, x, weight, ids, upstream, backend="triton")
    assert not dx[~rows].any() and dx[rows].any(dim=1).all()
    kept = (x[rows], weight, ids[rows], upstream[rows])
    _, dx_kept, dw_kept = gradients(linear_logps, *kept, backend="triton")
    torch.testing.assert_close(dx[rows], dx_kept, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dw, dw_kept, rtol=1e-5, atol=1e-6)


@needs_triton
def test_nan_is_never_hidden(way):
    x, weight, ids, upstream = make_case()
    x[3, 5] = torch.nan
    logps, dx, dw = gradients(linear_logps, x, weight, ids, upstream, backend="triton")
    assert logps[3].isnan() and dx[3].isnan().all() and dw.isnan().any(dim=1).all()


@needs_triton
@pytest.mark.parametrize("has_entropy", [False, True])
def test_nan_upstream_is_never_hidden(way, has_entropy):
    x, weight, ids, upstream = make_case()
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    upstream[3] = torch.nan
    parts = linear_logps(*leaves, ids, return_entropy=True, backend="triton")
    (upstream * parts[int(has_entropy)]).sum().backward()
    assert leaves[0].grad[3].isnan().all() and leaves[1].grad.isnan().all()
    assert leaves[0].grad[[2, 4]].isfinite().all()


@needs_triton
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_costs_nothing(way, frozen):
    x, weight, ids, upstream = make_case()
    expected = gradients(linear_logps, x, weight, ids, upstream, backend="triton")
    leaves = [x.clone().requires_grad_(frozen != 0), weight.clone().requires_grad_(frozen != 1)]
    (upstream * linear_logps(*leaves, ids, backend="triton")).sum().backward()
    assert leaves[frozen].grad is None
    # The products of all slices at once sum in another order.
    torch.testing.assert_close(leaves[1 - frozen].grad, expected[2 - frozen], rtol=1e-5, atol=1e-6)


@needs_triton
def test_second_backward_pass_computes_again(way):
    x, weight, ids, upstream = make_case()
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss = (upstream * linear_logps(*leaves, ids, backend="triton")).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(3 * one, other, rtol=1e-4, atol=1e-6)


@needs_triton
def test_entropy_alone_and_with_log_probabilities(way):
    """Its gradient is made of unrounded logits; its value costs the kept way nothing."""
    x, weight, ids, upstream = make_case()
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    logps, entropy = linear_logps(*leaves, ids, return_entropy=True, backend="triton")
    found = torch.autograd.grad((upstream * (logps + entropy)).sum(), leaves)
    gold = [t.double().requires_grad_() for t in (x, weight)]
    logps, entropy = reference.linear_logps(*gold, ids, return_entropy=True)
    expected = torch.autograd.grad((upstream.double() * (logps + entropy)).sum(), gold)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def half_of_the_vocabulary(rank: int, folder: str) -> None:
    """One of two processes; the second's logits are 300 nats below the first's in some rows, above
    them in others, so that the target's term is all of the softmax or none of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    slab_sizes.SEGMENT, slab_sizes.ROWS, slab_sizes.ROW_PADDING = 64, 32, 16
    x, weight, ids, upstream = make_case(rows=12, hidden=8, vocab=200)
    ids %= 200
    x[:, 0], weight[:100, 0], weight[100:, 0] = torch.linspace(-150, 150, 12), 1.0, -1.0
    mine = slice(100 * rank, 100 * (rank + 1))
    expected = gradients(exact_logps, *(t.double() for t in (x, weight)), ids, upstream)
    for way in ("kept", "columns"):
        slab_sizes.plan = lambda *_, way=way: Plan(way, 0)
        options = dict(group=dist.group.WORLD, backend="triton")
        logps, dx, dw = gradients(linear_logps, x, weight[mine], ids, upstream, **options)
        found = (logps, dx, dw)
        for one, other in zip(found, (*expected[:2], expected[2][mine]), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="two processes of the interpreter")
def test_shards_give_the_whole(tmp_path):
    spawn(half_of_the_vocabulary, str(tmp_path), processes=2)


# --- in bf16, with the kernels written out in PyTorch ------------------------------------------


def states_of_segments(
    logits,
    bias,
    token_ids,
    temperature,
    softcap,
    columns,
    first_column,
    states,
    has_entropy,
    exponentials=None,
):
    """What `segment_states` launches, of one segment."""
    assert bias is None and softcap == 0 and len(states) == 1
    z = logits[:, :columns] / temperature[:, None]
    maximum = z.amax(dim=1)
    shifted = z - maximum[:, None]
    e = shifted.exp()
    target = token_ids - first_column
    here = (target[:, None] == torch.arange(columns)).float()
    offset = (((maximum / math.log(2)).floor() + 4) / 64).floor() * 64 - 4
    rest, weighted = (e * (1 - here)).sum(1), (e * shifted).sum(1)
    slope = torch.ones_like(rest)
    parts = (maximum, rest, weighted, (here * z).sum(1), slope, offset)
    states[0] = torch.stack(parts)
    if exponentials is not None:
        exponentials.zero_()
        e = e * (maximum / math.log(2) - offset).exp2()[:, None]
        exponentials[:, :columns] = e.to(exponentials.dtype)


def merge_states(states, token_ids, vocab):
    """What the launcher of this name launches."""
    maxima, totals, weighted, targets, _, _ = states.unbind(1)
    owner = token_ids.div(slab_sizes.SEGMENT, rounding_mode="floor")
    is_owner = owner == torch.arange(len(states))[:, None]
    maximum, target = maxima.amax(0), torch.where(is_owner, targets, 0.0).sum(0)
    factor = (maxima - maximum).exp()
    terms = torch.where(is_owner, (targets - maxima).exp(), 0.0)
    weighted = factor * (weighted + (maxima - maximum) * (totals + terms))
    others = (factor * totals).sum(0)
    rest = torch.where(target == maximum, others, others + (factor * terms).sum(0) - 1)
    return torch.stack((maximum, rest, weighted.sum(0), target))


class FinishExponentials:
    """What `finish_exponentials_kernel` does."""

    def __getitem__(self, grid):
        return self.launch

    @staticmethod
    def launch(e, rows, shifts, ids, at_target, factors, kept, first, segments, columns, *_, **__):
        for segment in range(segments):
            part = e[
                rows, segment * slab_sizes.SEGMENT : (segment + 1) * slab_sizes.SEGMENT
            ].float()
            part *= shifts[first + segment].exp2()[:, None]
            e[rows, segment * slab_sizes.SEGMENT : (segment + 1) * slab_sizes.SEGMENT] = part.to(
                e.dtype
            )
        assert factors.all()
        column = ids - first * slab_sizes.SEGMENT
        here = ((column >= 0) & (column < columns)).nonzero().squeeze(1)
        e[rows[here], column[here]] = at_target[here].to(e.dtype)


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="kernels written out, on the CPU")
@pytest.mark.parametrize("size", [None, 30.0, 60.0], ids=["flat", "peaked 30", "peaked 60"])
@pytest.mark.parametrize("std", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_bf16_errors_are_at_most_twice_those_of_eager(monkeypatch, std, size, shared):
    """Eager rounds the gradient of the logits to bf16, this way E and the scaled hidden states."""
    monkeypatch.setattr(slab_sizes, "SEGMENT", 1024)
    monkeypatch.setattr(slabs, "segment_states", states_of_segments)
    monkeypatch.setattr(exponentials_triton, "merge_states", merge_states)
    monkeypatch.setattr(exponentials_triton, "finish_exponentials_kernel", FinishExponentials())
    case = make_case(rows=256, hidden=256, vocab=8000, std=std, dtype=torch.bfloat16)
    x, weight, ids, upstream = case if size is None else peaked(case, size)
    head = Head(weight, None, torch.full((256,), 0.9), 0.0)
    kept = exponentials_triton.Exponentials(x, head, ids, is_shared=shared)
    maximum, rest, weighted, target = kept.statistics
    lse_parts = torch.stack((maximum, rest.log1p(), weighted / (1 + rest)))
    every = torch.arange(256)
    dw = kept.head_gradient(torch.bfloat16)
    dx = kept.gradients(every, -upstream, lse_parts, True, dw)
    ours = (target - maximum - rest.log1p(), dx.bfloat16(), dw)
    check((x, weight, ids, upstream), ours, temperature=0.9)


@needs_triton
def test_kept_logits_take_temperatures_and_bias_of_any_layout():
    x, weight, ids, _ = make_case()
    bias, every = torch.randn(2 * len(weight), generator=seeded(1))[::2], torch.arange(len(x))
    found = []
    for temperature, of_row in ((torch.tensor(0.7).expand(len(x)), bias), (None, bias.clone())):
        temperature = torch.full((len(x),), 0.7) if temperature is None else temperature
        head = Head(weight, of_row, temperature, 0.0)
        chunks = triton_backend.TritonChunks(x, head, ids)
        kept = chunks.keep(every, len(weight), is_exact=True, **NO_MATTER)
        found.append(kept.statistics)
    assert torch.equal(*found)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 7), (100, 60), (4096, 3), (333, 77)])
def test_scaled_in_place_equals_scaled(shape):
    gradient = torch.randn(shape, generator=seeded(0))
    expected = (gradient * 0.3).bfloat16()
    memory = gradient.data_ptr()
    found = scale_in_place(gradient, torch.tensor(0.3), torch.bfloat16)
    assert torch.equal(found, expected) and found.data_ptr() == memory
