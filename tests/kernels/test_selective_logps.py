"""selective_logps: log-probabilities and gradients of logits that are in memory."""

import pytest
import torch
from numerics import BACKENDS, DTYPES, INTERPRETED, assert_as_accurate_as_eager, seeded

from codistill_kernels import linear_logps, reference, selective_logps
from codistill_kernels._linear import slab_sizes, softmax_triton
from codistill_kernels._linear.softmax_torch import lse_parts_of


def make_case(dtype=torch.float32, *, rows=20, columns=1021, std=4.0):
    generator = seeded(0)
    logits = (std * torch.randn(rows, columns, generator=generator)).to(dtype)
    ids = torch.randint(0, columns - 20, (rows,), generator=generator)
    return logits, ids


def outputs(function, logits, ids, **options):
    """logps, entropy and the gradient of a mixed sum of them."""
    leaf = logits.clone().requires_grad_()
    logps, entropy = function(leaf, ids, return_entropy=True, **options)
    generator = seeded(1)
    upstream = torch.randn((2, *ids.shape), generator=generator).to(logps.dtype)
    (upstream[0] * logps + upstream[1] * entropy).sum().backward()
    return logps, entropy, leaf.grad


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES if INTERPRETED else [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.7, vocab_size=1003),
        dict(softcap=5.0),
        dict(softcap=20.0, temperature=torch.linspace(0.5, 2, 20)),
    ],
    ids=["plain", "temperature, vocab_size", "softcap", "softcap, temperatures"],
)
def test_equals_fp64_as_well_as_eager(options, dtype, backend, inplace):
    logits, ids = make_case(dtype)
    logits[3] *= 4  # |z| about 60
    if "softcap" not in options:  # there it leaves nothing of any gradient, in fp32
        logits[4] -= 200  # a maximum below -90
    ids[::5] = -100
    target = torch.zeros(logits.shape, dtype=torch.bool)
    target[torch.arange(20), ids.clamp(min=0)] = True
    gold = outputs(reference.selective_logps, logits.double(), ids, **options)
    eager = outputs(reference.selective_logps, logits.float(), ids, **options)
    ours = outputs(
        selective_logps, logits, ids, backend=backend, inplace_backward=inplace, **options
    )
    for name, *values in zip(("logps", "entropy"), ours, eager, gold, strict=False):
        assert values[0].dtype == torch.float32
        assert_as_accurate_as_eager(name, *values)
    parts = dict(target=target, others=~target)
    # Eager's gradient, rounded once as ours is.
    assert ours[2].dtype == dtype
    assert_as_accurate_as_eager("dlogits", ours[2], eager[2].to(dtype), gold[2], parts=parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_keep_their_gradient(backend):
    logits = 23.0 * torch.eye(8, 1021)
    ids = torch.arange(8)
    leaf = logits.clone().requires_grad_()
    logps = selective_logps(leaf, ids, backend=backend)
    logps.sum().backward()
    # 1 - p_y = (V - 1) e^-23 / (1 + (V - 1) e^-23) = 1.0467e-7; eager's logp would be 0 or -1.2e-7
    expected = 1020 * torch.tensor(-23.0, dtype=torch.float64).exp()
    torch.testing.assert_close(logps, torch.full((8,), -expected.log1p().item()), rtol=1e-5, atol=0)
    expected = expected / (1 + expected)
    torch.testing.assert_close(leaf.grad[ids, ids], expected.float().expand(8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_zero_whatever_they_hold(backend):
    logits, ids = make_case(rows=6)
    ids[[1, 4]] = -100
    logits[1], logits[4] = torch.nan, torch.inf
    logps, entropy, grad = outputs(selective_logps, logits, ids, backend=backend)
    assert not logps[[1, 4]].any() and not entropy[[1, 4]].any() and not grad[[1, 4]].any()
    assert grad.isfinite().all() and grad[[0, 2, 3, 5]].any(dim=1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_linear_logps_of_the_same_logits(backend):
    logits, ids = make_case()
    eye = torch.eye(1021)
    expected = linear_logps(logits, eye, ids, backend=backend)
    torch.testing.assert_close(selective_logps(logits, ids, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_layouts(backend, inplace):
    """Columns cut off, a transposed tensor, more dimensions; and nothing outside is written."""
    logits, ids = make_case(rows=12)
    expected = outputs(selective_logps, logits, ids, backend=backend)
    wide = torch.cat((logits, torch.full((12, 9), 7.0)), dim=1)
    views = (wide[:, :1021], logits.T.contiguous().T, logits.view(3, 4, 1021))
    for view in views:
        shaped = ids.view(view.shape[:-1])
        leaf = view.clone(memory_format=torch.preserve_format).requires_grad_()
        cut = leaf if view is not views[0] else wide.clone().requires_grad_()[:, :1021]
        cut.retain_grad()
        logps = selective_logps(cut, shaped, backend=backend, inplace_backward=inplace)
        # Bits where the order of sums is ours; PyTorch's depends on the strides.
        exact = dict(rtol=0, atol=0) if backend == "cpu" else dict(rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(logps.reshape(-1), expected[0], **exact)
        logps.sum().backward()
        plain = logits.clone().requires_grad_()
        selective_logps(plain, ids, backend=backend).sum().backward()
        torch.testing.assert_close(cut.grad.reshape(12, 1021), plain.grad, **exact)


@pytest.mark.skipif("triton" not in BACKENDS, reason="runs in test_triton.py")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_triton_passes_over_a_row_do_not_depend_on_other_rows(softcap, dtype):
    """States, exponentials, statistics and gradients, of the same products and numbers: bit for
    bit. Products are a library's; slabs of fixed shapes are tested in test_linear_logps.py."""
    generator = seeded(0)
    logits = 3 * torch.randn(40, 1100, generator=generator)
    ids = torch.randint(0, 1100, (40,), generator=generator)
    temperature, coefficients = torch.linspace(0.5, 2, 40), torch.rand(3, 40, generator=generator)

    def statistics(rows):
        token = (ids[rows], temperature[rows], softcap)
        states = torch.zeros(-(-1100 // slab_sizes.SEGMENT), softmax_triton.STATES, len(rows))
        e = torch.zeros(len(rows), 1152, dtype=dtype)
        softmax_triton.segment_states(logits[rows], None, *token, 1100, 0, states, True, e)
        return states.permute(2, 0, 1), e, softmax_triton.merge_states(states, ids[rows], 1100).T

    def gradients_of(rows, lse_parts):
        token = (ids[rows], temperature[rows], softcap)
        dz = torch.empty(len(rows), 1100)
        numbers = (t[:, rows].contiguous() for t in (coefficients, lse_parts))
        softmax_triton.logit_gradients(logits[rows], dz, None, *token, 1100, 0, *numbers)
        return dz

    all_rows, some = torch.arange(40), torch.tensor([39, 3, 17, 18, 5])
    every = statistics(all_rows)
    for whole, few in zip(every, statistics(some), strict=True):
        assert whole.any() and torch.equal(whole[some], few)
    lse_parts = lse_parts_of(every[2].T)
    dz = gradients_of(all_rows, lse_parts)
    assert dz.any() and torch.equal(dz[some], gradients_of(some, lse_parts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_backward_writes_over_the_logits(backend):
    logits, ids = make_case()
    leaf = logits.clone().requires_grad_()
    held = leaf * 1.0
    selective_logps(held, ids, inplace_backward=True, backend=backend).sum().backward()
    assert torch.equal(held.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        held = leaf * 1.0
        loss = selective_logps(held, ids, inplace_backward=True, backend=backend).sum()
        loss.backward()
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5], ids=["no rows", "all ignored"])
def test_nothing_to_do(backend, rows):
    logits, ids = make_case(rows=rows)
    ids[:] = -100
    logps, entropy, grad = outputs(selective_logps, logits, ids, backend=backend)
    assert logps.shape == (rows,) and not logps.any() and not grad.any()


def test_fp64_passes_gradcheck():
    logits, ids = make_case(torch.float64, rows=4, columns=30)
    options = dict(softcap=3.0, vocab_size=15, temperature=0.7, return_entropy=True)
    ids %= 15
    leaf = logits.requires_grad_()
    torch.autograd.gradcheck(lambda z: selective_logps(z, ids, **options), (leaf,))


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, inplace):
    logits, ids = make_case(rows=5, columns=40)
    ids %= 40

    def step(leaf):
        options = dict(backend=backend, inplace_backward=inplace, return_entropy=True)
        logps, entropy = selective_logps(leaf * 2.0, ids, **options)
        return (logps + 0.5 * entropy).sum()

    plain, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    step(plain).backward()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(plain.grad, compiled.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_pass_opcheck(backend):
    logits, ids = make_case(rows=5, columns=40)
    ids %= 40
    options = (ids, torch.ones(5), 4.0, 33)
    ops = torch.ops.codistill
    torch.library.opcheck(ops.logits_statistics, (logits, *options, True, backend))
    numbers = (torch.randn(3, 5), torch.rand(3, 5), backend)
    for source in (logits, None):
        arguments = (logits.clone(), source, *options, *numbers)
        torch.library.opcheck(ops.write_logits_gradients, arguments)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(logits=torch.zeros(4, 0)), "logits"),
        (dict(logits=torch.zeros(4, 9).long()), "logits"),
        (dict(token_ids=torch.zeros(3, dtype=torch.long)), "token_ids"),
        (dict(token_ids=torch.full((4,), 9)), "token_ids"),
        (dict(vocab_size=10), "vocab_size"),
        (dict(temperature=-1.0), "temperature"),
        (dict(softcap=0.0), "softcap"),
        (dict(backend="gpu"), "backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    arguments = dict(logits=torch.zeros(4, 9), token_ids=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        selective_logps(**arguments | change)
