"""What the C++ backend holds of a linear head's logits, and the gradients it makes of it."""

import pytest
import torch
from numerics import BACKENDS, MatrixUnit, assert_as_accurate_as_eager, row_error, seeded

from codistill_kernels import _native, linear_logps, linear_policy_loss, reference
from codistill_kernels._linear import cpu_backend, planning
from codistill_kernels._linear.chunks import Plan
from codistill_kernels._linear.cpu_backend import CpuChunks, HeldLogits
from codistill_kernels._linear.head import Head

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ backend")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def library():
    planning.chunks_for(torch.empty(0), 1, "cpu")  # loads it


def make_case(rows=70, hidden=40, vocab=1021, dtype=BF16, std=2.0, seed=0):
    generator = seeded(seed)
    x = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * std / hidden**0.5
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    return x.to(dtype), weight.to(dtype), ids


def gradients(x, weight, ids, upstream, function=linear_logps, **options):
    """logps, and the gradients of hidden states and weight (and bias)."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    if "bias" in options:
        leaves.append(options.pop("bias").detach().clone().requires_grad_())
        options["bias"] = leaves[2]
    logps = function(leaves[0], leaves[1], ids, **options)
    logps.backward(upstream.to(logps.dtype))
    return logps.detach(), *(leaf.grad for leaf in leaves)


def check(x, weight, ids, upstream, **options):
    """Ours is as accurate as eager on the same rounded inputs, in every row."""
    found = gradients(x, weight, ids, upstream, **options)
    function = reference.linear_logps
    inputs = [t.float() for t in (x, weight)]
    exact = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    with MatrixUnit(torch.promote_types(x.dtype, weight.dtype)):
        eager = gradients(*inputs, ids, upstream, function, **options)
    gold = gradients(*(t.double() for t in inputs), ids, upstream.double(), function, **exact)
    names = ("logps", "dx", "dw", "db")
    for name, ours, other, right in zip(names, found, eager, gold, strict=False):
        assert_as_accurate_as_eager(name, ours, other.to(ours.dtype), right)


@pytest.fixture(params=["as the CPU multiplies", "fp32", "without torch's products"])
def products(request, monkeypatch):
    """Products by bf16 instructions; by a CPU without them; by the library itself."""
    use = _native.library().codistill_use_products
    if request.param == "fp32":
        monkeypatch.setattr(cpu_backend, "operand_dtype", lambda *_: FP32)
    elif request.param == "without torch's products":
        use(None, None, None)
    yield
    use(*_native.products_of_torch())


@pytest.fixture
def no_second_time(monkeypatch):
    """Logits are not computed again."""
    monkeypatch.setattr(CpuChunks, "write_gradients", None)


@pytest.mark.parametrize(
    ("dtypes", "is_exact", "expected"),
    [
        ((BF16, BF16), False, BF16),
        ((BF16, BF16), True, FP32),
        ((FP32, FP32), False, FP32),
        ((BF16, FP32), False, FP32),
        ((torch.float16, torch.float16), False, FP32),
    ],
    ids=str,
)
def test_exponentials_are_held_where_bf16_is_enough(dtypes, is_exact, expected):
    x, weight, ids = make_case()
    head = Head(weight.to(dtypes[1]), None, torch.ones(70), 0.0)
    held = HeldLogits(x.to(dtypes[0]), head, ids, is_exact=is_exact)
    assert held.held.dtype == expected and held.held.shape == (4, 80 * 256)


@pytest.mark.parametrize("sizes", [(70, 40, 1021), (1, 33, 300), (8, 16, 256), (300, 576, 700)])
@pytest.mark.parametrize("std", [0.02, 2.0, 12.0])
def test_gradients_of_what_is_held(products, no_second_time, sizes, std):
    """A flat softmax; a usual one; one whose panels have different powers of two, |z| to 60."""
    x, weight, ids = make_case(*sizes, std=std)
    check(x, weight, ids, torch.randn(sizes[0], generator=seeded(1)))
    if std > 2 and sizes[0] > 1:
        held = HeldLogits(x, Head(weight, None, torch.ones(sizes[0]), 0.0), ids, is_exact=False)
        assert held.powers.unique().numel() > 1 or sizes[2] <= 256


@pytest.mark.parametrize(
    "options", [dict(softcap=5.0), dict(temperature=0.6), dict(bias=True)], ids=str
)
def test_options(products, no_second_time, options):
    x, weight, ids = make_case()
    if "bias" in options:
        options = dict(bias=torch.randn(1021, generator=seeded(2)))
    check(x, weight, ids, torch.randn(70, generator=seeded(1)), **options)


def test_peaked_rows(products, no_second_time):
    """p of the token from nearly 1 to nearly 0, and a maximum below -90."""
    x, weight, ids = make_case(rows=64, hidden=32, std=4.0)
    x[:8] *= 4
    ids[:8] = (x[:8].float() @ weight.float().T).argmax(dim=1)
    weight[:, 0] = 1.0
    x[9] = 0
    x[9, 0] = -100.0
    check(x, weight, ids, torch.randn(64, generator=seeded(1)))


def test_rows_without_a_gradient_are_left_out(no_second_time):
    """The others have the same bits as without such rows; what those hold does not matter."""
    x, weight, ids = make_case(rows=150)
    upstream = torch.randn(150, generator=seeded(1))
    rows = torch.arange(150)[torch.arange(150) % 3 != 0]
    upstream[::3] = 0
    x[::3] = torch.nan
    _, dx, dw = gradients(x, weight, ids, upstream)
    _, part_dx, part_dw = gradients(x[rows], weight, ids[rows], upstream[rows])
    assert torch.equal(dx[rows], part_dx) and torch.equal(dw, part_dw)
    assert not dx[::3].any()


def test_gradients_depend_neither_on_threads_nor_on_other_rows(products):
    x, weight, ids = make_case(rows=333, hidden=200)
    upstream = torch.randn(333, generator=seeded(1))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(gradients(x, weight, ids, upstream))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    for some in (slice(0, 1), slice(7, 20), slice(60, 190), slice(320, 333)):
        logps, dx, _ = gradients(x[some], weight, ids[some], upstream[some])
        assert torch.equal(logps, results[0][0][some]) and torch.equal(dx, results[0][1][some])


def test_second_backward_pass_computes_the_logits_again():
    x, weight, ids = make_case()
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss = linear_logps(*leaves, ids).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for one, other in zip(first, again, strict=True):
        assert row_error(one, other) < 0.02


def test_small_upstream_gradient_keeps_its_digits():
    """A power of two changes no digit; without a common factor 2^-100 x leaves bf16's range."""
    x, weight, ids = make_case()
    upstream = torch.randn(70, generator=seeded(1))
    _, dx, dw = gradients(x, weight, ids, upstream)
    _, small_dx, small_dw = gradients(x, weight, ids, upstream * 2.0**-100)
    assert torch.equal(small_dw, dw * 2.0**-100) and torch.equal(small_dx, dx * 2.0**-100)


def test_entropy_and_bias_take_the_same_pass(no_second_time):
    x, weight, ids = make_case(dtype=FP32)
    bias = torch.randn(1021, generator=seeded(2))
    upstream = torch.randn((2, 70), generator=seeded(1))
    results = []
    for dtype, function in ((FP32, linear_logps), (torch.float64, reference.linear_logps)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        outputs = function(*leaves[:2], ids, bias=leaves[2], return_entropy=True)
        torch.autograd.backward(outputs, list(upstream.to(dtype)))
        results.append([leaf.grad.float() for leaf in leaves])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_plan_by_what_a_logit_takes():
    assert CpuChunks.plan(1000, 2000, BF16, 4_000_000) == Plan("kept", 1000)
    assert CpuChunks.plan(1000, 2000, FP32, 4_000_000) == Plan("chunks", 500)
    assert CpuChunks.plan(1000, 2000, BF16, 1_000_000) == Plan("columns", 125)


def test_policy_loss_is_kept_too(no_second_time):
    x, weight, ids = make_case()
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss, _ = linear_policy_loss(*leaves, ids, None, torch.randn(70), normalizer=70.0)
    loss.backward()
    assert all(leaf.grad.dtype == BF16 and leaf.grad.any() for leaf in leaves)
