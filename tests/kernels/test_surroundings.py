"""What surrounds a call: the process's default dtype, autocast, overflow, second derivatives, ids
that nobody checks, memory that is shared."""

import contextlib

import pytest
import torch
from numerics import BACKENDS, DEVICE, assert_as_accurate_as_eager, seeded
from torch.autograd import forward_ad
from torch.autograd.functional import hvp

from codistill_kernels import (
    linear_logps,
    linear_policy_loss,
    linear_reverse_kl,
    reference,
    selective_logps,
)

ROWS, WIDTH, VOCAB = 9, 16, 37


def make_case():
    """hidden [N, H], weight [V, H], ids [N]"""
    generator = seeded(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    return hidden, weight, torch.randint(0, VOCAB, (ROWS,), generator=generator)


def with_gradients(function, *tensors):
    """Values of a function, and the gradients of their sum."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    values = function(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    sum(v.sum() for v in values).backward()
    return [*(v.detach() for v in values), *(leaf.grad for leaf in leaves)]


def everything(hidden, weight, ids, backend, temperature=0.75, bias=None):
    """Values and gradients of every operation, by name."""
    bias = torch.zeros(VOCAB, dtype=hidden.dtype) if bias is None else bias
    old, advantages = torch.full((ROWS,), -4, dtype=torch.float32), ids.float() - 18.5
    options = dict(temperature=temperature, backend=backend)

    def logps(x, w, b):
        return linear_logps(x, w, ids, bias=b, return_entropy=True, **options)

    def loss(x, w, b):
        arguments = (x, w, ids, old, advantages)
        return linear_policy_loss(*arguments, normalizer=3.0, bias=b, **options)[0]

    def selective(z):
        return selective_logps(z, ids, return_entropy=True, **options)

    logits = hidden.double() @ weight.double().T + bias.double()
    teacher = (hidden.flip(0), weight.flip(1))
    return {
        "linear_logps": with_gradients(logps, hidden, weight, bias),
        "linear_policy_loss": with_gradients(loss, hidden, weight, bias),
        "selective_logps": with_gradients(selective, logits.to(hidden.dtype)),
        "linear_reverse_kl": [linear_reverse_kl((hidden, weight), teacher, **options)],
    }


def assert_same_bits(got, expected):
    for name, values in expected.items():
        for value, other in zip(values, got[name], strict=True):
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_dtype_makes_no_difference(backend, dtype):
    case = make_case()
    expected = everything(*case, backend)
    with default_dtype(dtype):
        got = everything(*case, backend)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_is_as_good_a_temperature_as_a_tensor(backend, dtype):
    hidden, weight, ids = make_case()
    logits, teacher = hidden @ weight.T, (hidden.flip(0), weight)
    temperature, results = torch.tensor(0.7, dtype=torch.float32), []
    with default_dtype(dtype):
        for number in (temperature, 0.7):
            options = dict(temperature=number, backend=backend)
            results.append(selective_logps(logits, ids, **options))
            results.append(linear_reverse_kl((hidden, weight), teacher, **options))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_makes_no_difference(backend):
    hidden, weight, ids = make_case()
    for dtypes in ((torch.float32,) * 2, (torch.float32, torch.bfloat16)):
        case = (*(t.to(d) for t, d in zip((hidden, weight), dtypes, strict=True)), ids)
        expected = everything(*case, backend)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = everything(*case, backend)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("kind", ["hidden state", "one element", "one bias", "one logit"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_is_never_hidden(backend, kind):
    """A row with a logit of +inf has no log-probability, of whichever token."""
    hidden, weight, ids = make_case()
    bias = torch.zeros(VOCAB)
    ids[ids == 5] = 6
    is_bad = torch.arange(ROWS) == 2
    if kind == "hidden state":
        hidden[2] = 3e38
    elif kind == "one element":
        hidden[2, 0] = -torch.inf
    elif kind == "one bias":
        bias[5] = torch.inf
        is_bad = torch.ones(ROWS, dtype=torch.bool)
    if kind == "one logit":
        logits = hidden @ weight.T
        logits[2, 5] = torch.inf
        got = with_gradients(
            lambda z: selective_logps(z, ids, return_entropy=True, backend=backend), logits
        )
        for value in got:
            is_nan = value.isnan() if value.ndim == 1 else value.isnan().all(dim=1)
            assert is_nan.tolist() == [n == 2 for n in range(ROWS)]
        return
    results = everything(hidden, weight, ids, backend, bias=bias)
    logps, entropy, dx, dw, db = results["linear_logps"]
    for value in (logps, entropy, dx[:, 0]):
        assert torch.equal(value.isnan(), is_bad)
    assert dw.isnan().all() and db.isnan().all()
    loss, dx, dw, db = results["linear_policy_loss"]
    assert loss.isnan() and dx[is_bad].isnan().all() and dw.isnan().all() and db.isnan().all()
    if kind != "one bias":
        kl = results["linear_reverse_kl"][0]
        assert kl.isnan().tolist() == [n in (2, ROWS - 3) for n in range(ROWS)]


@pytest.mark.parametrize("columns", [1, 2], ids=["one column", "two columns"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_of_either_model_is_never_hidden(backend, columns):
    hidden, weight, _ = make_case()
    huge = weight.clone()
    huge[:columns] = 3e38 * hidden[4].sign()
    good, bad = (hidden[4:5], weight), (hidden[4:5], huge)
    for pair in ((good, bad), (bad, good), (bad, bad)):
        assert linear_reverse_kl(*pair, backend=backend).isnan().all()
    assert linear_reverse_kl(good, good, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_backward_wants_memory_of_its_own(backend):
    ids = torch.arange(6)
    options = dict(inplace_backward=True, backend=backend)
    row, rows = torch.randn(1, VOCAB), torch.randn(6, 2 * VOCAB)
    windows = torch.randn(6 + VOCAB).as_strided((6, VOCAB), (1, 1))
    for wrong in (row.expand(6, VOCAB), row.expand(2, 3, VOCAB), windows):
        with pytest.raises(ValueError, match="^logits must be .*inplace_backward"):
            selective_logps(wrong, ids.view(wrong.shape[:-1]), **options)
    for right in (rows[:, :VOCAB], rows[:, ::2], rows.view(12, VOCAB)[::2], rows.T[:6, :6]):
        values = selective_logps(right.clone(), ids % right.shape[1], **options)
        assert torch.equal(selective_logps(right, ids % right.shape[1], **options), values)
    assert selective_logps(row.expand(6, VOCAB), ids, backend=backend).isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_at_low_temperature_is_as_good_as_eager(backend, temperature):
    generator = seeded(0)
    logits = 30 * torch.randn(150, 255, generator=generator)
    ids = torch.randint(0, 255, (150,), generator=generator)
    options = dict(temperature=temperature, softcap=30.0)
    gold, eager = (
        with_gradients(lambda z: reference.selective_logps(z, ids, **options), z)
        for z in (logits.double(), logits)
    )
    ours = with_gradients(lambda z: selective_logps(z, ids, backend=backend, **options), logits)
    for name, *values in zip(("logps", "dlogits"), ours, eager, gold, strict=True):
        assert_as_accurate_as_eager(name, *values)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(softcap=torch.inf), "softcap"),
        (dict(softcap=1e-50), "softcap"),
        (dict(softcap=torch.nan), "softcap"),
        (dict(temperature=torch.inf), "temperature"),
        (dict(temperature=torch.nan), "temperature"),
        (dict(temperature=[1.0, torch.inf] + [1.0] * (ROWS - 2)), "temperature"),
    ],
    ids=str,
)
@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not looked at")
def test_scaling_without_a_finite_result_is_refused(options, name):
    hidden, weight, ids = make_case()
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    for call in (
        lambda: linear_logps(hidden, weight, ids, **options),
        lambda: selective_logps(hidden @ weight.T, ids, **options),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call()


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative_of_logits(backend, inplace):
    hidden, weight, ids = make_case()
    logits = hidden @ weight.T

    def loss(z):
        options = dict(inplace_backward=inplace, backend=backend)
        return selective_logps(z * 1.0, ids, **options).square().sum()

    with pytest.raises(RuntimeError, match="selective_logps has no second derivatives"):
        hvp(loss, logits, logits)
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    plain = with_gradients(loss, logits)[1]
    assert torch.equal(gradient.detach(), plain)
    with pytest.raises(RuntimeError, match="selective_logps has no second derivatives"):
        (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_forward_mode_and_no_transforms(backend):
    hidden, weight, ids = make_case()
    logits = hidden @ weight.T

    def loss(z):
        return selective_logps(z, ids, backend=backend).sum()

    for call in (
        lambda: torch.func.jvp(loss, (logits,), (logits,)),
        lambda: torch.func.vmap(loss)(logits.expand(2, ROWS, VOCAB)),
        lambda: torch.func.grad(loss)(logits),
    ):
        with pytest.raises(RuntimeError, match="selective_logps does not work inside torch.func"):
            call()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, logits)
        with pytest.raises(RuntimeError, match="selective_logps has no forward-mode derivative"):
            loss(dual)
        assert loss(logits).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_give_nan_where_nobody_looks(backend, monkeypatch):
    """Values are not looked at, as on a GPU and under torch.compile."""
    monkeypatch.setattr("codistill_kernels._checks.can_look", lambda tensor: False)
    hidden, weight, ids = make_case()
    wrong, ignored = [1, 3, 4, 6], 5
    ids[wrong], ids[ignored] = torch.tensor([VOCAB - 2, -1, VOCAB, VOCAB + 1000]), -100
    for softcap in (None, 9.0):

        def function(z, softcap=softcap):
            options = dict(vocab_size=VOCAB - 2, softcap=softcap, backend=backend)
            return selective_logps(z - 150.0, ids, return_entropy=True, **options)

        logps, entropy, gradient = with_gradients(function, hidden @ weight.T)
        is_wrong = torch.zeros(ROWS, dtype=torch.bool)
        is_wrong[wrong] = True
        for value in (logps, entropy, gradient[:, 0]):
            assert torch.equal(value.isnan(), is_wrong)
            assert value[~is_wrong].isfinite().all() and value[ignored] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_give_nan_when_compiled(backend):
    hidden, weight, ids = make_case()
    ids[2] = VOCAB
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z: selective_logps(z, ids, backend=backend), fullgraph=True, backend="aot_eager"
    )
    assert compiled(hidden @ weight.T).isnan().tolist() == [n == 2 for n in range(ROWS)]
