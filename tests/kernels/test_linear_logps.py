"""linear_logps: both backends against fp64, judged by eager's own error."""

from dataclasses import dataclass, field

import pytest
import torch
from numerics import BACKENDS, DTYPES, INTERPRETED, MatrixUnit, assert_as_accurate_as_eager, seeded
from torch import Tensor

from codistill_kernels import linear_logps, reference
from codistill_kernels._linear import planning
from codistill_kernels._linear.chunks import Plan


@dataclass
class Case:
    """Inputs of one call; `options` go to linear_logps and its reference alike."""

    hidden_states: Tensor
    lm_head_weight: Tensor
    token_ids: Tensor
    options: dict = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        named = {"hidden_states": self.hidden_states, "lm_head_weight": self.lm_head_weight}
        if "bias" in self.options:
            named["bias"] = self.options["bias"]
        return {
            name: tensor.detach().to(dtype or tensor.dtype).requires_grad_()
            for name, tensor in named.items()
        }


def make_case(*, rows=37, hidden=64, vocab=1021, dtype=torch.float32, seed=0, std=1.0, **options):
    """std: of the logits. V = 1021 is prime: no tile divides it."""
    generator = seeded(seed)
    x = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * std / hidden**0.5
    ids = torch.randint(0, options.get("vocab_size", vocab), (rows,), generator=generator)
    return Case(x.to(dtype), weight.to(dtype), ids, options)


def outputs(function, leaves: dict[str, Tensor], case: Case, upstream=None, **extra):
    """(logps, entropy) and the gradients of sum(g . logps + h . entropy)."""
    options = {key: value for key, value in case.options.items() if key != "bias"}
    result = function(**leaves, token_ids=case.token_ids, **options, return_entropy=True, **extra)
    if upstream is None:
        generator = seeded(7)
        upstream = torch.randn((2, len(case.token_ids)), generator=generator)
    torch.autograd.backward(result, [g.to(r.dtype) for g, r in zip(upstream, result, strict=True)])
    return result, {name: leaf.grad for name, leaf in leaves.items()}


def check(case: Case, backend: str, upstream: Tensor | None = None, **tolerance) -> None:
    """Ours, eager with fp32 sums and gold in fp64, all from the same (rounded) inputs."""
    (logps, entropy), grads = outputs(linear_logps, case.leaves(), case, upstream, backend=backend)
    dtypes = (case.hidden_states.dtype, case.lm_head_weight.dtype)
    with MatrixUnit(torch.promote_types(*dtypes)):
        leaves = case.leaves(torch.float32)
        eager, eager_grads = outputs(reference.linear_logps, leaves, case, upstream)
    gold, gold_grads = outputs(reference.linear_logps, case.leaves(torch.float64), case, upstream)
    assert logps.dtype == entropy.dtype == torch.float32
    assert_as_accurate_as_eager("logps", logps, eager[0], gold[0], **tolerance)
    assert_as_accurate_as_eager("entropy", entropy, eager[1], gold[1], **tolerance)
    for name, grad in grads.items():
        assert grad.dtype == case.leaves()[name].dtype
        # Eager's gradient, rounded once as ours is.
        rounded = eager_grads[name].to(grad.dtype)
        assert_as_accurate_as_eager(f"d{name}", grad, rounded, gold_grads[name], **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.7),
        dict(softcap=5.0),
        dict(softcap=300.0),
        dict(logit_scale=0.3),
        dict(logit_scale=1.7, softcap=5.0, temperature=0.6),
        dict(vocab_size=1000),
        dict(hidden=576, rows=65),
        dict(hidden=63, rows=1),
        dict(hidden=896, vocab=4099, rows=300),
        dict(hidden=16, vocab=128256, rows=3),
    ],
    ids=[
        "plain",
        "temperature",
        "softcap",
        "weak softcap",
        "scale",
        "scale, softcap, temperature",
        "vocab_size",
        "H576",
        "odd H, N1",
        "H896",
        "large V",
    ],
)
def test_equals_fp64_as_well_as_eager(backend, dtype, options):
    case = make_case(dtype=dtype, std=2.0, **options)
    upstream = None
    if len(case.token_ids) == 1:
        # A gradient row is then one number, and where the parts of logp and entropy cancel
        # its relative error is luck: leave the entropy out.
        upstream = torch.tensor([[1.5], [0.0]])
    check(case, backend, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options_at_once(backend, dtype):
    case = make_case(dtype=dtype, std=4.0, vocab_size=1003, softcap=20.0, temperature=0.8)
    generator = seeded(3)
    case.options["bias"] = torch.randn(1021, generator=generator)
    case.options["temperature"] = torch.rand(37, generator=generator) + 0.5
    case.token_ids[::5] = -100
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(backend, dtype):
    """Standard deviation 4, |z| to 60, and rows whose maximum is below -90."""
    case = make_case(rows=64, hidden=32, std=4.0, dtype=dtype, seed=1)
    case.hidden_states[0] *= 4  # |z| about 60
    bias = torch.zeros(1021)
    case.options["bias"] = bias
    case.lm_head_weight[:, 0] = 1.0
    case.hidden_states[1, :] = 0
    case.hidden_states[1, 0] = -100.0  # every logit of this row is -100
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_keep_their_gradient(backend):
    """p_y about 1 - 1e-7: p_y - 1 from rounded p_y would have no correct digit."""
    vocab, rows = 1021, 8
    weight = torch.eye(vocab)[:, :rows].contiguous()  # logit of token n in row n
    case = Case(23.0 * torch.eye(rows), weight, torch.arange(rows))
    upstream = torch.stack((torch.ones(rows), torch.zeros(rows)))
    check(case, backend, upstream, floor=1e-3)
    leaves = case.leaves()
    linear_logps(**leaves, token_ids=case.token_ids, backend=backend).sum().backward()
    # d logp / d z_y = 1 - p_y = (V - 1) e^-23 / (1 + (V - 1) e^-23) = 1.0465e-7
    assert leaves["lm_head_weight"].grad[0, 0].item() == pytest.approx(23 * 1.0465e-7, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_gradient_alone_is_right_and_not_zero(backend):
    case = make_case(std=2.0)
    upstream = torch.stack((torch.zeros(37), torch.ones(37)))
    check(case, backend, upstream)
    _, grads = outputs(linear_logps, case.leaves(), case, upstream, backend=backend)
    assert all(grad.norm() > 1e-2 for grad in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_zero_whatever_they_hold(backend):
    case = make_case(rows=6)
    case.token_ids[[1, 4]] = -100
    case.hidden_states[1], case.hidden_states[4] = torch.nan, torch.inf
    (logps, entropy), grads = outputs(linear_logps, case.leaves(), case, backend=backend)
    for value in (logps, entropy, grads["hidden_states"]):
        assert (value[[1, 4]] == 0).all()
    assert all(grad.isfinite().all() for grad in grads.values())
    others = [0, 2, 3, 5]
    kept = Case(case.hidden_states[others], case.lm_head_weight, case.token_ids[others])
    alone = linear_logps(**kept.leaves(), token_ids=kept.token_ids, backend=backend)
    assert torch.equal(logps[others], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [slice(100, 101), slice(0, 1021)], ids=["a column", "all"])
def test_nan_is_never_hidden(backend, bad):
    """With NaN in all of 64 columns no comparison finds a maximum in that tile."""
    for rows in (bad, slice(64, 128)):
        case = make_case()
        case.lm_head_weight[rows] = torch.nan
        case.token_ids[:] = 5  # outside the bad columns, but for "all"
        result = linear_logps(**case.leaves(), token_ids=case.token_ids, return_entropy=True)
        assert all(part.isnan().all() for part in result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_columns_take_no_part(backend):
    """A bias of -inf, here over a whole tile: values and gradients of a vocabulary without them."""
    bias = torch.zeros(1021)
    bias[64:128] = -torch.inf
    case = make_case(std=2.0, bias=bias)
    case.token_ids %= 64
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5], ids=["no rows", "all ignored"])
def test_nothing_to_do(backend, rows):
    case = make_case(rows=rows)
    case.token_ids[:] = -100
    (logps, _), grads = outputs(linear_logps, case.leaves(), case, backend=backend)
    assert logps.shape == (rows,) and not logps.any()
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Strided, expanded and padded inputs, and an upstream gradient of stride 0."""
    case = make_case(rows=12, hidden=32)
    plain = linear_logps(case.hidden_states, case.lm_head_weight, case.token_ids, backend=backend)
    wide = torch.stack((case.hidden_states, case.hidden_states), dim=2).flatten(1)[:, ::2]
    columns = case.lm_head_weight.T.contiguous().T
    ids = torch.stack((case.token_ids, case.token_ids), dim=1)[:, 0]
    assert not (wide.is_contiguous() or columns.is_contiguous() or ids.is_contiguous())
    assert torch.equal(linear_logps(wide, columns, ids, backend=backend), plain)
    one = case.hidden_states[:1].expand(12, 32).requires_grad_()
    leaves = {"hidden_states": one, "lm_head_weight": case.lm_head_weight}
    assert linear_logps(**leaves, token_ids=case.token_ids, backend=backend).shape == (12,)
    shaped = linear_logps(
        case.hidden_states.view(3, 4, 32).requires_grad_(),
        case.lm_head_weight,
        case.token_ids.view(3, 4),
        temperature=torch.ones(3, 4),
        backend=backend,
    )
    assert torch.equal(shaped.flatten(), plain)
    shaped.sum().backward()  # its gradient is one number, expanded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden_states", "lm_head_weight", "bias"])
def test_frozen_input_costs_no_gradient(backend, frozen, monkeypatch):
    needed = []
    kind = planning.chunks_for(torch.empty(0), 1, backend)
    original = kind.write_gradients

    def spy(*arguments):
        needed.append([gradient is not None for gradient in arguments[-4:-1]])
        original(*arguments)

    monkeypatch.setattr(kind, "write_gradients", spy)
    monkeypatch.setattr(kind, "plan", lambda *_: Plan("columns", 64))
    case = make_case(bias=torch.zeros(1021))
    leaves = case.leaves()
    leaves[frozen].requires_grad_(False)
    _, grads = outputs(linear_logps, leaves, case, backend=backend)
    names = ("hidden_states", "lm_head_weight", "bias")
    assert needed == [[name != frozen for name in names]]
    assert {name for name in names if grads[name] is None} == {frozen}


@pytest.mark.skipif(INTERPRETED, reason="halves")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(backend, dtype):
    """Half-wide hidden states with an fp32 head, forward and backward."""
    case = make_case(std=2.0)
    case.hidden_states = case.hidden_states.to(dtype)
    check(case, backend)


def test_fp64_passes_gradcheck():
    case = make_case(rows=4, hidden=5, vocab=11, softcap=3.0, vocab_size=9, temperature=0.7)
    leaves = case.leaves(torch.float64)
    torch.autograd.gradcheck(
        lambda *tensors: linear_logps(
            *tensors, case.token_ids, return_entropy=True, **case.options
        ),
        tuple(leaves.values()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_inputs_give_equal_bits(backend):
    case = make_case(rows=130, hidden=96, vocab=5003)
    first, first_grads = outputs(linear_logps, case.leaves(), case, backend=backend)
    again, again_grads = outputs(linear_logps, case.leaves(), case, backend=backend)
    assert all(map(torch.equal, first, again))
    assert all(torch.equal(first_grads[name], again_grads[name]) for name in first_grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.skipif(INTERPRETED, reason="products are a CPU library's there: no promise")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_row_does_not_depend_on_other_rows_or_threads(backend, dtype):
    case = make_case(rows=130, hidden=96, vocab=2003, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3) if backend == "cpu" else (before,):
            torch.set_num_threads(threads)
            results.append(outputs(linear_logps, case.leaves(), case, backend=backend))
    finally:
        torch.set_num_threads(before)
    (logps, _), grads = results[0]
    for (other, _), other_grads in results[1:]:
        assert torch.equal(logps, other)
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    rows = torch.tensor([129, 3, 64, 65])
    subset = linear_logps(
        case.hidden_states[rows], case.lm_head_weight, case.token_ids[rows], backend=backend
    )
    assert torch.equal(logps[rows], subset)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(token_ids=torch.zeros(5, dtype=torch.long)), "token_ids"),
        (dict(token_ids=torch.zeros(4)), "token_ids"),
        (dict(token_ids=torch.full((4,), 11)), "token_ids"),
        (dict(lm_head_weight=torch.zeros(11, 6)), "lm_head_weight"),
        (dict(hidden_states=torch.zeros(4, 5, dtype=torch.long)), "hidden_states"),
        (dict(bias=torch.zeros(10)), "bias"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=torch.zeros(4)), "temperature"),
        (dict(temperature=torch.ones(3)), "temperature"),
        (dict(softcap=-1.0), "softcap"),
        (dict(logit_scale=0.0), "logit_scale"),
        (dict(logit_scale=torch.ones(())), "logit_scale"),
        (dict(vocab_size=12), "vocab_size"),
        (dict(workspace_mib=0), "workspace_mib"),
        (dict(backend="cuda"), "backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    arguments = dict(
        hidden_states=torch.zeros(4, 5),
        lm_head_weight=torch.zeros(11, 5),
        token_ids=torch.zeros(4, dtype=torch.long),
    )
    with pytest.raises(ValueError, match=f"^{name} must be"):
        linear_logps(**arguments | change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_vocabulary_have_no_gradient(backend):
    """Whatever they hold, one row or more rows than a panel of the C++ backend."""
    for vocab_size in (1020, 300):
        case = make_case(vocab_size=vocab_size, bias=torch.zeros(1021))
        case.lm_head_weight[vocab_size:], case.options["bias"][vocab_size:] = torch.nan, torch.nan
        _, grads = outputs(linear_logps, case.leaves(), case, backend=backend)
        for name in ("lm_head_weight", "bias"):
            assert not grads[name][vocab_size:].any() and grads[name].isfinite().all()
            assert grads[name][:vocab_size].any()


def test_gradient_of_the_whole_head_is_not_copied():
    """The gradient goes to the weight as it is; through a slice it would be copied into zeros."""
    case = make_case()
    x, weight = case.leaves().values()
    _, (node, _), *_ = linear_logps(x, weight, case.token_ids).grad_fn.next_functions
    assert node.variable is weight
